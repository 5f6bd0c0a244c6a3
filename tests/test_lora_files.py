"""A saved LoRA loaded again: the same pictures, what is filled with zeros, and what is refused in one line."""

import copy
import dataclasses
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_dancegrpo import lora as loras
from comfy_dancegrpo import nodes, policies, rewards
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.lora import files
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings, LoraSnapshot
from comfy_dancegrpo.prompts import PromptList
from comfy_dancegrpo.workflow.host import Host, use

HEADER = {"dancegrpo.policy": "embedded", "dancegrpo.iterations": "7", "dancegrpo.averaged": "true"}
FIRST = "transformer_blocks.0.norm1.linear"
A, B = f"transformer.{FIRST}.lora_A.weight", f"transformer.{FIRST}.lora_B.weight"
PROMPTS = PromptList(("a large red circle in the center on a white background", "a small blue star at the top left on a black background"), "text")


@pytest.fixture(scope="module")
def policy():
    return policies.load("embedded")


@pytest.fixture(scope="module")
def make(policy):
    """`make(settings)`: a LoRA that changes pictures a lot."""

    def snapshot(settings: LoraSettings) -> LoraSnapshot:
        adapter = Adapter(policy, settings)
        try:
            tensors = {name: torch.randn(p.shape, generator=generator("files", name)) * 0.1 for name, p in adapter.parameters.items()}
        finally:
            adapter.remove()
        return LoraSnapshot(tensors, settings, policy.name, policy.lora_layout, 7, True, None)

    return snapshot


@pytest.fixture
def file(make, tmp_path):
    """`file(change)`: a file of rank 4 on the modulation, after `change(tensors)` altered what it holds."""
    path = tmp_path / "tuned.safetensors"
    files.save(make(LoraSettings(4, 4.0, "modulation")), path)

    def changed(change=lambda tensors: None, header=HEADER):
        tensors = load_file(path)
        change(tensors)
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=header)
        return path

    return changed


@pytest.fixture(scope="module")
def evaluated(policy):
    """`evaluated(lora)`: what Evaluate gives: the grid of pictures, the gain, the report."""
    reward = rewards.load("shapes_agreement", "embedded", 32)
    return lambda lora: nodes.evaluate.Evaluate().evaluate(policy, lora, PROMPTS, reward, 2, 3.0, 0.0, 64, 64, 5, 1, 4, 8, 2)["result"]


@pytest.mark.parametrize(("targets", "alpha"), [("modulation", 4.0), ("attention", 4.0), ("all linear layers", 8.0), ("attention and feed-forward", 1.0)])
def test_saved_and_loaded_it_draws_the_same_pictures(targets, alpha, policy, make, evaluated, tmp_path):
    """Bit for bit where alpha / rank is a power of two; folding any other into lora_B rounds."""
    snapshot, path = make(LoraSettings(4, alpha, targets)), tmp_path / "tuned.safetensors"
    files.save(snapshot, path)
    loaded = files.load(path, policy)
    told = ("policy", "layout", "iterations", "averaged", "folder", "prompts")
    assert all(getattr(loaded, name) == getattr(snapshot, name) for name in told) and loaded.settings == LoraSettings(4, 4.0, targets)
    files.save(loaded, tmp_path / "again.safetensors")
    again, other = load_file(tmp_path / "again.safetensors"), load_file(path)
    assert again.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in again.items())
    ours, theirs = evaluated(snapshot), evaluated(loaded)
    assert torch.equal(ours[0], theirs[0]) and ours[1:] == theirs[1:]
    nothing = dataclasses.replace(snapshot, tensors={name: torch.zeros_like(value) for name, value in snapshot.tensors.items()})
    assert not torch.equal(ours[0], evaluated(nothing)[0])  # it does something


