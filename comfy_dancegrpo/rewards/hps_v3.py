"""HPSv3 (Human Preference Score v3, arXiv 2508.03789): how much people would like a picture for its prompt; about -5 to 15, good pictures near 10.

Qwen2-VL-7B reads the picture, brought to about 448x448 pixels, and an instruction, and a head gives mean and deviation of the score at
<|Reward|>; the mean is the reward. Takes HPSv3.safetensors of huggingface.co/MizzenAI/HPSv3, and of Qwen/Qwen2-VL-7B-Instruct the configuration
and the tokenizer. It computes in the precision of the file (bfloat16; 17 GB). The instruction, in hps_v3.txt, and the weights are of its
makers, under the MIT licence; Qwen2-VL is Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from . import qwen2_vl, weights
from .base import Source

PIXELS = 256 * qwen2_vl.BLOCK**2
INSTRUCTION = Path(__file__).with_suffix(".txt")


class HPSv3(nn.Module):
    def __init__(self, source: Source):
        super().__init__()
        tensors = qwen2_vl.named(weights.read(source.model), source.model)
        self.judge = qwen2_vl.Judge(source.base, tensors, ["<|Reward|>"], _head, source.model)
        self.instruction = INSTRUCTION.read_text(encoding="utf-8")

    def forward(self, pictures: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        seen = [qwen2_vl.picture(picture, PIXELS, PIXELS) for picture in pictures]
        texts = [self.instruction.replace("{text_prompt}", str(prompt)) for prompt in prompts]
        return self.judge(seen, texts, "<|image_pad|>")[:, 0, 0]


def _head(width: int) -> nn.Sequential:
    """The published RankNet; its third place is dropout."""
    return nn.Sequential(nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))


def load(source: Source) -> HPSv3:
    return HPSv3(source)
