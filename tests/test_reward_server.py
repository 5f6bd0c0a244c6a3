"""`dancegrpo serve-reward`: the same numbers as here, what it refuses, and killed and restarted in the middle of a run."""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from comfy_dancegrpo import rewards
from comfy_dancegrpo.addresses import Address
from comfy_dancegrpo.embedded import shapes
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.prompts import Prompt, Reference
from comfy_dancegrpo.rewards import Reward, remote, service
from comfy_dancegrpo.rewards.service import Service

pytest.importorskip("aiohttp")
from comfy_dancegrpo.trainer import reward_server  # noqa: E402
from comfy_dancegrpo.trainer.reward_server import RewardServer  # noqa: E402

CAPTIONS = [a.caption for a in shapes.every()[::36]]
PICTURES = torch.randint(256, (len(CAPTIONS), 64, 64, 3), generator=torch.Generator().manual_seed(0)) / 255


pytestmark = pytest.mark.usefixtures("mine")


class Running:
    """A reward server on a thread of this process."""

    def __init__(self, reward, **options):
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.server = self._run(self._made(reward, options))
        self._run(self.server.start())

    async def _made(self, reward, options):
        return RewardServer(reward, **options)

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def reward(self, name="", batch_size=4, connections=4, retries=0, **options):
        return remote.load(Service(Address.parse(self.server.url), connections, 60.0, retries), name, batch_size, **options)

    def close(self):
        self._run(self.server.stop())


@pytest.fixture
def serve():
    """`serve(reward)`: a `Running`, closed at the end."""
    started = []

    def start(reward, **options):
        started.append(Running(reward, **options))
        return started[-1]

    yield start
    for running in started:
        running.close()


@pytest.mark.parametrize("name", ["clip_score", "shapes_agreement"])
def test_a_served_reward_scores_as_it_does_here(serve, name):
    here = rewards.load(name)(PICTURES, CAPTIONS)
    there = serve(rewards.load(name)).reward(name)(PICTURES, CAPTIONS)
    assert here.std() > 0 and torch.allclose(there, here, rtol=0, atol=1e-5)


def brightness(pictures, prompts):
    return torch.stack([p.mean() for p in pictures])


def test_what_waits_is_scored_together(serve):
    sizes, first = [], threading.Event()

    def slow(pictures, prompts):
        sizes.append(len(prompts))
        if len(sizes) == 1:
            first.wait(30)
        return brightness(pictures, prompts)

    running = serve(Reward("slow", slow, batch_size=16))

    def all_wait():
        return bool(sizes) and sum(sizes) + 2 * running.ask("GET", "/health")[1]["waiting"] == 16

    threading.Thread(target=lambda: (_until(all_wait), first.set()), daemon=True).start()
    found = running.reward(batch_size=2, connections=8)(PICTURES[:16], CAPTIONS[:16])
    assert torch.allclose(found, brightness(PICTURES[:16], None))
    assert len(sizes) == 2 and sum(sizes) == 16  # what came first, and all that waited meanwhile
    status, health = running.ask("GET", "/health")
    assert status == 200 and health == {"status": "ok", "protocol": "dancegrpo-reward", "version": 1, "name": "slow", "batch_size": 16, "waiting": 0, "scored": 16}


def _until(true):
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def test_sizes_videos_and_reference_pictures_arrive(serve):
    seen = {}

    def note(pictures, prompts):
        for picture, prompt in zip(pictures, prompts):
            seen.setdefault(str(prompt), []).append((tuple(picture.shape), prompt.picture and prompt.picture.image().getpixel((0, 0))))
        return brightness(pictures, prompts)

    reference = Reference("r", "k", lambda: Image.new("RGB", (5, 4), (9, 8, 7)))
    video = torch.linspace(0, 1, 6).view(6, 1, 1, 1).expand(6, 16, 32, 3)
    found = serve(Reward("note", note, frames=3)).reward(batch_size=8)(
        [PICTURES[:1], PICTURES[1:2, :32], video], ["whole", Prompt("cropped", reference), "video"])
    assert seen == {"whole": [((64, 64, 3), None)], "cropped": [((32, 64, 3), (9, 8, 7))], "video": [((16, 32, 3), None)] * 3}
    assert torch.allclose(found, torch.stack([PICTURES[0].mean(), PICTURES[1, :32].mean(), video[[0, 2, 5]].mean()]), atol=2 / 255)


def test_a_video_of_another_frame_rate_than_the_reward_was_loaded_for_is_refused(serve):
    def paced(videos, prompts):
        return torch.tensor([len(video) / paced.fps for video in videos])

    paced.fps, paced.whole_videos = 16.0, True
    running, video = serve(Reward("paced", paced)), torch.zeros(8, 16, 16, 3)
    assert running.reward(fps=16)([video, video[:1]], ["a", "a picture"]).tolist() == [0.5, 1 / 16]
    with pytest.raises(RunError, match=r"it answers 400: sample 0: found a video of 8\.0 frames a second, accepted: 16, for which the reward was loaded"):
        running.reward(fps=8.0)([video], ["a"])