def test_a_lower_rank_and_a_missing_module_are_filled_with_zeros(policy, file):
    second = "transformer_blocks.1.norm1.linear"

    def change(tensors):
        tensors[A], tensors[B] = tensors[A][:3], tensors[B][:, :3]
        for matrix in "AB":
            del tensors[f"transformer.{second}.lora_{matrix}.weight"]

    path = file(change)
    stored, loaded = load_file(path), files.load(path, policy)
    assert loaded.settings == LoraSettings(4, 4.0, "modulation")
    a, b = (loaded.tensors[f"{FIRST}.lora_{matrix}.weight"] for matrix in "AB")
    assert torch.equal(a[:3], stored[A]) and torch.equal(b[:, :3], stored[B]) and not a[3:].any() and not b[:, 3:].any()
    assert a.shape[0] == b.shape[1] == 4
    assert not loaded.tensors[f"{second}.lora_A.weight"].any() and not loaded.tensors[f"{second}.lora_B.weight"].any()
    adapter = Adapter(policy, loaded.settings)
    try:
        adapter.load(loaded.tensors)  # raises where a name or a shape is not the adapter's
    finally:
        adapter.remove()


def test_half_precision_is_brought_to_float32(policy, file):
    path = file(lambda tensors: tensors.update({name: value.bfloat16() for name, value in tensors.items()}))
    assert {value.dtype for value in files.load(path, policy).tensors.values()} == {torch.float32}


def _rename(tensors, old, new):
    for name in list(tensors):
        tensors[name.replace(old, new)] = tensors.pop(name)


