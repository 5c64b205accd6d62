"""Everything about visual tokens: the methods, their names and their configuration."""

from llava.reduction.base import VisionFeatures, VisualTokens
from llava.reduction.config import ReductionConfig
from llava.reduction.decoder import dart, fastv, pyramiddrop, sparsevlm, vscan_drop  # noqa: F401  (registers the methods)
from llava.reduction.encoder import (  # noqa: F401
    cdpruner,
    divprune,
    fastervlm,
    holov,
    mmtok,
    prumerge,
    prumerge_plus,
    samplers,
    trim,
    visionzip,
    vispruner,
    vscan,
)
from llava.reduction.projector import m3, mqt, pooling, stf, tokenpacker  # noqa: F401
from llava.reduction.registry import available, build, register
from llava.reduction.tower import ats, evit, resize, tome  # noqa: F401

__all__ = ["ReductionConfig", "VisionFeatures", "VisualTokens", "available", "build", "register"]
