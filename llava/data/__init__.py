"""Training data: conversations to ids and labels, the dataset, and the collator."""

from llava.data.collator import DataCollatorForSupervisedDataset
from llava.data.dataset import LazySupervisedDataset
from llava.data.preprocessing import (
    ConversationError,
    NoTrainableTokensError,
    Preprocessed,
    build_prompt,
    build_prompt_ids,
    preprocess,
)
from llava.data.streaming import StreamingSupervisedDataset

__all__ = [
    "ConversationError",
    "DataCollatorForSupervisedDataset",
    "LazySupervisedDataset",
    "NoTrainableTokensError",
    "Preprocessed",
    "StreamingSupervisedDataset",
    "build_prompt",
    "build_prompt_ids",
    "preprocess",
]
