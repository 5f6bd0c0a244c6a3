"""Pictures are scored while the rest of their rollout is drawn: the same numbers bit for bit, only where it costs the policy nothing, and nothing hidden."""

import contextlib
import json
import re
import shlex
import threading
import time

import pytest
import torch
from loopback import as_json, mine, serving  # noqa: F401
from safetensors.torch import load_file

from comfy_dancegrpo import nodes, rewards
from comfy_dancegrpo.addresses import Address
from comfy_dancegrpo.errors import Interrupted, RunError
from comfy_dancegrpo.nodes.rewards import linked as linked_rewards
from comfy_dancegrpo.policies.flux import Flux
from comfy_dancegrpo.rewards import Reward, early, judge, remote
from comfy_dancegrpo.rewards.early import Early, Linked, Scoring, elsewhere
from comfy_dancegrpo.rewards.service import Service
from comfy_dancegrpo.workflow import loop
from comfy_dancegrpo.workflow.host import Host, host, use

PICTURES = torch.rand(14, 16, 16, 3, generator=torch.Generator().manual_seed(0))
VIDEOS = torch.rand(7, 6, 16, 16, 3, generator=torch.Generator().manual_seed(1))
LABEL = 'node 6 "Score" (DanceGRPOScore)'


def prompts(count):
    return [f"a red circle number {n}" for n in range(count)]


def drawn(samples, sizes, *linked, wait=False):
    """The `Early` of these samples, which came in micro-batches of these sizes; wait: each is scored as far as it may be before the next."""
    found = Early([Linked(reward, LABEL) for reward in linked], prompts(len(samples)))
    with found:
        for part in samples.split(sizes):
            found.add(part)
            if wait:
                time.sleep(0.05)
    return found


class Recorded:
    """A reward function that notes what it was given, and in which thread."""

    def __init__(self, whole_videos=False):
        self.whole_videos, self.given, self.threads = whole_videos, [], set()

    def __call__(self, samples, texts):
        self.given += [(sample.clone(), text) for sample, text in zip(samples, texts)] + [None]  # where a batch ends
        self.threads.add(threading.current_thread())
        return torch.stack([sample.double().mean() * 7 + len(self.given) for sample in samples])


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("sizes", [[4, 4, 4, 2], [1] * 14, [14], [3, 5, 6]], ids=str)
@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4}, {"batch_size": 5}, {"batch_size": 32}], ids=str)
def test_the_very_batches_that_it_would_be_given_afterwards(options, sizes, wait):
    now, then = Recorded(), Recorded()
    scores = drawn(PICTURES, sizes, reward := Reward("recorded", now, **options), wait=wait).of(reward)
    assert torch.equal(scores, Reward("recorded", then, **options)(PICTURES, prompts(14)))
    same_batches(now, then)
    assert threading.current_thread() not in now.threads and threading.current_thread() in then.threads


@pytest.mark.parametrize("options", [{"batch_size": 4, "frames": 6}, {"batch_size": 8, "frames": 3}, {"batch_size": 5, "frames": 2, "frame_score": "worst"},
                                     {"batch_size": 2, "whole_videos": True}, {"batch_size": 3}], ids=str)
def test_of_videos_too(options):
    whole = options.get("batch_size") == 3  # the function says it itself
    now, then = Recorded(whole), Recorded(whole)
    scores = drawn(VIDEOS, [2, 2, 2, 1], reward := Reward("recorded", now, **options), wait=True).of(reward)
    assert torch.equal(scores, Reward("recorded", then, **options)(VIDEOS, prompts(7)))
    same_batches(now, then)


def same_batches(now, then):
    assert len(now.given) == len(then.given)
    for a, b in zip(now.given, then.given):
        assert a is b is None or a[1] == b[1] and torch.equal(a[0], b[0])


