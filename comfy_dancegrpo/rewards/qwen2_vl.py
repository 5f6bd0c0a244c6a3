"""Qwen2-VL (arXiv 2409.12191) as a judge: it reads a picture or a video and an instruction, and a small head turns its state at marks in the
text into numbers. What HPSv3 and VideoAlign share.

As their published code trains and runs it: tokens of the picture are numbered one after the other like those of the text, and not by row and
column; and the frequencies of the rotary embeddings are rounded like the weights, because the whole model is cast to bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

try:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel
except ImportError:  # before 4.52 the language model alone had this name
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel as Qwen2VLTextModel

from ..errors import RunError
from ..pixels import to_bytes
from . import weights
from .preprocessing import normalised

PATCH, MERGE, TIME = 14, 2, 2  # pixels of a patch's side; patches of a token's side; frames of a patch
BLOCK = PATCH * MERGE
CHAT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{seen}<|vision_end|>{text}<|im_end|>\n"
        "<|im_start|>assistant\n")


def fitted(height: int, width: int, least: int, most: int) -> tuple[int, int]:
    """The size in whole tokens (of 28x28 pixels) next to this one, with `least` to `most` pixels in all where both can be had."""
    rows, columns = max(BLOCK, round(height / BLOCK) * BLOCK), max(BLOCK, round(width / BLOCK) * BLOCK)
    if rows * columns > most:
        scale = math.sqrt(height * width / most)
        rows, columns = (max(BLOCK, math.floor(side / scale / BLOCK) * BLOCK) for side in (height, width))
    elif rows * columns < least:
        scale = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * scale / BLOCK) * BLOCK for side in (height, width))
    return rows, columns


def picture(pixels: Tensor, least: int, most: int) -> Tensor:
    """[H, W, 3] in 0..1 to [1, 3, h, w], whole numbers to 255: resized as a saved picture is by Pillow's bicubic filter."""
    image = Image.fromarray(to_bytes(pixels))
    rows, columns = fitted(image.height, image.width, least, most)
    return torch.from_numpy(np.array(image.resize((columns, rows), Image.Resampling.BICUBIC))).permute(2, 0, 1)[None].float()


def video(frames: Tensor, least: int, most: int) -> Tensor:
    """[F, H, W, 3] in 0..1 to [F, 3, h, w], whole numbers to 255: resized as torchvision's antialiased bicubic filter does a read video."""
    pixels = torch.from_numpy(to_bytes(frames)).permute(0, 3, 1, 2).float()
    size = fitted(*pixels.shape[2:], least, most)
    return F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255).round()