WRONG = {
    "an unknown key": (lambda t: t.update({f"transformer.{FIRST}.alpha": torch.ones(1)}), f"there is no place for '{FIRST}.alpha'"),
    "an unknown module": (lambda t: t.update({"transformer.x.lora_A.weight": torch.ones(4, 8), "transformer.x.lora_B.weight": torch.ones(8, 4)}),
                          "there is no place for 'x.lora_A.weight'"),
    "another family's": (lambda t: _rename(t, "transformer.", "unet."), "there is no place for 'unet."),
    "another width": (lambda t: t.update({A: t[A][:, :-1]}), "in the one and [4, 128] in the other"),
    "another height": (lambda t: t.update({B: t[B][:-1]}), "in the other"),
    "half of a pair": (lambda t: t.pop(B), f"damaged: lora_A and lora_B of {FIRST} do not belong together"),
    "two ranks in a pair": (lambda t: t.update({B: t[B][:, :3]}), f"damaged: lora_A and lora_B of {FIRST} do not belong together"),
    "no matrix": (lambda t: t.update({A: t[A][0]}), f"damaged: lora_A and lora_B of {FIRST} do not belong together"),
    "nothing": (lambda t: t.clear(), "holds no LoRA: it has no tensors"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused_in_one_line(what, policy, file):
    change, line = WRONG[what]
    refused(file(change), policy, line)
    assert not getattr(policy.denoiser, "_hf_peft_config_loaded", False)  # no adapter is left behind


@pytest.mark.parametrize("header", [None, {"format": "pt"}])
def test_a_file_without_our_header_is_loaded_as_one_of_others(header, policy, file):
    loaded = files.load(file(header=header), policy)
    assert (loaded.policy, loaded.iterations, loaded.averaged) == (policy.name, 0, False)
    assert loaded.digest() == files.load(file(), policy).digest()


@pytest.mark.parametrize("header", [{**HEADER, "dancegrpo.iterations": "many"}, {"dancegrpo.policy": "embedded"}])
def test_a_header_of_ours_that_is_not_whole_is_refused(header, policy, file):
    refused(file(header=header), policy, "is damaged: its header is not as Save LoRA writes it")


@pytest.mark.parametrize("data", [lambda data: data[:-100], lambda data: data[:20], lambda data: b"", lambda data: b"PK\x03\x04 a pickle"])
def test_a_damaged_file_is_refused(data, policy, file):
    path = file()
    path.write_bytes(data(path.read_bytes()))
    refused(path, policy, "is damaged, or is no safetensors file")


def refused(path, policy, line):
    with pytest.raises(RunError) as error:
        files.load(path, policy)
    assert line in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


# -- the node -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def host(tmp_path):
    """Two runs, the second the newer; a file in the LoRA folder; and others that are no LoRAs."""
    for age, name in enumerate(["output/new/lora/new.safetensors", "output/old/lora/old.safetensors", "models/loras/mine.safetensors",
                                "output/new/lora/note.txt", "output/new/checkpoints/1.safetensors", "models/loras/mine.txt", "outside.safetensors"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        os.utime(path, (1e9 - age, 1e9 - age))
    with use(Host(output=tmp_path / "output", models=tmp_path / "models")) as active:
        yield active


def test_the_list_begins_with_the_newest_run(host):
    assert nodes.load_lora.LoadLora.INPUT_TYPES()["required"]["lora"][0] == [
        "new/lora/new.safetensors", "old/lora/old.safetensors", "mine.safetensors"]
    assert all(nodes.load_lora.LoadLora.VALIDATE_INPUTS(name) is True for name in loras.available())


@pytest.mark.parametrize("name", ["../outside.safetensors", "new/../../outside.safetensors", "..\\outside.safetensors", "/outside.safetensors",
                                  "gone/lora/gone.safetensors", "new/lora", "new/lora/note.txt", "C:\\outside.safetensors", ""])
def test_no_other_file_is_ever_read(name, host):
    line = nodes.load_lora.LoadLora.VALIDATE_INPUTS(name)
    assert line.startswith(f'input "lora": found {name!r}, ') and "\n" not in line
    with pytest.raises(RunError):
        loras.find(name)


def test_an_absolute_name_is_not_read_either(host, tmp_path):
    assert (tmp_path / "outside.safetensors").is_file()
    with pytest.raises(RunError, match="in none of the folders searched"):
        loras.find(str(tmp_path / "outside.safetensors"))


def test_a_file_made_anew_is_read_again(host):
    load = nodes.load_lora.LoadLora
    before = load.IS_CHANGED(lora="mine.safetensors")
    assert load.IS_CHANGED(lora="mine.safetensors") == before
    loras.find("mine.safetensors").write_bytes(b"more")
    assert load.IS_CHANGED(lora="mine.safetensors") != before


def test_it_says_so_when_the_policy_has_another_name(host, file, policy, tmp_path):
    said = []
    host.say = said.append
    path = file(header={**HEADER, "dancegrpo.policy": "another"})
    path.rename(tmp_path / "models/loras/mine.safetensors")
    (loaded,) = nodes.load_lora.LoadLora().load(policy, "mine.safetensors")
    assert said == ["Load Policy LoRA: mine.safetensors was trained on 'another', and is loaded for 'embedded'"]
    with pytest.raises(RunError, match="found one that was loaded from a file, accepted: one from Loop End"):
        nodes.save_lora.SaveLora().save(loaded, "again")


@pytest.mark.parametrize("below", [False, True])
def test_an_adapter_that_cannot_be_attached_to_all_is_left_on_none(policy, monkeypatch, below):
    first, second = policy.denoiser, copy.deepcopy(policy.denoiser)
    monkeypatch.setattr(type(policy), "denoisers", property(lambda self: {"": first, "second.": second}))
    other = Adapter(policy, LoraSettings(2, 2.0, "modulation")) if below else None
    before = [{name for name, _ in module.named_parameters()} for module in (first, second)]
    inject, injected = type(second).add_adapter, []

    def add_adapter(self, config, adapter_name):
        inject(self, config, adapter_name=adapter_name)
        injected.append(self)
        if self is second:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(type(second), "add_adapter", add_adapter)
    with pytest.raises(torch.OutOfMemoryError):
        Adapter(policy, LoraSettings(4, 4.0, "modulation"))
    assert injected == [first, second]
    assert [{name for name, _ in module.named_parameters()} for module in (first, second)] == before
    if below:
        assert first.active_adapters() == second.active_adapters() == [other.name]
        other.remove()
    assert not any("lora" in name for name, _ in first.named_parameters())
