"""VideoAlign: how good a video is, in three ways: its visual quality, its motion, and how well it shows its prompt (arXiv 2501.13918).

Qwen2-VL-2B, with a LoRA, reads about two frames a second of the video, of at most 448x448 pixels each, and an instruction; a head gives a score at
each of three marks. A reward is one of them, or their sum ("overall"): normalised to mean 0 and deviation 1 by its makers' figures, and about
-3 to 3, or raw. Takes the folder KwaiVGI/VideoReward of huggingface.co (model_config.json, and in the newest checkpoint-* model.pth, or
adapter_model.safetensors with non_lora_state_dict.pth), and of Qwen/Qwen2-VL-2B-Instruct the configuration and the tokenizer, with the latter form
its weights too. The published code reads a file that was compressed first; here the frames are scored themselves, in the precision of the
stored embeddings, the head's in float32. Instruction (video_align.txt) and code are MIT, weights Apache-2.0, Qwen2-VL is Apache-2.0.
"""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import RunError
from ..pixels import to_bytes
from . import qwen2_vl, weights
from .base import Source

CONFIG = "model_config.json"
INSTRUCTION = Path(__file__).with_suffix(".txt")
PARTS = ("visual", "motion", "text")
MARKS, SHORT = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"), ("VQ", "MQ", "TA")
LEAST = 128 * qwen2_vl.BLOCK**2  # pixels of a frame
FEWEST, MOST = 4, 768  # frames that are looked at
REMEMBERED = 256  # batches
UNDERSTOOD = {"data_config": {"eval_dim": list(SHORT), "prompt_template_type": "detailed_special", "sample_type": "uniform", "num_frames": None},
              "model_config": {"use_special_tokens": True, "reward_token": "special"}}


def places(count: int, fps: float, rate: float) -> list[int]:
    """Which of a video's frames are looked at: `rate` of them a second of its time at `fps`, but at least 4 and a whole number of pairs where
    it has them, evenly spread from the first to the last."""
    most = max(min(MOST, count) // 2 * 2, 1)
    wanted = min(max(count / fps * rate, FEWEST), most)
    wanted = min(max(round(wanted / 2) * 2, 1), count)
    return torch.linspace(0, count - 1, wanted).round().long().tolist()


class VideoAlign(nn.Module):
    """All three scores at once, as the rewards that share it need them; it remembers its last batches."""

    def __init__(self, source: Source):
        super().__init__()
        self.path = source.model / CONFIG
        config = _config(self.path)
        data, self.norms = config["data_config"], config.get("inference_config")
        self.rate, self.most = float(data["fps"]), int(data["max_frame_pixels"])
        tensors, path = _weights(source, config["peft_lora_config"])
        outputs = int(config["model_config"]["output_dim"])
        self.judge = qwen2_vl.Judge(source.base, tensors, MARKS, partial(nn.Linear, out_features=outputs, bias=False), path)
        self.instruction = INSTRUCTION.read_text(encoding="utf-8")
        self._remembered: OrderedDict[bytes, Tensor] = OrderedDict()

    def forward(self, videos: Sequence[Tensor], prompts: Sequence[str], fps: float) -> Tensor:
        """N videos [F, H, W, 3] in 0..1, to [N, 3] raw scores."""
        chosen = [video[places(len(video), fps, self.rate)] for video in videos]
        told = hashlib.sha256(repr((self.judge.head.weight.device, [video.shape for video in chosen], [str(p) for p in prompts])).encode())
        for video in chosen:
            told.update(to_bytes(video).tobytes())
        key = told.digest()
        if key not in self._remembered:
            seen = [qwen2_vl.video(video, LEAST, self.most) for video in chosen]
            scores = self.judge(seen, [self.instruction.replace("{text_prompt}", str(prompt)) for prompt in prompts], "<|video_pad|>")
            # a head with a number for each mark is asked for its own at each
            self._remembered[key] = scores[:, :, 0] if scores.shape[2] == 1 else scores.diagonal(dim1=1, dim2=2)
        self._remembered.move_to_end(key)
        while len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)
        return self._remembered[key]

    def normalised(self, raw: Tensor) -> Tensor:
        """By the makers' mean and deviation of each score."""
        mean, std = (raw.new_tensor([self.norms[f"{short}_{what}"] for short in SHORT]) for what in ("mean", "std"))
        return (raw - mean) / std


class Part(nn.Module):
    """One of a shared model's scores: "visual", "motion", "text" or their sum, "overall"; with "_raw" not normalised."""

    def __init__(self, model: VideoAlign, part: str, fps: float):
        super().__init__()
        self.model, self.fps = model, fps
        self.part, _, raw = part.partition("_")
        self.raw = bool(raw)
        if not self.raw and model.norms is None:
            raise RunError(f"{model.path} has no inference_config, so its scores cannot be normalised; choose video_align_{part}_raw")

    def forward(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        scores = self.model(videos, prompts, self.fps)
        scores = scores if self.raw else self.model.normalised(scores)
        return scores.sum(1) if self.part == "overall" else scores[:, PARTS.index(self.part)]


_loaded: weakref.WeakValueDictionary[tuple, VideoAlign] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def load(source: Source) -> Part:
    """Rewards of the same files share one model: on a device of its own each, it moves between them."""
    with _lock:
        key = (source.model, source.base)
        model = _loaded.get(key) or VideoAlign(source)
        _loaded[key] = model
    return Part(model, source.part, source.fps)


def _config(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for section, options in UNDERSTOOD.items():
            for name, value in options.items():
                if found[section].get(name) != value:
                    raise RunError(f"{path}: {section}.{name} is {found[section].get(name)!r}, accepted: {value!r}, as published")
        found["data_config"]["fps"], found["data_config"]["max_frame_pixels"], found["model_config"]["output_dim"], found["peft_lora_config"]
        if (norms := found.get("inference_config")) is not None:
            [float(norms[f"{short}_{what}"]) for short in SHORT for what in ("mean", "std")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is no configuration of VideoAlign ({type(error).__name__}: {error})") from None
    return found


def _number(checkpoint: Path) -> int:
    """A name without one counts only where no other has one."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _weights(source: Source, lora: dict) -> tuple[dict[str, Tensor], Path]:
    """By the names of Qwen2-VL's publishers, the LoRA folded in; and the file that they are from."""
    folder = max(source.model.glob("checkpoint-*"), key=_number, default=source.model)
    whole, adapter, rest = (folder / name for name in ("model.pth", "adapter_model.safetensors", "non_lora_state_dict.pth"))
    if whole.is_file():
        tensors, path = weights.read(whole), whole
    elif adapter.is_file() and rest.is_file():
        tensors, path = {}, adapter
        for file in (*sorted(source.base.glob("*.safetensors")), rest, adapter):
            tensors |= qwen2_vl.renamed(weights.read(file))
    else:
        raise RunError(f"{folder} has no weights; accepted: model.pth, or adapter_model.safetensors with non_lora_state_dict.pth")
    rank = lora["lora_r"]
    return qwen2_vl.named(tensors, path, lora["lora_alpha"] / (rank**0.5 if lora.get("use_rslora") else rank)), path
