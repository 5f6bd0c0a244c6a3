"""Remote reward: numbers from a server that speaks the protocol of docs/reward_server.md, such as `dancegrpo serve-reward`.

What it measures, and its range, are the server's. Pictures travel as PNG, in 8 bits and otherwise whole; videos as MP4 (H.264, close to
lossless). Nothing is unpickled. No weights; GPL-3.0-or-later.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..pixels import png, to_bytes
from ..runs import video
from .base import FPS, Reward
from .faults import Given, RewardFault
from .service import CallFailed, Service, Trouble, shown

PROTOCOL, VERSION = "dancegrpo-reward", 1


def load(service: Service, reward: str = "", batch_size: int = 8, fps: float = FPS) -> Reward:
    """The reward of that name of the server, "" for the one that it has. batch_size: samples in a call. fps: of the MP4 files."""
    function = RemoteReward(service, reward, batch_size, fps)
    return Reward(reward or "remote", function, batch_size=sys.maxsize, whole_videos=True, waits=batch_size, at_once=service.connections)


class RemoteReward:
    """Videos [F, H, W, 3] and prompts to a server; one frame is a picture."""

    def __init__(self, service: Service, name: str, batch_size: int, fps: float):
        self._service, self._name, self._batch_size, self._fps = service, name, batch_size, fps

    def __call__(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        batches = [slice(i, i + self._batch_size) for i in range(0, len(prompts), self._batch_size)]
        bodies = [lambda at=at: self._body(videos[at], prompts[at]) for at in batches]
        try:
            scores = self._service.post_all(bodies, lambda k, answer: scores_of(answer, len(prompts[batches[k]]), self._name))
        except CallFailed as error:
            at = batches[error.index]
            raise RewardFault(str(error), Given(as_pictures(videos[at]), prompts[at], error.answer)) from None
        return torch.tensor([score for part in scores for score in part], dtype=torch.float32)

    def _body(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> dict[str, Any]:
        samples = [self._sample(v, prompt) for v, prompt in zip(videos, prompts)]
        return {"protocol": PROTOCOL, "version": VERSION, "name": self._name, "count": len(samples), "samples": samples}

    def _sample(self, frames: Tensor, prompt: str) -> dict[str, Any]:
        reference = getattr(prompt, "picture", None)
        return {"prompt": str(prompt),
                **({"png": in_base64(png(Image.fromarray(to_bytes(frames[0]))))} if len(frames) == 1 else
                   {"mp4": in_base64(video.encoded(frames, self._fps)), "fps": self._fps}),
                **({"reference_png": in_base64(png(reference.image()))} if reference else {})}


def scores_of(answer: Any, count: int, name: str) -> list[float]:
    """The scores of a server's answer. Raises `Trouble` for one that breaks the protocol."""
    if not isinstance(answer, dict) or answer.get("protocol") != PROTOCOL or answer.get("version") != VERSION:
        raise Trouble(f"its answer is not of protocol {PROTOCOL!r}, version {VERSION}", str(answer)[:300])
    if name and answer.get("name") != name:
        raise Trouble(f"it answers for the reward {answer.get('name')!r}, asked was {name!r}", str(answer)[:300])
    scores = answer.get("scores")
    if not isinstance(scores, list) or len(scores) != count or answer.get("count") != count:
        found = f"{len(scores)} scores" if isinstance(scores, list) else "no list of scores"
        raise Trouble(f"its answer has {found}, and counts {answer.get('count')!r}, for {count} pictures", str(answer)[:300])
    for number, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) <= torch.finfo(torch.float32).max:
            raise Trouble(f"its answer has the score {shown(str(score), 40)} for picture {number + 1} of {count}, accepted: finite numbers", str(answer)[:300])
    return [float(score) for score in scores]


def as_pictures(videos: Sequence[Tensor]) -> list[Tensor]:
    """Videos of one frame as the pictures that they were."""
    return [v[0] if len(v) == 1 else v for v in videos]


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
