"""The generation config of a model, as it can be written."""

from __future__ import annotations

import copy
import logging
from typing import Any

logger = logging.getLogger(__name__)


def writable_generation_config(model: Any, pad_token_id: int | None) -> Any:
    """A model's generation config, such that transformers writes it.

    Vicuna's sets a temperature without sampling, which transformers refuses to write.
    """
    generation = copy.deepcopy(model.generation_config)
    generation.pad_token_id = pad_token_id
    try:
        generation.validate(strict=True)
    except ValueError:
        logger.info("generation_config sets how to sample but not do_sample; it is written with do_sample")
        generation.do_sample = True
    return generation