def test_one_request_at_fault_costs_no_other(serve):
    def picky(pictures, prompts):
        if "bad" in prompts:
            raise LookupError("no such word")
        return brightness(pictures, prompts)

    running = serve(Reward("picky", picky))
    with pytest.raises(RunError, match=r"it answers 500: reward 'picky': LookupError: no such word"):
        running.reward()(PICTURES[:1], ["bad"])
    errors = []

    def bad():
        try:
            running.reward()(PICTURES[:1], ["bad"])
        except RunError as error:
            errors.append(error)

    threads = [threading.Thread(target=bad) for _ in range(3)]
    for thread in threads:
        thread.start()
    found = running.reward(batch_size=1, connections=8)(PICTURES, CAPTIONS)
    for thread in threads:
        thread.join()
    assert len(errors) == 3 and torch.allclose(found, brightness(PICTURES, None))


def _png(width=4, height=4):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


GOOD = {"protocol": "dancegrpo-reward", "version": 1, "name": "", "count": 1, "samples": [{"prompt": "a", "png": _png()}]}


@pytest.mark.parametrize("what, status, said", [
    (b"{", 400, "not JSON"), (b"[" * 100_000, 400, "not JSON"), (b"\x80\x04\x95", 400, "not JSON"),
    ([], 400, "accepted: protocol 'dancegrpo-reward', version 1"), ({"version": 2}, 400, "version 1"),
    ({"name": "other"}, 404, "found the reward 'other', served is 'brightness'"), ({"count": 2}, 400, '"samples" and "count"'),
    ({"count": 0, "samples": []}, 400, '"samples" and "count"'), ({"samples": [1]}, 400, "sample 0: accepted: an object with"),
    ({"samples": [{"prompt": "a"}]}, 400, 'a picture as "png" or a video as "mp4"'), ({"samples": [{"prompt": "a", "png": "%"}]}, 400, "not base64"),
    ({"samples": [{"prompt": "a", "png": 5}]}, 400, "not base64"), ({"samples": [{"prompt": "a", "png": "AAAA"}]}, 400, "not a PNG file"),
    ({"samples": [{"prompt": "a", "mp4": "AAAA"}]}, 400, "not an MP4 file"), ({"samples": [{"prompt": "a", "mp4": _png()}]}, 400, "not an MP4 file"),
    ({"samples": [{"prompt": "a", "png": _png(9000, 9000)}]}, 400, "found a picture of 9000 x 9000, accepted: at most 67108864 pixels"),
    ({"count": 3, "samples": [{"prompt": "a", "png": _png(64, 64)}] * 3}, 413, "found more than 10000 pixels in all"),
    (b" " * 500_000, 413, "Maximum request body size"),
])
def test_what_is_no_request_is_refused_in_one_line(serve, monkeypatch, what, status, said):
    monkeypatch.setattr(reward_server, "MOST_PIXELS", 10_000)
    body = what if isinstance(what, bytes) else json.dumps({**GOOD, **what} if isinstance(what, dict) else what)
    running = serve(Reward("brightness", brightness), most_bytes=400_000)
    found, answer = running.ask("POST", "/score", body)
    assert found == status and said in answer["error"]["message"] and "\n" not in answer["error"]["message"], answer
    assert running.ask("POST", "/score", json.dumps(GOOD))[0] == 200


@pytest.mark.parametrize("headers, status", [
    ({}, 200), ({"Host": "elsewhere.example"}, 403), ({"Origin": "http://elsewhere.example"}, 403), ({"Sec_Fetch_Site": "cross-site"}, 403),
])
def test_a_page_from_elsewhere_does_not_reach_it_through_a_browser(serve, headers, status):
    assert serve(Reward("brightness", brightness)).ask("POST", "/score", json.dumps(GOOD), **headers)[0] == status


def test_a_token_is_asked_for_and_the_user_s_settings_give_it(serve, mine):
    running = serve(Reward("brightness", brightness), token="secret")
    assert running.ask("POST", "/score", json.dumps(GOOD))[0] == running.ask("GET", "/health")[0] == 401
    with pytest.raises(RunError, match=r"it answers 401: .*a key for it goes into \"api_keys\" of .*settings.json"):
        running.reward()(PICTURES[:1], ["a"])
    mine(api_keys={f"127.0.0.1:{running.server.port}": "secret"})
    assert torch.allclose(running.reward()(PICTURES[:1], ["a"]), PICTURES[0].mean(), atol=1e-6)
    assert RewardServer(Reward("brightness", brightness), address="0.0.0.0").token  # made up where others can reach it


def test_it_ends_what_is_under_way_before_it_stops():
    begun, go = threading.Event(), threading.Event()

    def slow(pictures, prompts):
        begun.set()
        go.wait(30)
        return brightness(pictures, prompts)

    running, found = Running(Reward("slow", slow)), []
    asking = threading.Thread(target=lambda: found.append(running.reward()(PICTURES[:1], ["a"])))
    asking.start()
    assert begun.wait(30)
    threading.Timer(0.2, go.set).start()
    running.close()
    asking.join(30)
    assert torch.allclose(found[0], PICTURES[0].mean(), atol=1e-6)
    with pytest.raises(ConnectionRefusedError):
        running.ask("GET", "/health")


