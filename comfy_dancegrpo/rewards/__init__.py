"""Rewards: one file each, and one line here. Importing this package imports none of them."""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import replace

from .. import processes
from ..errors import RunError
from ..workflow.host import host
from . import own
from .base import FPS, FRAME_SCORES, Deferred, Kind, Reward, RewardFunction, Source, distinct, spread
from .places import EMBEDDED, PUBLISHED, available_bases, available_models, source

_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

REWARDS: dict[str, Kind] = {  # the first is what a new Load Reward shows
    "clip_score": Kind("clip_score", model_type="clip", suffixes=(".bin", ".pt", ".safetensors"), base=_VIT_H, base_type="clip",
                       embedded=True, published="such as openai/clip-vit-large-patch14 of huggingface.co"),
    "aesthetic": Kind("aesthetic", suffixes=(".pth", ".safetensors"), base="openai/clip-vit-large-patch14", base_type="clip", base_whole=True,
                      published="sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor"),
    "hps_v2": Kind("hps_v2", suffixes=(".pt", ".safetensors"), base=_VIT_H, base_type="clip",
                   published="HPS_v2.1_compressed.pt of huggingface.co/xswu/HPSv2"),
    "hps_v3": Kind("hps_v3", suffixes=(".safetensors", ".pth"), base="Qwen/Qwen2-VL-7B-Instruct", base_type="qwen2_vl",
                   published="HPSv3.safetensors of huggingface.co/MizzenAI/HPSv3"),
    "image_reward": Kind("image_reward", suffixes=(".pt", ".safetensors"), base="google-bert/bert-base-uncased", base_type="bert",
                         published="ImageReward.pt of huggingface.co/THUDM/ImageReward"),
    "jpeg_size": Kind("jpeg_size"),
    "ocr": Kind("ocr", extra="ocr", packages=("rapidocr", "onnxruntime")),
    "pickscore": Kind("pickscore", model_type="clip", base=_VIT_H, base_type="clip",
                      published="the folder yuvalkirstain/PickScore_v1 of huggingface.co"),
    "shapes_agreement": Kind("shapes_agreement"),
    **{f"video_align_{part}": Kind("video_align", part, contains="model_config.json", base="Qwen/Qwen2-VL-2B-Instruct", base_type="qwen2_vl",
                                   published="the folder KwaiVGI/VideoReward of huggingface.co", whole_videos=True)
       for part in ("visual", "motion", "text", "overall", "visual_raw", "motion_raw", "text_raw", "overall_raw")},
}


def known() -> dict[str, Kind]:
    """`REWARDS`, and after them the user's own. What keeps one of these away is logged, once; it hides no other."""
    kinds, lines = own.found(REWARDS)
    for line in lines.values():
        _log(line)
    return {**REWARDS, **dict(sorted(kinds.items()))}


@functools.cache
def _log(line: str) -> None:
    logging.warning("%s", line)


def problem(name: str, model: str, base: str = PUBLISHED, device: str = "") -> str | None:
    """Why `load` would fail, in one line, found without loading anything; None when it would not."""
    try:
        kind = _kind(name)
        source(name, kind, model, base)
        kind.check()
        _check_device(device)
    except RunError as error:
        return str(error)
    return None


def _check_device(device: str) -> None:
    if not re.fullmatch(r"(?:[a-z]+(?::\d+)?)?", device):
        raise RunError(f'input "device": found {device!r}, accepted: such as cpu, cuda or cuda:1; empty for where the policy computes')


def load(name: str, model: str = EMBEDDED, batch_size: int = 32, base: str = PUBLISHED, fps: float = FPS, device: str = "", **options) -> Reward:
    """The reward, whose weights are loaded when it first scores. fps: frames a second, of whole videos. `options`: other fields of `Reward`.

    Raises `RunError` where `problem` names one, and where a reward of the user's cannot be imported.
    """
    kind = _kind(name)
    kind.check()
    _check_device(device)
    if ":" in device and processes.count() > 1:
        host().say(f'reward {name!r}: each of {processes.count()} processes loads it onto {device}, input "device"; empty, it is on each one\'s own')
    made_of = replace(source(name, kind, model, base), part=kind.part, fps=fps)
    module = kind.imported()
    return Reward(name, Deferred(lambda: _scoring(module.load(made_of))), batch_size, whole_videos=kind.whole_videos, device=device, **options)


def _scoring(function: RewardFunction) -> RewardFunction:
    """As it scores: a module without dropout, and none of its weights trains."""
    import torch

    return function.requires_grad_(False).eval() if isinstance(function, torch.nn.Module) else function


def _kind(name: str) -> Kind:
    kinds = known()
    if name not in kinds:
        raise RunError(f'input "reward": found {name!r}, accepted: one of {", ".join(map(repr, kinds))}{own.why_not(name, REWARDS)}')
    return kinds[name]
