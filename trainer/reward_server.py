"""`dancegrpo serve-reward`: one of our rewards behind the protocol of docs/reward_server.md, for Remote Reward and whoever else speaks it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from aiohttp import web
from torch import Tensor

from comfy_dancegrpo.errors import DanceGRPOError
from comfy_dancegrpo.pixels import from_png
from comfy_dancegrpo.prompts import Prompt, Reference
from comfy_dancegrpo.rewards import Reward
from comfy_dancegrpo.rewards.remote import PROTOCOL, VERSION
from comfy_dancegrpo.rewards.service import shown
from comfy_dancegrpo.runs import video
from comfy_dancegrpo.runs.pictures import to_tensor

from .editor.files import Refused
from .editor.security import Gate, is_loopback
from .serving import listen, until_told, url

MOST_SAMPLES = 4096  # of a request
MOST_PIXELS = 2**28  # of a request, all frames together
GRACE = 60  # seconds that requests under way have to end, when the server is told to stop


@dataclass(frozen=True)
class Sample:
    """frames: [F, H, W, 3] float32 in 0..1; one frame is a picture."""

    frames: Tensor = field(repr=False)
    prompt: str


def parse(body: bytes, name: str, fps: float | None = None) -> list[Sample]:
    """The samples of a request; fps: of its videos, where the reward was loaded for one rate.

    Raises `Refused` with what is wrong: 400, 404 for another reward, 413 for too many pixels.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the request is not JSON") from None
    if not isinstance(request, dict) or request.get("protocol") != PROTOCOL or request.get("version") != VERSION:
        raise Refused(400, f"found another request, accepted: protocol {PROTOCOL!r}, version {VERSION}")
    if request.get("name") not in ("", None, name):
        raise Refused(404, f"found the reward {shown(str(request['name']), 100)!r}, served is {name!r}")
    samples = request.get("samples")
    if not isinstance(samples, list) or request.get("count") != len(samples) or not 1 <= len(samples) <= MOST_SAMPLES:
        raise Refused(400, f'"samples" and "count": accepted: a list of 1 to {MOST_SAMPLES} samples, and how many they are')
    found, left = [], MOST_PIXELS
    for number, given in enumerate(samples):
        try:
            found.append(_sample(given, fps))
        except ValueError as error:
            raise Refused(400, f"sample {number}: {error}") from None
        left -= found[-1].frames[..., 0].numel()
        if left < 0:
            raise Refused(413, f"found more than {MOST_PIXELS} pixels in all, which is the most that is accepted")
    return found


def _sample(given: Any, fps: float | None) -> Sample:
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str) or ("png" in given) == ("mp4" in given):
        raise ValueError('accepted: an object with a text "prompt" and a picture as "png" or a video as "mp4", in base64')
    if "mp4" in given and fps not in (None, given.get("fps")):
        raise ValueError(f"found a video of {shown(str(given.get('fps')), 40)} frames a second, accepted: {fps:g}, for which the reward was loaded (--fps)")
    frames = to_tensor(from_png(_bytes(given["png"]))) if "png" in given else video.decoded(_bytes(given["mp4"]))
    if "reference_png" not in given:
        return Sample(frames, Prompt(given["prompt"]))
    data = _bytes(given["reference_png"])
    image = from_png(data)
    return Sample(frames, Prompt(given["prompt"], Reference("reference_png", hashlib.sha256(data).hexdigest(), lambda: image)))


