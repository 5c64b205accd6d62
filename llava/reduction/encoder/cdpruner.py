"""CDPruner: keep a set of patches that are relevant to the question and unlike each other.

Paper: Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs,
https://arxiv.org/abs/2506.10967.
Shapes: N images, P patches, M kept tokens, S segments of the text, D language-model width, E width of CLIP's space.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava.constants import SHORT_ANSWER
from llava.reduction.base import EncoderReducer, Needs, VisionFeatures, VisualTokens
from llava.reduction.options import Count
from llava.reduction.registry import register
from llava.reduction.selection import at_least_float32, precise_product, take_sorted


@register("cdpruner")
class CDPruner(EncoderReducer):
    """Choose patches one by one, greedily the likeliest set of a determinantal point process (DPP).

    Its kernel is the cosine of the projected patches, times the relevance of both to the question: minus the cosine of
    patch and text in CLIP's space, brought to [0, 1] within the image. The kept patches stay in raster order.

    | point | paper | release |
    |---|---|---|
    | range of the relevance | - | the batch's; here the image's, the same for a batch of one |
    | text of a batch | - | one for all; here one each |
    | more tokens than dimensions | - | NaN, and patches twice; here the most relevant patches follow |
    | budget | any | no default; here 64 |
    """

    ranks_frames = True

    tokens: Count = 64  # patches to keep

    @property
    def needs(self) -> Needs:
        return Needs(patch_embeds=True, projected=True, text="segments")

    def phrases(self, question: str) -> list[str]:
        """Without the line that asks for a short answer."""
        return [question.replace(f"\n{SHORT_ANSWER}", "")]

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """[N, P, D] projected patches to [N, M, D]."""
        if vision.projected is None or vision.patch_embeds is None or vision.text is None:
            raise ValueError(
                "cdpruner compares projected patches, and patches with a text: pass projected=, patch_embeds= and "
                "text=, or call the model with texts=[...], one for each sample"
            )
        text = vision.text if vision.text.ndim == 3 else vision.text.unsqueeze(1)
        relevance = relevance_of(vision.patch_embeds, text, vision.text_mask)
        unit = normalize(at_least_float32(vision.projected.detach()), dim=2)
        kernel = precise_product(unit, unit.transpose(1, 2))
        kernel.mul_(relevance.unsqueeze(2)).mul_(relevance.unsqueeze(1))
        return take_sorted(vision.projected, likeliest_set(kernel, min(self.tokens, unit.shape[1])))


def relevance_of(patches: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
    """How much each patch [N, P, E] has to do with the S segments of a text [N, S, E], above 0 and about 1 at most.

    Args:
        patches: [N, P, E].
        text: [N, S, E].
        mask: [N, S] bool, real segments; None: all are.

    Returns:
        [N, P], float32 or wider.
    """
    patches, text = (normalize(at_least_float32(each), dim=2) for each in (patches, text))
    weight = text.new_ones(text.shape[:2]) if mask is None else mask.to(text.dtype)
    weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)
    score = -precise_product(precise_product(patches, text.transpose(1, 2)), weight.unsqueeze(2)).squeeze(2)
    least, most = score.aminmax(dim=1, keepdim=True)
    return (score - least + 1e-6) / (most - least).clamp(min=1e-6)


def likeliest_set(kernel: Tensor, count: int) -> Tensor:
    """[N, count] int64, patches in the order in which greedy MAP of the DPP with `kernel` [N, P, P] takes them.

    `gain` is what a patch adds to the determinant: its row's square, less what the chosen ones span of it. It never
    falls below a small part of the row's own, so that where nothing new is left the most relevant patches follow.
    """
    n, p, _ = kernel.shape
    gain = kernel.diagonal(dim1=1, dim2=2)
    least = gain * torch.finfo(kernel.dtype).eps
    taken = torch.zeros(n, p, dtype=torch.bool, device=kernel.device)
    basis = kernel.new_zeros(n, count, p)  # rows of the Cholesky factor
    chosen: list[Tensor] = []
    for step in range(count):
        best = gain.masked_fill(taken, float("-inf")).argmax(dim=1, keepdim=True)
        chosen.append(best)
        taken.scatter_(1, best, True)
        at = best.unsqueeze(2)
        row = kernel.gather(1, at.expand(-1, 1, p))
        own = basis[:, :step].gather(2, at.expand(-1, step, 1))
        spanned = precise_product(own.transpose(1, 2), basis[:, :step])
        size = gain.gather(1, best).clamp(min=torch.finfo(kernel.dtype).tiny).sqrt()
        basis[:, step] = (row - spanned).squeeze(1) / size
        gain = torch.maximum(gain - basis[:, step].square(), least)
    return torch.cat(chosen, dim=1)
