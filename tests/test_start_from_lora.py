"""A LoRA to go on from: the run begins as the policy that it was, whatever the rank and alpha, and learns in all that it adds."""

import dataclasses

import pytest
import torch

from comfy_dancegrpo import policies
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.protocol import SamplingPlan, Size
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings, LoraSnapshot, applied
from comfy_dancegrpo.lora.full import FullSettings
from comfy_dancegrpo.prompts import PromptList
from comfy_dancegrpo.runs.prompt_cache import encode
from comfy_dancegrpo.runs.session import LoopSettings, Session
from comfy_dancegrpo.workflow.host import Host, use

SIZE, PROMPTS = Size(64, 64), ("a large red circle in the center on a white background",)


@pytest.fixture(scope="module")
def policy():
    return policies.load("embedded")


@pytest.fixture(scope="module")
def snapshot(policy):
    settings = LoraSettings(rank=4, alpha=8.0, targets="attention")
    adapter = Adapter(policy, settings, seed=5)
    source = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(p.shape, generator=source) * 0.1 for name, p in adapter.parameters.items()}
    adapter.remove()
    return LoraSnapshot(tensors, settings, policy.name, policy.lora_layout, 3, False, None)


def velocity(policy):
    plan = SamplingPlan(policy.time_grid(4, 3.0, SIZE), "dance_sde", 0.3, 3.5, SIZE)
    latents = torch.randn(1, *policy.latent_shape(SIZE), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return policy.predict(latents, plan.grid.timesteps[1].expand(1), encode(policy, PROMPTS, SIZE), plan)


@pytest.mark.parametrize("settings", [
    LoraSettings(4, 8.0, "attention"), LoraSettings(4, 1.0, "attention"), LoraSettings(16, 16.0, "all linear layers"),
], ids=["the same", "another alpha", "wider and in more layers"])
def test_it_begins_as_the_policy_that_it_was(policy, snapshot, settings):
    with applied(policy, snapshot):
        expected = velocity(policy)
    adapter = Adapter(policy, settings)
    try:
        bare = velocity(policy)
        adapter.start_from(snapshot)
        assert (velocity(policy) - expected).abs().max() < 1e-5 and (bare - expected).abs().max() > 1e-3
        for name, p in adapter.parameters.items():  # with A and B both zero, a part would stay so
            assert ".lora_A." not in name or p.flatten(1).any(1).all()
    finally:
        adapter.remove()


def test_ranks_and_layers_that_it_leaves_zero_can_learn(policy, snapshot):
    """As a file is read whose layers have several ranks: what is not in it is zero in both matrices."""
    holes = {name: value.clone() for name, value in snapshot.tensors.items()}
    first = min(name for name in holes if ".lora_A." in name)
    holes[first][2:] = 0
    holes[first.replace("lora_A", "lora_B")][:, 2:] = 0
    last = max(name for name in holes if ".lora_A." in name)
    holes[last].zero_(), holes[last.replace("lora_A", "lora_B")].zero_()
    given = dataclasses.replace(snapshot, tensors=holes)
    with applied(policy, given):
        expected = velocity(policy)
    adapter = Adapter(policy, snapshot.settings)
    try:
        adapter.start_from(given)
        assert (velocity(policy) - expected).abs().max() < 1e-6
        assert all(p.flatten(1).any(1).all() for name, p in adapter.parameters.items() if ".lora_A." in name)
    finally:
        adapter.remove()


def test_what_does_not_fit_is_one_line(policy, snapshot):
    name = min(name for name in snapshot.tensors if ".lora_A." in name)
    narrow = dataclasses.replace(snapshot, tensors={**snapshot.tensors, name: snapshot.tensors[name][:, 1:]})
    for settings, given, said in ((LoraSettings(4, 4.0, "modulation"), snapshot, r"\d+ of its \d+ layers find no place in 'modulation' of 'embedded', such as "),
                                  (LoraSettings(2, 4.0, "attention"), snapshot, r" is \[4, \d+\] with lora_B \[\d+, 4\], accepted: \[2, "),
                                  (LoraSettings(4, 4.0, "attention"), narrow, f"{name} is ")):
        adapter = Adapter(policy, settings)
        try:
            with pytest.raises(ValueError, match=said) as found:
                adapter.start_from(given)
            assert len(str(found.value).splitlines()) == 1
        finally:
            adapter.remove()


def test_a_run_takes_it_and_its_rank_and_comes_off_whole(policy, snapshot, tmp_path):
    before = velocity(policy)
    with applied(policy, snapshot):
        expected = velocity(policy)
    settings = LoopSettings(iterations=1, lora=LoraSettings(2, 2.0, "attention"), start_from=snapshot, gradient_checkpointing=True)
    with use(Host(output=tmp_path)), Session(policy, PromptList(PROMPTS), settings, "fingerprint") as session:
        assert (velocity(policy) - expected).abs().max() < 1e-6 and policy.denoiser.is_gradient_checkpointing
        kept = session.snapshot().settings
        assert (kept.rank, kept.alpha) == (4, 4.0)  # as strong for its rank as was asked
    assert torch.equal(velocity(policy), before) and not policy.denoiser.is_gradient_checkpointing


@pytest.mark.parametrize("lora", [LoraSettings(6, 2.0, "attention"), FullSettings()], ids=["LoRA", "all weights"])
def test_kl_is_to_the_policy_that_it_begins_as(policy, snapshot, tmp_path, lora):
    settings = LoopSettings(iterations=1, lora=lora, start_from=snapshot)
    with use(Host(output=tmp_path)), Session(policy, PromptList(PROMPTS), settings, "fingerprint") as session:
        begun = velocity(policy)
        with torch.no_grad():
            for p in session.trained.parameters.values():
                p.add_(0.01)
        session.trained.written()
        moved = velocity(policy)
        with session.live.learner.reference():
            assert (velocity(policy) - begun).abs().max() < 1e-5
        assert torch.equal(velocity(policy), moved) and (moved - begun).abs().max() > 1e-3
        assert all(p.requires_grad for p in session.trained.parameters.values())


def test_its_digest_tells_contents_and_strengths_apart(snapshot):
    name = next(iter(snapshot.tensors))
    changed = {**snapshot.tensors, name: snapshot.tensors[name] + 1e-6}
    same = dataclasses.replace(snapshot, tensors=dict(reversed(snapshot.tensors.items())))
    stronger = dataclasses.replace(snapshot, settings=dataclasses.replace(snapshot.settings, alpha=4.0))
    assert same.digest() == snapshot.digest()
    assert len({snapshot.digest(), dataclasses.replace(snapshot, tensors=changed).digest(), stronger.digest()}) == 3


def test_a_run_from_a_saved_lora_knows_it_by_its_content(cli, prompt, saved, tiny_loop, tmp_path):
    """The second run begins where the first ended; with another content of the file, it is another run."""
    from safetensors.torch import load_file, save_file

    from comfy_dancegrpo.lora import files

    output = tmp_path / "output"
    loop_only = {node_id: node for node_id, node in prompt.items() if int(node_id) <= 11 and node["class_type"] != "PreviewImage"}
    assert cli("run", saved(loop_only), "--output", output, *tiny_loop).status == 0
    file = output / "quickstart" / "lora" / "quickstart.safetensors"
    loop_only["20"] = {"class_type": "DanceGRPOLoadLora", "inputs": {"policy": ["1", 0], "lora": "quickstart/lora/quickstart.safetensors"}}
    loop_only["4"]["inputs"] |= {"lora": ["20", 0], "optimizer": "adafactor", "run_name": "further"}
    loop_only["11"]["inputs"]["filename"] = "further"
    words = ("run", saved(loop_only, "further.json"), "--output", output, *tiny_loop)
    assert cli(*words).status == 0
    policy = policies.load("embedded")
    first, second = (files.load(path, policy) for path in (file, output / "further" / "lora" / "further.safetensors"))
    bare = Adapter(policy, first.settings, seed=0)
    update = {name: first.tensors[name] for name in first.tensors if ".lora_B." in name}
    apart = max((second.tensors[name] - value).abs().max() for name, value in update.items())
    bare.remove()
    assert 0 < apart < 10 * max(value.abs().max() for value in update.values())
    again = (*words, "--set", "4.on_existing=resume")
    assert any("finished and unchanged" in line for line in cli(*again).err)
    save_file({name: value + 1e-3 for name, value in load_file(file).items()}, tmp_path / "changed.safetensors", metadata=header(file))
    (tmp_path / "changed.safetensors").replace(file)
    done = cli(*again)
    assert done.status == 3 and "was made by another workflow" in done.verdict[0]


def header(file):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def test_restarting_a_run_does_not_delete_the_lora_that_it_starts_from(policy, snapshot, tmp_path):
    lora = tmp_path / "run" / "lora" / "run.safetensors"
    settings = LoopSettings(run_name="run", iterations=1, lora=LoraSettings(4, 8.0, "attention"), on_existing="restart",
                            start_from=dataclasses.replace(snapshot, source=lora))
    with use(Host(output=tmp_path)):
        with Session(policy, PromptList(PROMPTS), dataclasses.replace(settings, start_from=None), "first") as session:
            kept = session.folder.path / "kept"
            kept.touch()
        lora.parent.mkdir()
        lora.write_bytes(b"weights")
        record = (tmp_path / "run" / "run.json").read_bytes()
        with pytest.raises(RunError, match=r"run 'run' starts from .*run\.safetensors, which restarting it would delete"):
            with Session(policy, PromptList(PROMPTS), settings, "second"):
                pass
        assert lora.read_bytes() == b"weights" and (tmp_path / "run" / "run.json").read_bytes() == record
