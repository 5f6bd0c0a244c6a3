"""OCR: how well a picture spells the text that its prompt puts in double quotes, 0 to 1: 1 - edit distance / length.

Flow-GRPO's reward (arXiv 2505.05470): of the prompt its first quoted text counts; the picture's lines are read one after the other; case and
blanks play no part; more letters around the right ones cost nothing. It reads with RapidOCR (Apache-2.0, with PaddleOCR's PP-OCR models inside,
Apache-2.0; the extra "ocr"), on the CPU, where Flow-GRPO takes PaddleOCR itself, so that single letters may be read otherwise. GPL-3.0-or-later.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import RunError
from ..pixels import to_bytes
from .base import Source

QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


def wanted(prompt: str) -> str:
    """The first text in double quotes, straight or curly. Raises `RunError` where there is none."""
    found = QUOTED.search(prompt)
    text = _letters((found[1] or found[2] or "") if found else "")
    if not text:
        raise RunError(f'found the prompt {prompt!r}, accepted: one with a text in double quotes, such as a sign that says "open"')
    return text


def score(found: str, text: str) -> float:
    """Of what was read, for the text that was wanted."""
    found = _letters(found)
    return 1.0 if text in found else 1 - min(distance(found, text), len(text)) / len(text)


def distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest letters put in, taken out or changed that make one of the other."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a):
        before, row = row, [i + 1]
        for j, right in enumerate(b):
            row.append(min(row[j] + 1, before[j + 1] + 1, before[j] + (left != right)))
    return row[-1]


def _letters(text: str) -> str:
    return "".join(text.lower().split())


def load(source: Source):
    from rapidocr import RapidOCR

    # sides over 960 are brought to that, as PaddleOCR does; RapidOCR's own default enlarges small pictures, and takes many times as long
    engine = RapidOCR(params={"Global.log_level": "error", "Det.limit_type": "max", "Det.limit_side_len": 960})

    def read(picture: Tensor) -> str:
        lines = engine(np.ascontiguousarray(to_bytes(picture)[:, :, ::-1]), use_det=True, use_cls=False, use_rec=True).txts
        return "".join(lines or ())

    def ocr(pictures: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        texts = [wanted(str(prompt)) for prompt in prompts]
        return torch.tensor([score(read(picture), text) for picture, text in zip(pictures, texts)])

    return ocr
