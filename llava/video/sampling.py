"""Which frames of a clip are taken.

Shape letters: T frames of the clip, F frames that are taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_FRAMES = 4096
"""Frames of one clip at most."""


@dataclass(frozen=True)
class Sampling:
    """Which frames of a clip are taken.

    Attributes:
        num_frames: so many, evenly from the first to the last, by their numbers: `numpy.linspace(0, T - 1, F)`, rounded
            down, as in LLaVA-NeXT, LLaVA-Video and Video-LLaVA. A clip of fewer frames gives some of them more than
            once, as there.
        fps: in place of `num_frames`, frames a second by the clip's time stamps: those nearest to the times 0, 1/fps,
            2/fps, ... No frame comes twice.
        max_frames: where there would be more, so many, evenly as with `num_frames`.

    Raises:
        ValueError: one is out of range.
    """

    num_frames: int = 8
    fps: float | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "max_frames"):
            value = getattr(self, name)
            if name == "max_frames" and value is None:
                continue
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 1 <= value <= MAX_FRAMES:
                raise ValueError(f"{name}={value!r}: expected a whole number from 1 to {MAX_FRAMES}")
        if self.fps is not None and not _is_rate(self.fps):
            raise ValueError(f"fps={self.fps!r}: expected frames a second, above 0, such as 1 or 0.5")

    @classmethod
    def of_model(
        cls, config: Any, num_frames: int | None = None, fps: float | None = None, max_frames: int | None = None
    ) -> Sampling:
        """What a checkpoint was trained with, but for what is asked.

        Args:
            config: the model's; its keys are `num_frames`, `video_fps` and `max_frames`.
            num_frames, fps, max_frames: in place of the checkpoint's. So many frames are no rate, and a rate no number.
        """
        if num_frames is None and fps is None:
            fps = getattr(config, "video_fps", None)
        if num_frames is None:
            num_frames = getattr(config, "num_frames", None) or cls.num_frames
        return cls(num_frames, fps, getattr(config, "max_frames", None) if max_frames is None else max_frames)

    def indices(self, total: int, times: np.ndarray | None) -> np.ndarray:
        """Numbers of the frames that are taken, ascending, int64 [F].

        Args:
            total: T, at least 1.
            times: seconds since the first frame, ascending [T]; None: the frames have no times, and are all taken
                where `fps` is set, up to `max_frames`.

        Raises:
            ValueError: there would be more than `MAX_FRAMES`.
        """
        limit = self.max_frames or MAX_FRAMES
        if self.fps is None:
            return uniform_indices(total, min(self.num_frames, limit))
        taken = np.arange(total) if times is None else _at_rate(times, self.fps)
        if len(taken) <= limit:
            return taken
        if self.max_frames is None:
            raise ValueError(
                f"fps={self.fps} takes {len(taken)} frames of it, at most {MAX_FRAMES} are read; set max_frames, or a "
                "lower fps"
            )
        return uniform_indices(total, self.max_frames)


def uniform_indices(total: int, count: int) -> np.ndarray:
    """`count` numbers from 0 to `total` - 1 at equal distances, rounded down, int64 [F]."""
    return np.linspace(0, total - 1, count).astype(np.int64)


def _at_rate(times: np.ndarray, fps: float) -> np.ndarray:
    """Numbers of the frames nearest to 0, 1/fps, 2/fps, ..., each once; the earlier of two that are as near."""
    until = np.concatenate([(times[1:] + times[:-1]) / 2, times[-1:]]) * fps  # where a frame is no longer the nearest
    ticks = np.floor(until + 1e-6)
    return np.flatnonzero(np.diff(ticks, prepend=-1) > 0)


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
