"""Samples of a dataset to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava.constants import IGNORE_INDEX
from llava.data.stored_features import join_images
from llava.transfer import HostBatch


@dataclass
class DataCollatorForSupervisedDataset:
    """Pads the texts of samples and gathers their images.

    Attributes:
        tokenizer: gives `pad_token_id` and `padding_side`.
        packing: ask the model to run the batch as one row without padding.
    """

    tokenizer: Any
    packing: bool = False

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of B samples.

        Args:
            instances: items of `LazySupervisedDataset`.

        Returns:
            `input_ids`, `labels` and `attention_mask` (LongTensor [B, S], padded on the tokenizer's side),
            `images` (of the whole batch, see `join_images`) and `image_sizes` (a list), both empty without images,
            `videos` (a list of clips, where there are any), `texts` (B strings), `host` (the first three once more,
            which stay on the host), and `packed` where asked for.

        Raises:
            ValueError: the tokenizer has no padding token.
        """
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no padding token; set tokenizer.pad_token, e.g. to its eos or unk token"
            )
        ids = [instance["input_ids"] for instance in instances]
        input_ids = self._pad(ids, self.tokenizer.pad_token_id)
        labels = self._pad([instance["labels"] for instance in instances], IGNORE_INDEX)
        # By length: the padding id itself may also be a token of the text (eos, unk).
        mask = self._pad([torch.ones_like(one) for one in ids], 0)
        videos = [clip for instance in instances for clip in instance.get("videos", [])]
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": mask,
            "images": join_images([instance["images"] for instance in instances]),
            "image_sizes": [size for instance in instances for size in instance["image_sizes"]],
            "texts": [instance["text"] for instance in instances],
            "host": HostBatch(input_ids, mask.bool(), labels),
            **({"videos": videos} if videos else {}),
            **({"packed": True} if self.packing else {}),
        }

    def _pad(self, sequences: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            list(sequences),
            batch_first=True,
            padding_value=value,
            padding_side="left" if self.tokenizer.padding_side == "left" else "right",
        )
