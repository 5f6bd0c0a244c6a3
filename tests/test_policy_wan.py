"""What is Wan's own beside the table of families: two experts under one policy, first frames, and the names of its LoRA files."""

import dataclasses

import families
import numpy as np
import pytest
import torch
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.grpo.protocol import Conditioning, SamplingPlan, Size
from comfy_dancegrpo.grpo.rollout import Request, initial_noise, sample
from comfy_dancegrpo.lora import files
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings, LoraSnapshot
from comfy_dancegrpo.lora.layouts import wan as names
from comfy_dancegrpo.policies.wan import Wan, WanImageToVideo
from families import PROMPTS, pictured, wan

SIZE = Size(32, 32, 5)


def loaded(build, cls=Wan):
    return cls("wan", build(), torch.float32)


@pytest.fixture(scope="module")
def experts():
    return loaded(wan.wan22_a14b)


def noise(policy, size, rows=2):
    return torch.randn(rows, *policy.latent_shape(size), generator=generator("x"))


def plan_of(policy, size, guidance=1.0):
    return SamplingPlan(policy.time_grid(3, 0.0, size), size=size, guidance_scale=guidance)


def condition(policy, size, prompts=PROMPTS):
    with torch.no_grad():
        return Conditioning.join([policy.condition([prompt], size) for prompt in prompts])


# -- two experts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_each_row_of_a_mixed_batch_is_its_own_experts_bit_for_bit(experts, guidance, one_thread):
    plan, x, conditioning = plan_of(experts, SIZE, guidance), noise(experts, SIZE), condition(experts, SIZE)
    steps = plan.grid.timesteps
    assert steps[0] >= experts.boundary > steps[1]
    with torch.no_grad():
        mixed = experts.predict(x, steps[[0, 1]], conditioning, plan)
        high, low = (experts.predict(x, steps[[i, i]], conditioning, plan) for i in (0, 1))
    assert torch.equal(mixed[0], high[0]) and torch.equal(mixed[1], low[1])
    assert not torch.equal(high[1], low[1])


@pytest.mark.parametrize(("index", "called"), [([0, 0], {"high"}), ([1, 1], {"low"}), ([0, 1], {"high", "low"})])
def test_an_expert_is_called_where_it_has_a_row_and_learns_from_its_rows_alone(experts, index, called):
    seen, plan = set(), plan_of(experts, SIZE)
    watching = [module.register_forward_hook(lambda *_, name=name: seen.add(name))
                for name, module in zip(("high", "low"), experts.denoisers.values())]
    adapter = Adapter(experts, LoraSettings(2, 2.0, "attention"))
    try:
        loss = experts.predict(noise(experts, SIZE), plan.grid.timesteps[index], condition(experts, SIZE), plan).square().mean(dim=(1, 2, 3, 4))
        loss[0].backward()  # of the first row, whose expert is that of index[0]
        moved = {"low" if name.startswith("transformer_2.") else "high"
                 for name, p in adapter.parameters.items() if p.grad is not None and p.grad.any()}
    finally:
        adapter.remove()
        for hook in watching:
            hook.remove()
    assert seen == called and moved == {"low" if index[0] else "high"}


def test_a_boundary_without_a_second_expert_is_refused():
    pipeline = wan.wan21()
    pipeline.register_to_config(boundary_ratio=0.5)
    with pytest.raises(RunError, match="names a boundary between two experts, and has one"):
        Wan("half", pipeline, torch.float32)


def test_the_expert_of_low_noise_has_a_guidance_of_its_own_as_in_the_pipeline():
    policy = loaded(wan.wan22_a14b)
    plan = plan_of(policy, SIZE, 4.0)
    request = Request(PROMPTS, 1, policy.latent_shape(SIZE), seed=1, iteration=0, shared_noise=False, micro_batch=2)
    same = sample(policy, request, condition(policy, SIZE), dataclasses.replace(plan, transition="ode", eta=0.0), ("run", 0)).pictures
    policy.guide_low_noise(2.0)
    assert policy.pipeline_options() == {"guidance_scale_2": 2.0}
    made = sample(policy, request, condition(policy, SIZE), dataclasses.replace(plan, transition="ode", eta=0.0), ("run", 0)).pictures
    assert (made - same).abs().max() > 1e-4
    drawing = families.Drawing(PROMPTS, initial_noise(request, torch.arange(2)), SIZE, 3, 4.0)
    wan.first_order(policy.pipeline)
    theirs = families.draw_video(policy.pipeline, drawing, **policy.pipeline_options())
    assert np.abs(theirs - made.numpy()).max() < 1e-5


def test_a_model_of_one_expert_has_one_guidance():
    with pytest.raises(RunError, match="^input \"guidance_scale_2\": found 3.0, accepted by 'wan': 0, since it has one expert$"):
        loaded(wan.wan21).guide_low_noise(3.0)


# -- the time grid ------------------------------------------------------------------------------------------------------
def test_its_own_grid_is_that_of_its_scheduler_from_one_to_zero(experts):
    grid, theirs = experts.time_grid(7, 0.0, SIZE), experts.pipeline.scheduler
    theirs.set_timesteps(7)
    assert grid.levels[0] == 1 and grid.levels[-1] == 0 and not grid.timesteps.is_floating_point()
    torch.testing.assert_close(grid.levels, theirs.sigmas, atol=2e-6, rtol=0)
    assert torch.equal(grid.timesteps, theirs.timesteps)


