"""MMTok: keep the patches that together cover the question's words and the picture.

Paper: MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs, https://arxiv.org/abs/2508.18264.
Shapes: N images, P patches, M kept ones, S tokens of words, R = S + P of what is covered, C vision width, D
language-model width.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava.constants import SHORT_ANSWER
from llava.reduction.base import EncoderReducer, Needs, VisionFeatures, VisualTokens
from llava.reduction.options import Count
from llava.reduction.registry import register
from llava.reduction.selection import at_least_float32, precise_product, take_in_raster_order

WORDS_TEMPERATURE, PATCHES_TEMPERATURE = 0.02, 0.2
PATCHES_WEIGHT = 0.5  # that of the words is 1
ANSWER_FORMATS = (
    SHORT_ANSWER,
    "Answer with the option's letter from the given choices directly.",
)
_STOP_WORDS = (
    "a an the is are was were be been being have has had do does did it they he she we you i what where when why how "
    "who which and or but so if then question answer to for with by from at into onto upon"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())


@register("mmtok")
class MMTok(EncoderReducer):
    """Choose patches one by one, each the one that adds most to how well words and patches are covered.

    A patch covers a word by the softmax, over the patches, of the cosine of the projected patch and the language
    model's embedding of the word; it covers a patch by that of the two patches before the projector. A word or patch
    is covered as well as by the best of the chosen patches. Words of the question without a meaning of their own, and
    lines that say the answer's form, are left out. With `image_aspect_ratio: pad` patches that lie wholly in the
    padding are taken only where no others are left. The kept patches stay in raster order.

    | point | release | here |
    |---|---|---|
    | question | one for all pictures of a batch, by a hook on the prompt's template | that of each sample |
    | patches in the padding | never kept; of a picture of 336 pixels | last of all; of any size |
    """

    tokens: Count = 64  # patches to keep

    @property
    def needs(self) -> Needs:
        return Needs(projected=True, text="words", padding=True)

    def phrases(self, question: str) -> list[str]:
        """The words of the question that mean something; all of it, where none does."""
        for line in ANSWER_FORMATS:
            question = question.replace(line, "")
        words = re.findall(r"\b\w+\b", question)
        return [word for word in words if word.lower() not in STOP_WORDS] or question.split()

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """[N, P, D] projected patches to [N, M, D]."""
        if vision.projected is None or vision.text is None:
            raise self.mistake(
                "it compares projected patches with the words of a question: pass projected= and text= [N, S, D], or "
                "call the model with texts=[...], one for each sample"
            )
        n, p, _ = vision.projected.shape
        count = min(self.tokens, p)
        chosen = cover(self.coverage(vision), count, vision.padding)
        is_kept = torch.zeros(n, p, dtype=torch.bool, device=chosen.device).scatter_(1, chosen, True)
        return take_in_raster_order(vision.projected, is_kept, [count] * n)

    @torch.no_grad()
    def coverage(self, vision: VisionFeatures) -> Tensor:
        """[N, R, P], how well each patch covers each word and patch; 0 for words that are padding."""
        assert vision.projected is not None
        assert vision.text is not None
        words, projected, patches = (
            normalize(at_least_float32(values), dim=2) for values in (vision.text, vision.projected, vision.features)
        )
        by_word = (precise_product(words, projected.transpose(1, 2)) / WORDS_TEMPERATURE).softmax(dim=2)
        real = by_word.new_ones(by_word.shape[:2]) if vision.text_mask is None else vision.text_mask.to(by_word.dtype)
        by_word = by_word * (real / real.sum(dim=1, keepdim=True)).unsqueeze(2)
        by_patch = (precise_product(patches, patches.transpose(1, 2)) / PATCHES_TEMPERATURE).softmax(dim=2)
        return torch.cat([by_word, by_patch * (PATCHES_WEIGHT / patches.shape[1])], dim=1)


def cover(coverage: Tensor, count: int, excluded: Tensor | None = None) -> Tensor:
    """[N, M] int64, `count` patches in the order of their choice, each the first of those that add most.

    Args:
        coverage: [N, R, P], at least 0.
        count: at most P.
        excluded: [N, P] bool, patches that are taken only after all others.
    """
    n, _, p = coverage.shape
    taken = torch.zeros(n, p, dtype=torch.bool, device=coverage.device)
    last = taken if excluded is None else excluded
    others = (~last).sum(dim=1, keepdim=True)
    best, chosen = torch.zeros_like(coverage[:, :, :1]), []
    for step in range(count):
        gain = (coverage - best).clamp(min=0).sum(dim=1).masked_fill(taken | (last & (step < others)), -1)
        chosen.append(gain.argmax(dim=1, keepdim=True))
        taken = taken.scatter(1, chosen[-1], True)
        column = chosen[-1].unsqueeze(1).expand(-1, coverage.shape[1], -1)
        best = torch.maximum(best, coverage.gather(2, column))
    return torch.cat(chosen, dim=1)
