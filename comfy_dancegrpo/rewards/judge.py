"""Judge: the score that a vision-language model gives, behind any address that speaks OpenAI's chat completions (vLLM, llama.cpp, and others).

What it measures is what the question asks, on the scale that the question names; a good judge tells why a picture is wrong, a weak one likes
everything. The answer is asked for as JSON by a schema, where the server knows those, and else one number is read from the text. The licence is the model's.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..pixels import png, to_bytes
from ..workflow.host import host
from .base import Reward, spread
from .faults import Given, RewardFault
from .remote import as_pictures, in_base64
from .service import CallFailed, Service, Trouble, shown

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w)")
_NO_SCHEMA = (400, 422, 501)  # what servers answer that do not know the format that they are asked for


@dataclass(frozen=True)
class Question:
    """text: with {prompt}, {low} and {high} in it. frames: of a video, evenly spread. reference: whether the prompt's reference picture goes along."""

    text: str
    low: float
    high: float
    frames: int = 8
    reference: bool = True

    def content(self, video: Tensor, prompt: str) -> list[dict[str, Any]]:
        """The message about a video [F, H, W, 3], of one frame where it is a picture."""
        given = {"prompt": str(prompt), "low": f"{self.low:g}", "high": f"{self.high:g}"}
        text = re.sub(r"\{(prompt|low|high)\}", lambda found: given[found[1]], self.text)  # not format: other braces stay as they are
        pictures = [_picture(Image.fromarray(to_bytes(video[i]))) for i in spread(len(video), self.frames)]
        reference = getattr(prompt, "picture", None) if self.reference else None
        if reference is not None:
            pictures = [_text("The reference picture:"), _picture(reference.image()), _text("What is judged:"), *pictures]
        return [*pictures, _text(text)]

    @property
    def schema(self) -> dict[str, Any]:
        score = {"type": "number", "minimum": self.low, "maximum": self.high}
        schema = {"type": "object", "properties": {"score": score}, "required": ["score"], "additionalProperties": False}
        return {"type": "json_schema", "json_schema": {"name": "score", "strict": True, "schema": schema}}

    def score(self, answer: Any) -> float:
        """The score in an answer. Raises `Trouble` where there is none, more than one number, or one off the scale."""
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (TypeError, KeyError, IndexError):
            raise Trouble("its answer is not a chat completion", shown(str(answer))) from None
        if not isinstance(text, str) or choice.get("finish_reason") == "length":
            raise Trouble("its answer has no text" if not isinstance(text, str) else "its answer was cut off, being too long", shown(str(answer)))
        text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()
        numbers = _numbers(text)
        if len(numbers) != 1:
            raise Trouble(f"its answer has {len(numbers)} numbers, accepted: one: {shown(text, 100)!r}", shown(text))
        if not self.low <= numbers[0] <= self.high:
            raise Trouble(f"its answer gives the score {numbers[0]:g}, accepted: {self.low:g} to {self.high:g}", shown(text))
        return numbers[0]


def load(service: Service, model: str, question: Question, name: str = "judge") -> Reward:
    """service: of the whole address, `…/chat/completions`. model: as the server names it, "" where it has one alone."""
    return Reward(name, Judge(service, model, question), batch_size=sys.maxsize, whole_videos=True, waits=1, at_once=service.connections)


class Judge:
    """Videos [F, H, W, 3] and prompts, a call each; one frame is a picture."""

    def __init__(self, service: Service, model: str, question: Question):
        self._service, self._question = service, question
        self._request = {**({"model": model} if model else {}), "temperature": 0, "response_format": question.schema}

    def __call__(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        request = self._request  # another thread may change it meanwhile
        try:
            return self._scores(request, videos, prompts)
        except CallFailed as error:
            failed = error
        if "response_format" in request and failed.status in _NO_SCHEMA:
            plain = {name: value for name, value in request.items() if name != "response_format"}
            try:
                scores = self._scores(plain, videos, prompts)
                if self._request is request:  # only now is it known that the schema was at fault, and no picture
                    self._request = plain
                    host().say(f"{failed}; it is asked without a schema from now on, and one number is read from its answers")
                return scores
            except CallFailed as error:
                failed = error
        at = slice(failed.index, failed.index + 1)
        raise RewardFault(str(failed), Given(as_pictures(videos[at]), prompts[at], failed.answer))

    def _scores(self, request: dict[str, Any], videos: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        bodies = [lambda v=v, prompt=prompt: {**request, "messages": [{"role": "user", "content": self._question.content(v, prompt)}]}
                  for v, prompt in zip(videos, prompts)]
        return torch.tensor(self._service.post_all(bodies, lambda _, answer: self._question.score(answer)), dtype=torch.float32)


def completions(service: Service) -> Service:
    """The service of an API's address, such as http://127.0.0.1:8000/v1, which may name the whole path as well."""
    path = service.address.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    return replace(service, address=replace(service.address, path=path))


def _numbers(text: str) -> list[float]:
    """The "score" of a JSON object, else all numbers of a text that differ."""
    try:
        found = json.loads(re.sub(r"^```\w*\s*|\s*```$", "", text))
        score = found["score"] if isinstance(found, dict) else found
        return [float(score)] if not isinstance(score, (bool, list, dict)) else []
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return list(dict.fromkeys(map(float, _NUMBER.findall(text))))


def _picture(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{in_base64(png(image))}"}}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