# -- first frames -------------------------------------------------------------------------------------------------------
def test_a_given_first_frame_arrives_whole_and_nothing_is_learned_from_it():
    policy, size = loaded(wan.wan22_ti2v), Size(64, 64, 5)
    prompts = (pictured()[0], PROMPTS[1])  # with and without
    plan, x, conditioning = plan_of(policy, size), noise(policy, size), condition(policy, size, prompts)
    adapter = Adapter(policy, LoraSettings(2, 2.0, "attention"))
    try:
        velocity = policy.predict(x, plan.grid.timesteps[[1, 2]], conditioning, plan)
        sigma = plan.grid.levels[[1, 2]].view(2, 1, 1, 1, 1)
        first = (x - sigma * velocity)[:, :, 0]
        torch.testing.assert_close(first[0], conditioning.tensors["first"][0, :, 0])
        velocity[0, :, 0].sum().backward(retain_graph=True)
        assert not any(p.grad is not None and p.grad.any() for p in adapter.parameters.values())
        velocity[1, :, 0].sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in adapter.parameters.values())
    finally:
        adapter.remove()


def test_image_to_video_asks_for_pictures():
    policy = loaded(wan.wan21_i2v, WanImageToVideo)
    with pytest.raises(RunError, match=f"found the prompt {PROMPTS[0]!r} without a picture"):
        policy.encode([PROMPTS[0]], SIZE)


@pytest.mark.parametrize("size", [Size(32, 32, 4), Size(32, 24, 5), Size(40, 32, 1)])
def test_sizes_that_the_vae_cannot_divide(experts, size):
    with pytest.raises(ValueError, match="accepted: multiples of 16, 4 n \\+ 1 frames"):
        experts.latent_shape(size)


# -- names of LoRA files ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("build", "cls"), [(wan.wan21, Wan), (wan.wan21_i2v, WanImageToVideo)])
def test_names_there_and_back(build, cls):
    policy = loaded(build, cls)
    adapter = Adapter(policy, LoraSettings(2, 2.0, "all linear layers"))
    tensors = dict(adapter.parameters)
    adapter.remove()
    written = names.to_file(tensors)
    assert len(written) == len(tensors) and names.from_file(written).keys() == tensors.keys()
    assert all(names.from_file(written)[name] is tensors[name] for name in tensors)
    assert names.split(tensors) == {"": tensors}


def test_each_expert_has_a_file():
    one, other = torch.zeros(1), torch.ones(1)
    assert names.split({"blocks.0.attn1.to_q.lora_A.weight": one, "transformer_2.blocks.0.attn1.to_q.lora_A.weight": other}) == {
        "_high_noise": {"blocks.0.attn1.to_q.lora_A.weight": one}, "_low_noise": {"blocks.0.attn1.to_q.lora_A.weight": other}}


@pytest.fixture
def both_files(experts, tmp_path):
    """A LoRA of both experts with other weights in each, and its files."""
    adapter = Adapter(experts, LoraSettings(2, 2.0, "attention"))
    tensors = {name: torch.randn(p.shape, generator=generator("experts", name)) for name, p in adapter.parameters.items()}
    adapter.remove()
    snapshot = LoraSnapshot(tensors, adapter.settings, experts.name, experts.lora_layout, 3, False, None)
    return snapshot, files.save(snapshot, tmp_path / "tuned.safetensors")


def test_either_file_brings_both_experts_back(experts, both_files):
    snapshot, paths = both_files
    for path in paths:
        loaded = files.load(path, experts)
        assert loaded.settings == snapshot.settings and loaded.tensors.keys() == snapshot.tensors.keys()
        assert all(torch.equal(value, snapshot.tensors[name]) for name, value in loaded.tensors.items())


def test_one_of_the_two_files_alone_is_refused_in_one_line(experts, both_files):
    snapshot, (high, low) = both_files
    line = "is of the expert {} alone, and its other half is not at .*{}; accepted: two files in one folder, .*_high_noise.safetensors and _low_noise"
    high.rename(high.with_name("away"))
    with pytest.raises(RunError, match=line.format("low_noise", "tuned_high_noise.safetensors")):
        files.load(low, experts)
    renamed = low.rename(low.with_name("mine.safetensors"))
    low.write_bytes(renamed.read_bytes())
    with pytest.raises(RunError, match=line.format("low_noise", "mine_high_noise.safetensors")):
        files.load(renamed, experts)
    (other,) = files.save(dataclasses.replace(snapshot, iterations=4), high.with_name("tuned.safetensors"))[:1]
    low.write_bytes(renamed.read_bytes())
    assert other == high
    with pytest.raises(RunError, match="were not saved together"):
        files.load(high, experts)
    with pytest.raises(RunError, match="it is of the expert low_noise alone, and the policy has 1$"):
        files.load(low, loaded(wan.wan21))


def test_the_file_of_a_model_of_one_expert_is_not_loaded_into_one_of_two(experts, both_files, tmp_path):
    snapshot, _ = both_files
    first = {name: value for name, value in snapshot.tensors.items() if not name.startswith(names.LOW)}
    (path,) = files.save(dataclasses.replace(snapshot, tensors=first), tmp_path / "one.safetensors")
    with pytest.raises(RunError, match="it is of a model of one expert, and the policy has 2$"):
        files.load(path, experts)
    assert files.load(path, loaded(wan.wan21)).tensors.keys() == first.keys()


def test_a_name_of_another_layout_is_refused():
    with pytest.raises(KeyError, match="transformer.x"):
        names.from_file({"transformer.x": torch.zeros(1)})
