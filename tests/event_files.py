"""Files of event cameras that tests read."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def write_aedat31(path: Path, x, y, t, p, valid=1, packet: int = 1000, foreign: bool = False) -> None:
    """An AEDAT 3.1 file of polarity events, ``packet`` of them in each packet, between packets of another type."""
    word = np.asarray(valid, np.int64) | p << 1 | y << 2 | x << 17
    content = [b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n"]
    for start in range(0, len(t), packet):
        inside = slice(start, start + packet)
        body = np.stack([word[inside].astype(np.uint32), (t[inside] & 0x7FFFFFFF).astype(np.uint32)], 1)
        overflow, count = int(t[start]) >> 31, len(body)
        content.append(struct.pack("<hhiiiiii", 1, 0, 8, 4, overflow, count, count, count))
        content.append(body.astype("<u4").tobytes())
        if foreign:
            content.append(struct.pack("<hhiiiiii", 3, 0, 12, 8, 0, 1, 1, 1) + bytes(12))
    path.write_bytes(b"".join(content))


def dvs_folder(folder: Path) -> None:
    """DVS128 Gesture's layout: people 1 and 2 train, person 3 tests, each makes the first and the last gesture."""
    draw = np.random.default_rng(0)
    for name, people in {"trials_to_train.txt": (1, 2), "trials_to_test.txt": (3,)}.items():
        (folder / name).write_text("".join(f"user{person:02d}_lab.aedat\n" for person in people))
        for person in people:
            t = np.sort(draw.integers(0, 2000, 100))
            x, y, p = (draw.integers(0, n, 100) for n in (128, 128, 2))
            write_aedat31(folder / f"user{person:02d}_lab.aedat", x, y, t, p)
            table = "class,startTime_usec,endTime_usec\n1,0,1000\n11,1000,2000\n"
            (folder / f"user{person:02d}_lab_labels.csv").write_text(table)


def dvs_files(place: Path) -> Path:
    """A data folder with DVS128 Gesture's layout: four people, each gesture twice, events evenly distributed."""
    folder = place / "dvs128_gesture"
    if folder.exists():
        return place
    folder.mkdir()
    draw = np.random.default_rng(0)
    lists = {"trials_to_train.txt": range(1, 5), "trials_to_test.txt": range(5, 6)}
    for name, people in lists.items():
        (folder / name).write_text("".join(f"user{person:02d}_lab.aedat\n" for person in people))
        for person in people:
            t = np.sort(draw.integers(0, 22 * 6000, 6000))
            x, y, p = (draw.integers(0, n, 6000) for n in (128, 128, 2))
            write_aedat31(folder / f"user{person:02d}_lab.aedat", x, y, t, p)
            rows = [f"{i % 11 + 1},{i * 6000},{i * 6000 + 6000}" for i in range(22)]
            table = "\n".join(["class,startTime_usec,endTime_usec", *rows]) + "\n"
            (folder / f"user{person:02d}_lab_labels.csv").write_text(table)
    return place
