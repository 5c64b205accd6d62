"""The frames of a video file by number and time, without decoding one.

The index that an MP4 or QuickTime file begins or ends with says all of it, if its frames come at a constant rate.
Otherwise the file's packets are read once: the time stamp of a frame is known no other way, and of some containers
(Matroska, WebM, MPEG-TS, FLV) neither is the number of frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_USUAL_RATE = 25.0  # frames a second of a raw stream that says nothing of it, as FFmpeg takes it


@dataclass(frozen=True)
class Timeline:
    """The frames of a stream in the order in which they are shown; T frames, K of them keyframes.

    Attributes:
        times: seconds since the first frame, float64 [T].
        stamps: time stamps in units of the stream, int64 [T]; None: it has none, and frames are counted.
        keys: numbers of the keyframes, ascending [K].
        seeks: for each keyframe the time stamps to seek to, the one that costs least first.
    """

    times: np.ndarray
    stamps: np.ndarray | None
    keys: np.ndarray
    seeks: list[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.times)

    def number(self, stamp: int) -> int:
        """The number of the frame whose time stamp is nearest to `stamp`."""
        assert self.stamps is not None
        right = int(np.searchsorted(self.stamps, stamp))
        if right == 0 or (right < len(self.stamps) and self.stamps[right] - stamp <= stamp - self.stamps[right - 1]):
            return right
        return right - 1

    def key_before(self, number: int) -> tuple[int, tuple[int, ...]]:
        """The last keyframe that is not after a frame, and where to seek for it; (-1, ()) where there is none."""
        place = int(np.searchsorted(self.keys, number, side="right")) - 1
        return (int(self.keys[place]), self.seeks[place]) if place >= 0 else (-1, ())


def read_timeline(container: Any, stream: Any, broken: tuple[type[Exception], ...]) -> Timeline:
    """The timeline of a stream of a container, which is left at any position.

    Args:
        container: an opened PyAV container, at its start.
        stream: the video stream of it.
        broken: errors of a file that is cut off or damaged; the frames before it count.
    """
    return _from_index(container, stream) or _from_packets(container, stream, broken)


def _from_index(container: Any, stream: Any) -> Timeline | None:
    """By the file's own index, where that is complete and its frames come evenly; without those that are cut off."""
    entries = stream.index_entries
    if "mov" not in container.format.name or not stream.frames or len(entries) != stream.frames:
        return None
    rows = np.array([(e.timestamp, e.pos + e.size, e.is_keyframe, e.is_discard) for e in entries], dtype=np.int64)
    steps = np.diff(rows[:, 0])
    if rows[:, 3].any() or stream.start_time is None or (len(steps) and steps.max() - steps.min() > 1):
        return None
    rows = rows[rows[:, 1] <= container.size] if container.size > 0 else rows
    if not len(rows):
        return None
    stamps = rows[:, 0] - rows[0, 0] + stream.start_time
    keys = np.flatnonzero(rows[:, 2])
    # Such a file is sought by the times of decoding, which the index has.
    return Timeline(_seconds(stamps, stream), stamps, keys, [(int(stamp),) for stamp in rows[keys, 0]])


def _from_packets(container: Any, stream: Any, broken: tuple[type[Exception], ...]) -> Timeline:
    shown: list[int | None] = []
    decoded: list[int | None] = []
    is_key: list[bool] = []
    try:
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                shown.append(packet.pts)
                decoded.append(packet.dts)
                is_key.append(packet.is_keyframe)
    except broken:
        pass
    if None in shown:
        rate = float(stream.average_rate or stream.guessed_rate or _USUAL_RATE)
        return Timeline(np.arange(len(shown)) / rate, None, np.array([], dtype=np.int64), [])
    stamps, first = np.unique(np.array(shown, dtype=np.int64), return_index=True)
    keys = np.flatnonzero(np.array(is_key, dtype=bool)[first])
    if container.format.name == "mpeg":  # where several frames share a packet, those after a seek get wrong stamps
        keys = keys[:0]
    seeks = []
    for packet_number in first[keys]:
        both = (shown[packet_number], decoded[packet_number])
        seeks.append(tuple(dict.fromkeys(stamp for stamp in both if stamp is not None)))
    return Timeline(_seconds(stamps, stream), stamps, keys, seeks)


def _seconds(stamps: np.ndarray, stream: Any) -> np.ndarray:
    return (stamps - stamps[:1]) * float(stream.time_base)
