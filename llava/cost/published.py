"""Figures of cost that the methods' papers print, as data. `llava.cost.papers` computes them again."""

from __future__ import annotations

PYRAMIDDROP = "PyramidDrop, arXiv 2410.17247"
STF = "LLaVA-STF, arXiv 2506.07138"
PRUMERGE = "LLaVA-PruMerge, arXiv 2403.15388"
TRIM = "TRIM, arXiv 2409.10994"

# Place, image tokens, decoder method, TFLOPs.
PYRAMIDDROP_TFLOPS = [
    ("Table 1", 576, None, 3.82),
    ("Table 1", 576, "{name: pyramiddrop, lambda: 0.5}", 1.78),
    ("Table 4", 576, "{name: pyramiddrop, lambda: 0.4}", 1.54),
    ("Table 4", 576, "{name: pyramiddrop, lambda: 0.6}", 2.06),
    ("Table 5", 576, "fastv", 2.01),
    ("Table 1", 2880, None, 20.8),
    ("Table 1", 2880, "{name: pyramiddrop, lambda: 0.5}", 9.46),
    ("Table 4", 2880, "{name: pyramiddrop, lambda: 0.4}", 8.22),
    ("Table 4", 2880, "{name: pyramiddrop, lambda: 0.6}", 11.0),
    ("Table 5", 2880, "fastv", 10.6),
    ("Table 1", 5184, None, 40.6),
    ("Table 1", 5184, "{name: pyramiddrop, lambda: 0.5}", 18.1),
]
PYRAMIDDROP_SAVED = ("equation 3", 4, 0.5, 53.2)  # place, stages, lambda, per cent

# Place, projector's method, TFLOPs.
STF_TFLOPS = [
    ("Table 2", None, 7.6),
    ("Table 2", "{name: avgpool}", 1.9),
    ("Table 2", "{name: stf, variant: paper}", 1.9),
    ("Table 3", "{name: stf, variant: paper, kernel: 1}", 7.6),
    ("Table 4", "{name: stf, variant: paper, tokens_out: 2}", 3.8),
    ("Table 4", "{name: stf, variant: paper, kernel: 4, tokens_out: 4}", 1.9),
    ("Table 4", "{name: stf, variant: paper, kernel: 4, tokens_out: 8}", 3.8),
    ("Table 4", "{name: stf, variant: paper, kernel: 8, tokens_out: 16}", 1.9),
    ("Table 4", "{name: stf, variant: paper, kernel: 8, tokens_out: 32}", 3.8),
]

# Table 2: model, number format, whether PruMerge runs: TFLOPs, prefill in ms, memory in GB, stored activations in GB.
PRUMERGE_TABLE_2 = {
    ("7b", "fp16", False): (9.3, 88.6, 23.3, 4.60),
    ("7b", "fp16", True): (0.91, 15.3, 13.7, 0.28),
    ("7b", "int4", False): (2.3, 151.6, 5.9, 1.20),
    ("7b", "int4", True): (0.28, 14.9, 3.5, 0.07),
    ("13b", "fp16", False): (18.2, 170.5, 41.6, 7.30),
    ("13b", "fp16", True): (1.80, 29.5, 26.6, 0.44),
    ("13b", "int4", False): (4.6, 294.9, 10.5, 1.80),
    ("13b", "int4", True): (0.45, 29.0, 6.8, 0.11),
}
PRUMERGE_STATED = (576 + 40, 40 + 40)  # tokens without and with PruMerge: section 4.2
PRUMERGE_FITTED = (700, 70)  # with which the table is met
PRUMERGE_ODD = {("7b", "int4", True, "FLOPs"): "0.28 is the activations' figure of this row in fp16, a slip it seems"}

# Section 5.1 and the model's card (huggingface.co/FreedomIntelligence/llava-v1.5-7b-TRIM); the text has no Table 2.
TRIM_STATED = (576 + 40, 123 + 40)
TRIM_FITTED = 209  # in place of 163, with which the time is met
TRIM_FIRST_TOKEN = ("section 5.1", 32.9)  # per cent of the time without TRIM
TRIM_MEMORY = ("model card", 70)  # per cent: "memory usage by 30 %" less