def _bytes(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ValueError("found what is not base64") from None


@dataclass
class Asked:
    """A request that waits for its scores."""

    samples: list[Sample] = field(repr=False)
    scores: asyncio.Future[list[float]]


class Scorer:
    """Scores what is asked, in one thread; what waits meanwhile goes together, in batches of the reward's `batch_size`."""

    def __init__(self, reward: Reward):
        self.reward, self.scored = reward, 0
        self._thread = ThreadPoolExecutor(1)
        self._waiting: asyncio.Queue[Asked] = asyncio.Queue()

    @property
    def waiting(self) -> int:
        return self._waiting.qsize()

    async def scores(self, samples: list[Sample]) -> list[float]:
        """Raises what the reward raises."""
        asked = Asked(samples, asyncio.get_running_loop().create_future())
        self._waiting.put_nowait(asked)
        return await asked.scores

    async def work(self) -> None:
        """Until it is cancelled."""
        while True:
            together = [await self._waiting.get()]
            while not self._waiting.empty() and sum(len(asked.samples) for asked in together) < self.reward.batch_size:
                together.append(self._waiting.get_nowait())
            await self._score(together)

    async def _score(self, together: list[Asked]) -> None:
        together = [asked for asked in together if not asked.scores.done()]  # of the others the client has gone
        if not together:
            return
        samples = [sample for asked in together for sample in asked.samples]
        try:
            scores = await asyncio.get_running_loop().run_in_executor(self._thread, self._call, samples)
        except Exception as error:
            if len(together) > 1:  # one of them may be at fault, and the others not
                for asked in together:
                    await self._score([asked])
            elif not together[0].scores.done():
                together[0].scores.set_exception(error)
            return
        self.scored += len(samples)
        for asked in together:
            own, scores = scores[: len(asked.samples)], scores[len(asked.samples):]
            if not asked.scores.done():
                asked.scores.set_result(own)

    def _call(self, samples: Sequence[Sample]) -> list[float]:
        """Pictures and videos apart, each as a rollout has them."""
        scores = torch.zeros(len(samples))
        with torch.no_grad():
            for still in (True, False):
                places = [i for i, sample in enumerate(samples) if (len(sample.frames) == 1) == still]
                frames = [samples[i].frames[0] if still else samples[i].frames for i in places]
                if places:
                    alike = len({f.shape for f in frames}) == 1
                    scores[places] = self.reward(torch.stack(frames) if alike else frames, [samples[i].prompt for i in places])
        return scores.tolist()


class RewardServer:
    """One reward at an address. most_bytes: of a request's body."""

    def __init__(self, reward: Reward, address: str = "127.0.0.1", port: int = 0, token: str | None = None, most_bytes: int = 2**28):
        if token is None and not is_loopback(address):
            token = secrets.token_urlsafe(32)
        self.reward, self.address, self.port, self.token = reward, address, port, token
        self.scorer = Scorer(reward)
        gate = Gate(address, token)
        app = web.Application(middlewares=[_in_one_line, gate.middleware], client_max_size=most_bytes)
        app.on_response_prepare.append(gate.prepare)
        app.add_routes([web.post("/score", self._score), web.get("/health", self._health)])
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=GRACE, handler_cancellation=True)

    @property
    def url(self) -> str:
        return url(self.address, self.port) + "score"

    async def start(self) -> None:
        """Listens. Raises WorkflowError where the address or the port cannot be had."""
        self._work = asyncio.create_task(self.scorer.work())
        self.port = await listen(self._runner, self.address, self.port, self.stop)

    async def stop(self) -> None:
        """Ends what is under way, and takes nothing new."""
        await self._runner.cleanup()
        self._work.cancel()

    async def _score(self, request: web.Request) -> web.Response:
        body = await request.read()
        samples = await asyncio.to_thread(parse, body, self.reward.name, getattr(self.reward.loaded, "fps", None))
        try:
            scores = await self.scorer.scores(samples)
        except Exception as error:
            said = str(error) if isinstance(error, DanceGRPOError) else f"{type(error).__name__}: {error}"
            return _wrong(500, shown(said))
        return web.json_response({"protocol": PROTOCOL, "version": VERSION, "name": self.reward.name, "count": len(scores), "scores": scores})

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "protocol": PROTOCOL, "version": VERSION, "name": self.reward.name,
                                  "batch_size": self.reward.batch_size, "waiting": self.scorer.waiting, "scored": self.scorer.scored})


@web.middleware
async def _in_one_line(request: web.Request, handler) -> web.StreamResponse:
    """What aiohttp itself refuses (an unknown path, a body that is too large), as the protocol has it."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _wrong(error.status, shown(error.text or error.reason))


def _wrong(status: int, line: str) -> web.Response:
    return web.json_response({"error": {"message": line}}, status=status)


def serve(server: RewardServer) -> None:
    """Runs the server until Ctrl-C; loads the reward first. Raises WorkflowError where the address or the port cannot be had."""
    server.reward.loaded

    async def start() -> None:
        await server.start()
        print(f"The reward {server.reward.name} is at {server.url}", flush=True)
        if server.token is not None:
            print(f"Its token, for \"api_keys\" in the settings of whoever calls: {server.token}", flush=True)

    asyncio.run(until_told(start, server.stop))