def patches(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames [F, 3, h, w] to 255, to [t * rows * columns, 3 * 2 * 14 * 14] normalised patches, those of a token together, and (t, rows, columns).

    Two frames make a patch; a last one without its second is taken twice.
    """
    pixels = normalised(frames / 255)
    pixels = torch.cat([pixels, pixels[-1:]]) if len(pixels) % TIME else pixels
    t, rows, columns = len(pixels) // TIME, pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
    pixels = pixels.reshape(t, TIME, 3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return pixels.reshape(t * rows * columns, -1), (t, rows, columns)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of Qwen2-VL's publishers (visual.*, model.*): what peft or a newer transformers made of them is taken back."""
    found = {}
    for name, value in tensors.items():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")
        for theirs, ours in (("model.visual.", "visual."), ("model.language_model.", "model.")):
            name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
        found[name] = value
    return found


def named(tensors: dict[str, Tensor], path: Path, scale: float = 0.0) -> dict[str, Tensor]:
    """`renamed`, of one precision, without the head that writes words; a LoRA among them is folded into its weights, `scale` times."""
    found = {name: value for name, value in renamed(tensors).items() if not name.startswith("lm_head.")}
    try:
        for down in [name for name in found if name.endswith(".lora_A.weight")]:
            of = down.removesuffix(".lora_A.weight")
            weight, change = found[f"{of}.weight"], found.pop(f"{of}.lora_B.weight").float() @ found.pop(down).float()
            found[f"{of}.weight"] = (weight.float() + scale * change).to(weight.dtype)
        dtype = found["model.embed_tokens.weight"].dtype
    except (KeyError, RuntimeError) as error:
        raise RunError(f"{path}: its tensors are no whole Qwen2-VL, or no LoRA of one ({error})") from None
    return {name: value.to(dtype) for name, value in found.items()}


class Model(nn.Module):
    """Under the names of Qwen2-VL's publishers."""

    def __init__(self, config: Qwen2VLConfig, vocabulary: int):
        super().__init__()
        text = config.get_text_config()
        text.vocab_size = vocabulary
        self.visual = Qwen2VisionTransformerPretrainedModel(config.vision_config)
        self.model = Qwen2VLTextModel(text)


class Judge(nn.Module):
    """marks: the tokens of the instruction at which it is asked, new ones after the base's own. head: of the width, the module that makes numbers.

    It computes in the precision that its weights are stored in, the head in float32.
    """

    def __init__(self, base: Path, tensors: dict[str, Tensor], marks: Sequence[str], head: Callable[[int], nn.Module], path: Path):
        super().__init__()
        self.tokenizer = _tokenizer(base)
        self.tokenizer.padding_side = "right"
        self.tokenizer.add_tokens(list(marks), special_tokens=True)
        self.marks = self.tokenizer.convert_tokens_to_ids(list(marks))
        embeddings = tensors["model.embed_tokens.weight"]
        if len(embeddings) != len(self.tokenizer):
            raise RunError(f"{path}: it has embeddings of {len(embeddings)} tokens, accepted: {len(self.tokenizer)}, those of {base} and its own")
        ours = weights.part(tensors, "rm_head.", path)
        rest = {name: value for name, value in tensors.items() if not name.startswith("rm_head.")}
        self.qwen = weights.fill(lambda: Model(Qwen2VLConfig.from_pretrained(base, local_files_only=True), len(embeddings)), rest, path)
        self.qwen.to(embeddings.dtype)  # the frequencies
        self.head = weights.fill(lambda: head(embeddings.shape[1]), ours, path).float()

    @torch.no_grad()
    def forward(self, seen: Sequence[Tensor], texts: Sequence[str], pad: str) -> Tensor:
        """Frames [F, 3, h, w] to 255 each, and as many instructions; pad: the token of what is seen ("<|image_pad|>"). To [N, marks, numbers]."""
        device = self.qwen.model.embed_tokens.weight.device
        cut = [patches(frames) for frames in seen]
        counts = [math.prod(grid) // MERGE**2 for _, grid in cut]
        chats = [CHAT.format(seen=pad * count, text=text) for count, text in zip(counts, texts)]
        tokens = self.tokenizer(chats, padding=True, return_tensors="pt").to(device)
        pad_id = self.tokenizer.convert_tokens_to_ids(pad)
        for ids, count, text in zip(tokens.input_ids, counts, texts):
            if int((ids == pad_id).sum()) != count or any(int((ids == mark).sum()) != 1 for mark in self.marks):
                raise RunError(f"found a prompt that spells one of the model's own tokens (<|…|>), in {text[-200:]!r}; accepted: words")
        embedded = self.qwen.model.embed_tokens(tokens.input_ids)
        pixels, grid = torch.cat([pixels for pixels, _ in cut]), torch.tensor([grid for _, grid in cut])
        vision = self.qwen.visual(pixels.to(device, embedded.dtype), grid_thw=grid.to(device))
        vision = vision if isinstance(vision, Tensor) else vision.pooler_output
        embedded[tokens.input_ids == pad_id] = vision.to(embedded.dtype)
        states = self.qwen.model(inputs_embeds=embedded, attention_mask=tokens.attention_mask, use_cache=False).last_hidden_state
        asked = torch.stack([(tokens.input_ids == mark).int().argmax(1) for mark in self.marks], 1)
        return self.head(states.gather(1, asked[..., None].expand(-1, -1, states.shape[-1])).float())


def _tokenizer(base: Path):
    try:
        return AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{base}: transformers cannot load its tokenizer ({' '.join(str(error).split())[:200]})") from None
