"""Encoded prompts on disk: the same tensors, read in place of the encoders, through damage, other models and several processes."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
import torch

from comfy_dancegrpo import policies
from comfy_dancegrpo.embedded import POLICY
from comfy_dancegrpo.grpo.protocol import Conditioning, Size
from comfy_dancegrpo.prompts import Prompt, Reference
from comfy_dancegrpo.runs.prompt_cache import FOLDER, PromptCache
from comfy_dancegrpo.workflow.host import Host, use

SIZE = Size(64, 64)
WAIT = 300  # seconds
PROMPTS = ("a large red circle in the center on a white background", "a small blue star at the top left")


class Heard(Host):
    def __init__(self, **folders):
        super().__init__(**folders)
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def here(tmp_path):
    host = Heard(models=tmp_path / "models", output=tmp_path / "output")
    with use(host):
        yield host


def counted(policy, monkeypatch):
    """The prompts that the policy's encoders were asked for."""
    asked, encode = [], policy.encode
    monkeypatch.setattr(policy, "encode", lambda prompts, size: asked.extend(prompts) or encode(prompts, size))
    return asked


def same(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(value, other.tensors[name]) and value.dtype == other.tensors[name].dtype for name, value in one.tensors.items())


def files(host):
    return sorted((host.output_folder / FOLDER).glob("*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_next_run_reads_what_this_one_encoded(here, monkeypatch, dtype):
    policy = policies.load("embedded", dtype, prompt_cache="disk")
    asked = counted(policy, monkeypatch)
    fresh = PromptCache(policies.load("embedded", dtype)).get(PROMPTS, SIZE)
    assert not files(here)  # in memory alone, unless asked for
    cache = PromptCache(policy)
    same(cache.get(PROMPTS, SIZE), fresh)
    same(cache.get(PROMPTS[::-1], SIZE), PromptCache(policy).get(PROMPTS[::-1], SIZE))
    assert asked == list(PROMPTS) and len(files(here)) == 2
    same(PromptCache(policies.load("embedded", dtype, prompt_cache="disk")).get(PROMPTS, SIZE), fresh)
    assert not here.lines


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:4], lambda data: b"", lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_file_is_made_anew(here, monkeypatch, damage):
    policy = policies.load("embedded", prompt_cache="disk")
    fresh = PromptCache(policy).get(PROMPTS, SIZE)
    whole = files(here)[0].read_bytes()
    files(here)[0].write_bytes(damage(whole))
    asked = counted(policy, monkeypatch)
    same(PromptCache(policy).get(PROMPTS, SIZE), fresh)
    assert len(asked) == 1 and "is damaged; it is made anew" in here.lines[0]
    assert files(here)[0].read_bytes() == whole


def test_whatever_the_encoding_depends_on_makes_another_file(here, tmp_path):
    shutil.copytree(POLICY, tmp_path / "models" / "diffusers" / "mine")
    picture = Reference("one", "one.png:1", lambda: None)

    def count(name="embedded", dtype="float32", prompt="a star", size=SIZE):
        PromptCache(policies.load(name, dtype, prompt_cache="disk")).get((prompt,), size)
        return len(files(here))

    assert [count(), count(), count(dtype="bfloat16"), count(prompt="a circle"), count(prompt=Prompt("a star", picture)),
            count(prompt=Prompt("a star", dataclasses.replace(picture, key="two"))), count(size=Size(64, 32)), count("mine"), count("mine")
            ] == [1, 1, 2, 3, 4, 5, 6, 7, 7]
    changed = tmp_path / "models" / "diffusers" / "mine" / "text_encoder" / "model.safetensors"
    os.utime(changed, (1, 1))
    assert count("mine") == 8


ENCODE = """
import sys
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.grpo.protocol import Size
from comfy_dancegrpo.runs.prompt_cache import PromptCache
from comfy_dancegrpo.workflow.host import Host, use
torch.set_num_threads(1)
with use(Host(output=sys.argv[1])):
    PromptCache(policies.load("embedded", prompt_cache="disk")).get(sys.argv[2:], Size(64, 64))
"""


def test_two_processes_at_once_leave_whole_files(here):
    both = [subprocess.Popen([sys.executable, "-c", ENCODE, str(here.output_folder), *PROMPTS]) for _ in range(2)]
    assert [process.wait(WAIT) for process in both] == [0, 0]
    assert len(files(here)) == 2 and all(file.suffix == ".safetensors" for file in files(here))
    policy = policies.load("embedded", prompt_cache="disk")
    policy.encode = None  # it must not be asked
    same(PromptCache(policy).get(PROMPTS, SIZE), PromptCache(policies.load("embedded")).get(PROMPTS, SIZE))


def test_a_write_that_breaks_off_leaves_the_cache_usable(here, monkeypatch):
    policy = policies.load("embedded", prompt_cache="disk")

    def full(tensors, path, **options):
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("comfy_dancegrpo.runs.prompt_cache.save_file", full)
        fresh = PromptCache(policy).get(PROMPTS, SIZE)
    assert not files(here) and "could not be kept" in here.lines[0] and "No space left" in here.lines[0]
    same(PromptCache(policy).get(PROMPTS, SIZE), fresh)
    assert len(files(here)) == 2


# -- the encoders' place ------------------------------------------------------------------------------------------------------
def test_encoders_are_moved_once_for_the_prompts_of_many_iterations(here, monkeypatch):
    """On a stand-in for an accelerator: what is told to move, and what is encoded ahead."""
    policy = policies.load("embedded")
    moved = []
    monkeypatch.setattr(policy, "_move_encoders", lambda device: moved.append(device.type))
    cache = PromptCache(policy)
    cache.get(PROMPTS[:1], SIZE, upcoming=PROMPTS)
    cache.get(PROMPTS[:1], SIZE, upcoming=PROMPTS)
    assert moved == ["cpu", "cpu"]  # to the policy's device and back, and nothing ahead: a CPU has nothing to spare them
    asked = []
    monkeypatch.setattr(policy, "condition", lambda prompts, size: asked.extend(prompts) or Conditioning({"embeds": torch.ones(1, 2)}))
    monkeypatch.setattr(type(policy), "device", torch.device("meta"))
    for _ in range(2):
        cache.get(("another",), SIZE, upcoming=("another", *PROMPTS, "a third", "a third"))
    assert asked == ["another", PROMPTS[1], "a third"] and moved[2:] == ["meta", "cpu"]  # what was encoded before is not again


class Counting:
    """A policy whose prompts are numbers, of 400 bytes each."""

    prompt_cache, device = "memory", torch.device("cpu")

    def __init__(self):
        self.asked = []

    def check(self, prompts):
        pass

    def encoding(self):
        return contextlib.nullcontext()

    def condition(self, prompts, size):
        self.asked += prompts
        return Conditioning({"c": torch.full((1, 100), float(prompts[0]))})


def encoded(cache, *numbers, upcoming=()):
    found = cache.get(map(str, numbers), SIZE, map(str, upcoming)).tensors["c"]
    assert found[:, 0].tolist() == list(map(float, numbers))


def test_what_is_kept_in_memory_is_bounded_and_the_longest_unused_goes():
    policy = Counting()
    cache = PromptCache(policy, limit=1200)
    encoded(cache, 1, 2, 3)
    assert cache.held == 1200
    encoded(cache, 1, 4)  # 2 goes, as 1 was used since
    assert cache.held == 1200
    encoded(cache, 1, 3, 4)
    assert policy.asked == ["1", "2", "3", "4"]
    encoded(cache, 2)
    assert policy.asked[4:] == ["2"]  # and 1 goes
    encoded(cache, 3, 4, 2), encoded(cache, 1)
    assert policy.asked[5:] == ["1"]
    encoded(cache, 5, 6, 7, 8, 9)  # more than it may keep, in one call
    assert cache.held == 2000
    encoded(cache, 5)
    assert cache.held == 1200 and policy.asked[6:] == ["5", "6", "7", "8", "9"]
    for number in range(50):
        encoded(cache, number)
        assert cache.held <= 1200


def test_no_more_is_encoded_ahead_than_is_kept(monkeypatch):
    policy = Counting()
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where: tensor)  # to the pretended accelerator
    policy.device = torch.device("cuda")
    cache = PromptCache(policy, limit=1200)
    encoded(cache, 1, 2)
    encoded(cache, 3, upcoming=(3, 4, 1, 5, 6, 7, 8))
    assert policy.asked == ["1", "2", "3", "4"] and cache.held == 1200  # 2 went, not the upcoming 1
    encoded(cache, 4, 1)
    assert policy.asked == ["1", "2", "3", "4"]
