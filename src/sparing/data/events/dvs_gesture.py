"""Reader of DVS128 Gesture as it is published: AEDAT 3.1 files with label tables, and the lists of trials.

A. Amir et al., "A Low Power, Fully Event-Based Gesture Recognition System", CVPR 2017. Nothing is downloaded.
"""

from __future__ import annotations

import csv
import struct
from pathlib import Path

import numpy as np

from sparing.core.errors import DataError
from sparing.data.events.stream import EventRecordings, EventStream

SIDE = 128
CLASSES = (
    "hand_clapping",
    "right_hand_wave",
    "left_hand_wave",
    "right_arm_clockwise",
    "right_arm_counter_clockwise",
    "left_arm_clockwise",
    "left_arm_counter_clockwise",
    "arm_roll",
    "air_drums",
    "air_guitar",
    "other_gestures",
)
"""Class 1 of the label tables is the first."""
LISTS = {True: "trials_to_train.txt", False: "trials_to_test.txt"}
_PACKET = struct.Struct("<hhiiiiii")
"""eventType, eventSource, eventSize, eventTSOffset, eventTSOverflow, eventCapacity, eventNumber, eventValid."""
POLARITY = 1
"""The event type of changes in brightness."""


def read_aedat31(path: Path | str, side: int = SIDE) -> EventStream:
    """The valid polarity events of an AEDAT 3.1 file, in microseconds, in the order of time.

    A packet's header has 28 bytes, little-endian; a polarity event is a word (bit 0 valid, 1 polarity, 2–16 y, 17–31 x)
    and a signed 32-bit time, to which the packet's count of overflows adds 2³¹ each. Packets of other types are passed
    over. Raises :class:`DataError` for another format, a packet that is cut off, and events out of the sensor.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; an AEDAT 3.1 file is expected there") from error
    if not content.startswith(b"#!AER-DAT3.1"):
        raise DataError(f"{path} begins with {content[:16]!r}; an AEDAT 3.1 file begins with '#!AER-DAT3.1'")
    marker = b"#!END-HEADER\r\n"
    position = content.find(marker)
    if position < 0:
        raise DataError(f"{path}: no line '#!END-HEADER' ends the header")
    position += len(marker)
    words, times = [], []
    while position < len(content):
        if position + _PACKET.size > len(content):
            raise DataError(f"{path}: the packet at byte {position} is cut off within its header")
        kind, _, size, offset, overflow, _, number, _ = _PACKET.unpack_from(content, position)
        body, position = position + _PACKET.size, position + _PACKET.size + size * number
        if size < 1 or number < 0 or overflow < 0 or position > len(content):
            raise DataError(
                f"{path}: the packet at byte {body - _PACKET.size} has {number} events of {size} bytes and "
                f"{overflow} overflows, more than the file holds"
            )
        if kind != POLARITY or not number:
            continue
        if (size, offset) != (8, 4):
            raise DataError(f"{path}: polarity events of {size} bytes, times at {offset}; 8 and 4 are expected")
        events = np.frombuffer(content, "<u4", 2 * number, body).reshape(number, 2)
        words.append(events[:, 0])
        times.append(events[:, 1].view("<i4").astype(np.int64) + (overflow << 31))
    word = np.concatenate(words or [np.empty(0, np.uint32)]).astype(np.int64)
    t = np.concatenate(times or [np.empty(0, np.int64)])
    valid = (word & 1) == 1
    word, t = word[valid], t[valid]
    order = np.argsort(t, kind="stable")
    word = word[order]
    try:
        return EventStream((word >> 17) & 0x7FFF, (word >> 2) & 0x7FFF, t[order], (word >> 1) & 1, (side, side))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def read_trials(path: Path | str) -> list[tuple[int, int, int]]:
    """(class from 0, start, end in microseconds) of each row of a label table ``class,startTime_usec,endTime_usec``."""
    path, rows = Path(path), []
    try:
        with path.open(newline="", encoding="ascii") as file:
            table = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}; a table of labels is expected there") from error
    if not table or [name.strip() for name in table[0]] != ["class", "startTime_usec", "endTime_usec"]:
        raise DataError(f"{path}: the first line is not 'class,startTime_usec,endTime_usec'")
    for line, row in enumerate(table[1:], start=2):
        if not row:
            continue
        try:
            label, start, end = (int(cell) for cell in row)
        except ValueError as error:
            raise DataError(f"{path}, line {line}: {row}; three whole numbers are expected") from error
        if not (1 <= label <= len(CLASSES) and start < end):
            raise DataError(f"{path}, line {line}: {row}; a class in 1…{len(CLASSES)} and a start before the end")
        rows.append((label - 1, start, end))
    return rows


def read_dvs_gesture(folder: Path | str, train: bool) -> EventRecordings:
    """The training or test recordings of a folder of DVS128 Gesture: a stream for each row of the label tables.

    ``trials_to_train.txt`` and ``trials_to_test.txt`` name the files ``userNN_LIGHT.aedat``; beside each lies
    ``userNN_LIGHT_labels.csv``. A person is the number in the name. Rows in whose span no event lies are refused.
    """
    folder = Path(folder)
    listed = folder / LISTS[train]
    try:
        names = [line.strip() for line in listed.read_text("ascii").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listed} cannot be read: {error}; DVS128 Gesture has such a list of .aedat files") from error
    streams, labels, people = [], [], []
    for name in names:
        path = folder / name
        if path.parent != folder or path.suffix != ".aedat" or name[:4] != "user" or not name[4:6].isdigit():
            raise DataError(f"{listed}: {name!r}; names like user01_fluorescent.aedat are expected")
        whole = read_aedat31(path)
        for label, start, end in read_trials(folder / f"{path.stem}_labels.csv"):
            low, high = np.searchsorted(whole.t, [start, end])
            if low == high:
                raise DataError(f"{path}: no event between {start} and {end} µs, where a gesture is labelled")
            inside = slice(low, high)
            streams.append(
                EventStream(whole.x[inside], whole.y[inside], whole.t[inside], whole.p[inside], whole.sensor_size)
            )
            labels.append(label)
            people.append(int(name[4:6]))
    return EventRecordings.of(streams, labels, CLASSES, people, str(folder))
