"""Clips: what one may be, which of its frames are taken, and how a file is decoded for those alone."""

from llava.video.clips import Clip, Frame, read_clip
from llava.video.errors import MissingReaderError, VideoError
from llava.video.sampling import Sampling

__all__ = ["Clip", "Frame", "MissingReaderError", "Sampling", "VideoError", "read_clip"]
