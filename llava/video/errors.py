"""What is wrong with a clip."""

from __future__ import annotations


class VideoError(ValueError):
    """A clip of which no frame can be had; the message names it, says what was found, and what to do."""


class MissingReaderError(ImportError):
    """PyAV is not installed. It is no fault of a sample, so none is skipped for it."""