def test_a_models_scores_are_the_same_bit_for_bit():
    reward = rewards.load("clip_score", batch_size=3)
    host().load(reward)
    pictures = torch.rand(14, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    scores = drawn(pictures, [4, 4, 4, 2], reward, wait=True).of(reward)
    assert scores.std() > 0 and torch.equal(scores, reward(pictures, prompts(14)))


def test_several_rewards_and_one_that_is_scored_afterwards():
    slow, quick, other = (Reward(name, Recorded(), batch_size=2, waits=waits) for name, waits in (("slow", 1), ("quick", 0), ("other", 0)))
    found = drawn(PICTURES, [7, 7], slow, quick, other)
    assert found.of(Reward("not linked", Recorded())) is None
    for reward in (slow, quick, other):
        assert torch.equal(found.of(reward).argsort(), found.of(reward).argsort()) and len(found.of(reward)) == 14
    assert quick.function.threads == other.function.threads != slow.function.threads


@pytest.mark.parametrize("reward, device, expected", [
    (Reward("remote", len, waits=8), "cpu", True),
    (Reward("remote", len, waits=8), "cuda:0", True),
    (Reward("measured", len), "cpu", False),
    (Reward("measured", len), "cuda:0", True),
    (Reward("model", torch.nn.Linear(1, 1)), "cuda:0", False),
    (Reward("model", torch.nn.Linear(1, 1), device="cuda:0"), "cuda:0", False),
    (Reward("model", torch.nn.Linear(1, 1), device="cuda"), "cuda:0", False),
    (Reward("model", torch.nn.Linear(1, 1), device="cuda:1"), "cuda:0", True),
    (Reward("model", torch.nn.Linear(1, 1), device="cpu"), "cuda:0", True),
    (Reward("model", torch.nn.Linear(1, 1), device="cpu"), "cpu", False),
])
def test_only_where_it_takes_none_of_the_policys_time(reward, device, expected):
    assert elsewhere(reward, torch.device(device)) is expected


class Noting(Host):
    def __init__(self):
        super().__init__()
        self.said, self.loaded, self.threads, self.stopped = [], [], set(), False

    def say(self, line):
        self.said.append(line)
        self.threads.add(threading.current_thread())

    def load(self, model):
        self.loaded.append(model)
        self.threads.add(threading.current_thread())

    def check_interrupt(self):
        self.threads.add(threading.current_thread())
        if self.stopped:
            raise Interrupted("stopped")


def test_the_host_is_told_by_the_thread_that_executes():
    def speaking(samples, texts):
        host().say(f"{len(samples)} in {host().models_folder}")
        return torch.zeros(len(samples))

    with use(Noting()) as noting:
        scoring, reward = Scoring(), Reward("speaking", speaking, batch_size=7, waits=7)
        scoring.link({"5": [Linked(reward, LABEL)]})
        with scoring.begin("5", prompts(14)) as found:
            for part in PICTURES.split(7):
                found.add(part)
        found.of(reward)
        assert noting.said and set(noting.said) <= {"7 in models", "14 in models"} and noting.loaded == [reward]
        assert noting.threads == {threading.current_thread()}
        assert scoring.begin("7", prompts(14)).of(reward) is None and scoring.begin("5", []).of(reward) is None


def test_calls_are_under_way_at_once_as_many_as_are_allowed(serving, mine):
    three = threading.Barrier(3)

    def together(handler, body):
        three.wait(30)  # breaks, and the calls with it, where fewer come at once
        return answer(handler, body)

    server = serving(together)
    reward = remote.load(Service(Address.parse(server.address), connections=3, retries=0), batch_size=2)
    found = drawn(PICTURES[:12], [4, 4, 4], reward).of(reward)
    server.answer = answer
    assert server.most == 3 and [json.loads(body)["count"] for _, body in server.requests] == [2] * 6
    assert torch.equal(found, reward(PICTURES[:12], prompts(12)))


def test_a_judge_that_knows_no_schema_is_asked_without_one_by_all_threads(serving, mine):
    four, schemas = threading.Barrier(4), []

    def chat(handler, body):
        schemas.append("response_format" in json.loads(body))
        if schemas[-1]:
            four.wait(30)
            return as_json({"error": "response_format is unknown"}, 400)
        return as_json({"choices": [{"message": {"content": str(sum(body) % 11)}}]})

    server = serving(chat)
    service = Service(Address.parse(server.address), connections=4, retries=0)
    with use(Noting()) as noting:
        reward = judge.load(service, "", judge.Question("{prompt}?", 0, 10))
        found = drawn(PICTURES, [8, 6], reward).of(reward)
        assert schemas.count(True) == 4 and schemas.count(False) == 14
        assert 1 <= len(noting.said) <= 4 and all("asked without a schema from now on" in line for line in noting.said)
        assert torch.equal(found, reward(PICTURES, prompts(14)))


def test_what_fails_stops_the_drawing_as_an_error_of_the_score_node():
    def failing(samples, texts):
        raise LookupError("no such thing")

    found = Early([Linked(reward := Reward("failing", failing, batch_size=1), LABEL)], prompts(14))
    with pytest.raises(RunError, match=f"^{re.escape(LABEL)}: reward 'failing': LookupError: no such thing \\(2 tries\\)$"), found:
        found.add(PICTURES[:1])
        for _ in range(100):
            found.check()
            time.sleep(0.05)
    with pytest.raises(RunError, match="no such thing"):
        found.of(reward)
    assert not any(thread.is_alive() for thread in found._threads)


def test_a_stop_ends_what_waits_and_what_hangs():
    """The user's stop while Score waits, and the loop's end while nobody does."""
    def hanging(samples, texts):
        while True:
            host().check_interrupt()  # as calls of services do
            time.sleep(0.01)

    for stop_by_user in (True, False):
        with use(Noting()) as noting:
            scoring, reward = Scoring(), Reward("hanging", hanging, batch_size=1, waits=1)
            scoring.link({"5": [Linked(reward, LABEL)]})
            with scoring.begin("5", prompts(14)) as found:
                found.add(PICTURES)
            if stop_by_user:
                noting.stopped = True
                with pytest.raises(Interrupted):
                    found.of(reward)
            scoring.close()
        assert not any(thread.is_alive() for thread in found._threads)


def test_drawing_that_breaks_off_ends_the_threads():
    with pytest.raises(KeyError), Early([Linked(Reward("quick", Recorded(), batch_size=4), LABEL)], prompts(14)) as found:
        found.add(PICTURES[:6])
        raise KeyError("in the sampler")
    assert found._threads and not any(thread.is_alive() for thread in found._threads)


# -- in a run -----------------------------------------------------------------------------------------------------------
def answer(handler, body):
    """Of each picture a number between 0 and 1, by its bytes."""
    request = json.loads(body)
    return as_json({"protocol": "dancegrpo-reward", "version": 1, "name": "bytes", "count": request["count"],
                    "scores": [sum(sample["png"].encode()) % 1009 / 1009 for sample in request["samples"]]})


@pytest.fixture
def remote_loop(loop_only, mine):
    def make(address, **inputs):
        loop_only["3"] = {"class_type": "DanceGRPORemoteReward", "inputs": {
            "address": address, "reward": "", "batch_size": 2, "connections": 2, "timeout": 30.0, "retries": 0, **inputs}}
        return loop_only
    return make


def lora(folder):
    (path,) = (folder / "quickstart/lora").iterdir()
    return load_file(path)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def second_waits(monkeypatch):
    """`with second_waits(event)`: the second micro-batch of each iteration is decoded once the event is set, which the first clears."""
    @contextlib.contextmanager
    def waits(event):
        decoded, decode = [], Flux.decode

        def waiting(self, *arguments):
            decoded.append(None)
            if len(decoded) % 2:
                event.clear()
            else:
                assert event.wait(60), "nothing was asked while the second micro-batch was drawn"
            return decode(self, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(Flux, "decode", waiting)
            yield decoded
    return waits


def test_a_run_scores_while_it_draws_and_trains_the_same(cli, saved, tiny_loop, tmp_path, serving, remote_loop, second_waits):
    asked = threading.Event()
    server = serving(lambda handler, body: asked.set() or answer(handler, body))
    with second_waits(asked) as decoded:
        done = cli("run", saved(remote_loop(server.address)), "--output", tmp_path / "early", *tiny_loop)
    assert done.status == 0, done.err
    assert len(decoded) == 4 and [json.loads(body)["count"] for _, body in server.requests] == [2] * 6
    after = remote_loop(server.address)
    after["6"]["inputs"]["images"] = ["5", 1]  # what comes by the other output is scored afterwards: it might have gone through other nodes
    assert cli("run", saved(after), "--output", tmp_path / "after", *tiny_loop).status == 0
    assert len(server.requests) == 12 and equal(lora(tmp_path / "early"), lora(tmp_path / "after"))


def test_a_fault_stops_the_run_while_it_draws_and_the_run_can_be_resumed(cli, saved, tiny_loop, tmp_path, serving, remote_loop):
    """Of six micro-batches an iteration; the server fails in the second iteration."""
    count = 0

    def leaving(handler, body):
        nonlocal count
        count += 1
        return as_json({"error": "going down"}, 503) if 6 < count else answer(handler, body)

    server = serving(leaving)
    words = [*tiny_loop, "--set", "Loop Start.micro_batch=1", "--set", "Loop Start.checkpoint_every=1"]
    flow = saved(remote_loop(server.address, batch_size=1, connections=1))
    done = cli("run", flow, "--output", tmp_path / "stops", *words)
    (line,) = done.verdict
    print(f"\n{line}")
    assert done.status == 3 and line.startswith("node 6 \"Score\" (DanceGRPOScore): reward 'remote': http://127.0.0.1:")
    assert "it answers 503: going down; what it was given is in " in line
    fault = json.loads((tmp_path / "stops/quickstart/failed_reward/remote-1/fault.json").read_text())
    assert len(fault["samples"]) == 1 and "going down" in fault["answer"]
    server.answer = answer
    assert cli(*shlex.split(line.partition("; resume with: ")[2])[1:]).status == 0
    assert cli("run", flow, "--output", tmp_path / "whole", *words).status == 0
    assert equal(lora(tmp_path / "stops"), lora(tmp_path / "whole"))


def test_a_call_that_is_tried_again_is_told(cli, saved, tiny_loop, tmp_path, serving, remote_loop):
    seen = set()

    def at_first(handler, body):
        first = not seen
        seen.add(body)
        return as_json({"error": "not yet"}, 503) if first else answer(handler, body)

    done = cli("run", saved(remote_loop(serving(at_first).address, retries=1)), "--output", tmp_path, *tiny_loop)
    assert done.status == 0 and sum(line.endswith("it answers 503: not yet; it is tried again") for line in done.err) == 1, done.err


def test_a_score_that_nobody_needs_is_not_computed(cli, saved, tiny_loop, tmp_path, serving, remote_loop):
    server = serving(answer)
    needed = dict(remote_loop(server.address))
    needed["30"] = {"class_type": "DanceGRPOLoadReward", "inputs": {"reward": "shapes_agreement", "model": "embedded", "batch_size": 2}}
    needed["60"] = {"class_type": "DanceGRPOScore", "inputs": {"rollout": ["5", 0], "reward": ["30", 0], "weight": 1.0}}
    for node in needed.values():
        node["inputs"].update({name: ["60", 0] for name, value in node["inputs"].items() if value == ["6", 0]})
    done = cli("run", saved(needed), "--output", tmp_path, *tiny_loop)
    assert done.status == 0, done.err
    assert server.requests == []


def test_which_scores_are_computed_early(loop_only):
    """By Group Sample's id: those of its own pictures, by rewards from outside the loop, whose node every iteration calls."""
    registry = {**nodes.HOST_CLASS_MAPPINGS, **nodes.NODE_CLASS_MAPPINGS}
    (end,) = (node_id for node_id, node in loop_only.items() if node["class_type"] == "DanceGRPOLoopEnd")
    reward = rewards.load("jpeg_size")

    def linked(**changed):
        prompt = {**loop_only, "6": {**loop_only["6"], "inputs": {**loop_only["6"]["inputs"], **changed}}}
        body = loop.find_body(prompt, end, registry)
        outside = {name: [reward] if link == ["3", 0] else [None] for name, link in body.outside_inputs().items()}
        return linked_rewards(loop.BodyRunner(body, registry, outside, prompt, None))

    assert linked() == {"5": [Linked(reward, LABEL)]}
    assert linked(images=["5", 1]) == {} and linked(reward=["4", 0]) == {}


# -- offload ------------------------------------------------------------------------------------------------------------
class Moved(torch.nn.Module):
    """Notes where it is sent, and where it was when it was called."""

    def __init__(self, fails=False):
        super().__init__()
        self.at, self.called, self.fails = ["cpu"], [], fails

    def to(self, device):
        self.at.append(str(device))

    def forward(self, samples, texts):
        self.called.append(self.at[-1])
        if self.fails:
            raise LookupError
        return samples.mean((1, 2, 3))


@pytest.mark.parametrize("offload, way", [(True, ["cpu", "cuda:1", "cpu", "cuda:1", "cpu"]), (False, ["cpu", "cuda:1", "cuda:1"])])
def test_a_reward_leaves_the_device_between_scorings(offload, way):
    reward = Reward("moved", module := Moved(), batch_size=10, device="cuda:1", offload=offload)
    for _ in range(2):
        reward(PICTURES, prompts(14))
    assert module.at == way and module.called == ["cuda:1"] * 4


def test_also_where_it_fails():
    reward = Reward("moved", module := Moved(fails=True), device="cuda:1", offload=True)
    with pytest.raises(RunError):
        reward(PICTURES, prompts(14))
    assert module.at == ["cpu", "cuda:1", "cpu"]


def test_early_scores_load_and_leave_once(monkeypatch):
    monkeypatch.setattr(early, "elsewhere", lambda reward, device: True)
    scoring, reward = Scoring(), Reward("moved", module := Moved(), batch_size=2, device="cuda:1", offload=True)
    scoring.link({"5": [Linked(reward, LABEL)]})
    with scoring.begin("5", prompts(14)) as found:
        for part in PICTURES.split(4):
            found.add(part)
    assert torch.equal(found.of(reward), PICTURES.mean((1, 2, 3)))
    assert module.at == ["cpu", "cuda:1", "cpu"] and module.called == ["cuda:1"] * 7


def test_load_reward_offers_it(tmp_path):
    (found,) = nodes.NODE_CLASS_MAPPINGS["DanceGRPOLoadReward"]().load("clip_score", "embedded", 4, offload=True)
    assert found.offload and not rewards.load("clip_score").offload
