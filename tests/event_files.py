"""Files of event cameras that tests read."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np


def bars(place: Path, splits: tuple[str, ...] = ("",), count: int = 24) -> Path:
    """Class sub-folders, in each split, of recordings of 8×8 pixels: bars that move to the right, or upwards."""
    draw = np.random.default_rng(0)
    for split in splits:
        for label in ("right", "up"):
            (place / split / label).mkdir(parents=True)
            for number in range(count):
                t = np.sort(draw.integers(0, 4000, 120))
                along, across = (t // 500 + draw.integers(0, 2, 120)) % 8, draw.integers(0, 8, 120)
                x, y = (along, across) if label == "right" else (across, along)
                np.savez(place / split / label / f"{number}.npz", x=x, y=y, t=t, p=draw.integers(0, 2, 120))
    return place


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
    _dvs(folder, (1, 2), (3,), (1, 11), 1000, 100)


def dvs_files(place: Path) -> Path:
    """A data folder with DVS128 Gesture's layout: five people, each gesture twice, events evenly distributed."""
    folder = place / "dvs128_gesture"
    if not folder.exists():
        folder.mkdir()
        _dvs(folder, range(1, 5), range(5, 6), [i % 11 + 1 for i in range(22)], 6000, 6000)
    return place


def _dvs(
    folder: Path, train: Iterable[int], test: Iterable[int], gestures: Sequence[int], span: int, events: int
) -> None:
    """Each person's gestures, numbered from 1, of ``span`` µs each, with ``events`` in all."""
    draw = np.random.default_rng(0)
    for name, people in {"trials_to_train.txt": train, "trials_to_test.txt": test}.items():
        (folder / name).write_text("".join(f"user{person:02d}_lab.aedat\n" for person in people))
        for person in people:
            t = np.sort(draw.integers(0, len(gestures) * span, events))
            x, y, p = (draw.integers(0, n, events) for n in (128, 128, 2))
            write_aedat31(folder / f"user{person:02d}_lab.aedat", x, y, t, p)
            rows = [f"{gesture},{i * span},{(i + 1) * span}" for i, gesture in enumerate(gestures)]
            table = "\n".join(["class,startTime_usec,endTime_usec", *rows]) + "\n"
            (folder / f"user{person:02d}_lab_labels.csv").write_text(table)