@pytest.mark.parametrize("words, said", [
    (["nothing"], "serve-reward: input \"reward\": found 'nothing', accepted: one of "),
    (["jpeg_size", "--frame-score", "best"], "serve-reward: --frame-score: found 'best', accepted: mean, worst"),
    (["clip_score", "--model", "nowhere"], "serve-reward: input \"model\": found 'nowhere', which is in none of the folders searched"),
    (["shapes_agreement", "--host", "256.0.0.1"], "cannot listen on 256.0.0.1, port 0"),
])
def test_what_cannot_be_served_is_one_line(cli, words, said):
    done = cli("serve-reward", *words, "--port", 0)
    (line,) = done.verdict
    assert done.status == 2 and said in line


@pytest.mark.parametrize("words, frame_score", [([], "mean"), (["--frame-score", "worst"], "worst")])
def test_what_a_video_gets_of_its_frames_may_be_chosen(cli, monkeypatch, words, frame_score):
    served = []
    monkeypatch.setattr(reward_server, "serve", served.append)
    assert cli("serve-reward", "jpeg_size", "--frames", 3, *words, "--port", 0).status == 0
    video = torch.rand(3, 16, 16, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 0.5, 1.0]).view(3, 1, 1, 1)
    each = rewards.load("jpeg_size")(video, ["a"] * 3)
    (server,) = served
    assert each.min() < each.mean() and torch.equal(server.reward([video], ["a"]), {"mean": each.mean(), "worst": each.min()}[frame_score][None])


class Program:
    """`dancegrpo serve-reward`, in a process of its own."""

    def __init__(self, port=0):
        words = [sys.executable, "-m", "comfy_dancegrpo.trainer", "serve-reward", "shapes_agreement", "--port", str(port)]
        self.process = subprocess.Popen(words, cwd=Path(rewards.__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
                                        stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        self.port = int(re.fullmatch(r"The reward shapes_agreement is at http://127\.0\.0\.1:(\d+)/score\n", line)[1])

    def end(self, signum):
        self.process.send_signal(signum)
        with self.process.stdout:
            return self.process.wait(60)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_and_restarted_in_the_middle_of_a_run(cli, loop_only, saved, tiny_loop, tmp_path, monkeypatch):
    """The run waits for it, and trains what it trains with the reward in its own process."""
    run = lambda name, node: cli("run", saved({**loop_only, "3": node}), *tiny_loop, "--iterations", 3, "--output", tmp_path / name)  # noqa: E731
    here = {"class_type": "DanceGRPOLoadReward", "inputs": {"reward": "shapes_agreement", "model": "embedded", "batch_size": 32}}
    assert run("here", here).status == 0
    first, restarted, killed = Program(), [], threading.Event()

    def kill():
        _until((tmp_path / "there/quickstart/metrics.jsonl").exists)
        first.end(signal.SIGKILL)
        killed.set()
        restarted.append(Program(first.port))

    monkeypatch.setattr(service, "FIRST_PAUSE", 0.5)
    killer = threading.Thread(target=kill)
    killer.start()
    done = run("there", {"class_type": "DanceGRPORemoteReward", "inputs": {
        "address": f"http://127.0.0.1:{first.port}/score", "reward": "shapes_agreement", "batch_size": 2, "connections": 8, "timeout": 30.0, "retries": 20}})
    killer.join(60)
    assert done.status == 0 and killed.is_set(), done.err
    waited = [line for line in done.err if line.endswith("; it is tried again")]
    print("\n" + "\n".join(waited))
    assert waited
    scores = [[json.loads(row)["reward_mean"] for row in (tmp_path / name / "quickstart/metrics.jsonl").read_text().splitlines()] for name in ("here", "there")]
    assert len(scores[1]) == 3 and scores[1] == pytest.approx(scores[0], abs=1e-6)
    assert restarted[0].end(signal.SIGINT) == 0


def test_the_server_of_the_page_is_one(tmp_path, monkeypatch):
    """docs/reward_server.md's own example, called by Remote Reward."""
    from aiohttp import web

    page = (Path(rewards.__file__).parents[2] / "docs/reward_server.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    loop, started = asyncio.new_event_loop(), []
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def start(app):
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    monkeypatch.setattr(web, "run_app", lambda app, host, port: started.append(asyncio.run_coroutine_threadsafe(start(app), loop).result(30)))
    exec(compile(code, "docs/reward_server.md", "exec"), {})
    address = Address.parse(f"http://127.0.0.1:{started[0].addresses[0][1]}/score")
    gray_and_red = torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.0, 0.0]]).view(2, 1, 1, 3).expand(2, 4, 4, 3)
    assert remote.load(Service(address, retries=0), "saturation")(gray_and_red, ["a", "b"]).tolist() == [0, 1]
    asyncio.run_coroutine_threadsafe(started[0].cleanup(), loop).result(30)
