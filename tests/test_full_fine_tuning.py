"""Full fine-tuning: all weights train, the base comes back bit for bit, and diffusers loads what was saved."""

import dataclasses

import families
import pytest
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.grpo.protocol import Column, SamplingPlan, Scores, Size
from comfy_dancegrpo.grpo.rollout import Request, sample
from comfy_dancegrpo.grpo.update import UpdateSettings, update
from comfy_dancegrpo.lora import ALL_WEIGHTS, files, full
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings, applied, bare
from comfy_dancegrpo.lora.full import FullSettings, FullWeights
from comfy_dancegrpo.prompts import PromptList
from comfy_dancegrpo.runs import checkpoints
from comfy_dancegrpo.runs.evaluate import NOISELESS
from comfy_dancegrpo.runs.prompt_cache import encode
from comfy_dancegrpo.runs.session import LoopSettings, Session
from comfy_dancegrpo.workflow.host import Host, use
from safetensors.torch import load_file

SIZE, PROMPTS = Size(64, 64), ("a large red circle in the center on a white background", "a small blue star")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def policy(request):
    return policies.load("embedded", request.param)


def state(policy):
    return {name: value.clone() for name, value in policy.denoiser.state_dict().items()}


def values(trained):
    return {name: p.detach().clone() for name, p in trained.parameters.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def rollout_of(policy, version, iteration=0):
    plan = SamplingPlan(policy.time_grid(4, 3.0, SIZE), "dance_sde", 0.7, 3.5, SIZE)
    request = Request(PROMPTS, 2, policy.latent_shape(SIZE), seed=1, iteration=iteration, micro_batch=2)
    return sample(policy, request, encode(policy, PROMPTS, SIZE), plan, version)


def iteration(policy, learner):
    rollout = rollout_of(policy, learner.version, learner.version[1])
    return update(learner, combine(Scores(rollout, (Column("toy", 1.0, torch.arange(float(rollout.size))),))), UpdateSettings(train_fraction=1.0))


def learner_of(policy, trained, **more):
    return Learner(policy, trained.parameters, OptimizerSettings(learning_rate=1e-3, **more), "run", trained.written)


def test_every_weight_trains_and_the_base_comes_back(policy, one_thread):
    before = state(policy)
    trained = FullWeights(policy, FullSettings())
    try:
        assert trained.parameters.keys() == dict(policy.denoiser.named_parameters()).keys()
        assert all(p.dtype == torch.float32 for p in trained.parameters.values())
        learner = learner_of(policy, trained)
        stats = iteration(policy, learner)
        assert stats.ratio_deviation == 0.0 and stats.grad_norm > 0  # in bfloat16 too, where kernels round alike
        assert all(not torch.equal(p, before[name].float()) for name, p in trained.parameters.items())
        live = state(policy)
        assert all(torch.equal(live[name], p.detach().to(live[name].dtype)) for name, p in trained.parameters.items())  # it computes with what was trained
        assert iteration(policy, learner).ratio_deviation == 0.0
    finally:
        trained.remove()
    assert same(state(policy), before) and policy.full is None
    assert not any(p.requires_grad or p.grad is not None or p._post_accumulate_grad_hooks for p in policy.denoiser.parameters())


def test_the_gradient_of_half_precision_is_summed_in_float32(one_thread):
    """Against the gradients of the single micro-batches, summed here."""
    policy = policies.load("embedded", "bfloat16")
    trained, single = FullWeights(policy, FullSettings()), []
    name = "transformer_blocks.0.attn.to_q.weight"
    try:
        learner = learner_of(policy, trained)
        rollout = rollout_of(policy, learner.version)
        scores = combine(Scores(rollout, (Column("toy", 1.0, torch.arange(float(rollout.size))),)))
        policy.denoiser.get_parameter(name).register_hook(lambda gradient: single.append(gradient.clone()))
        learner.optimizer_step, found = lambda: None, {}
        update(learner, scores, UpdateSettings(train_fraction=1.0, max_grad_norm=1e9))
        found = trained.parameters[name].grad
    finally:
        trained.remove()
    assert len(single) == 5 and all(gradient.dtype == torch.bfloat16 for gradient in single)  # 2 groups share their first step: 10 inputs, by twos
    assert torch.equal(found, sum(gradient.float() for gradient in single))
    assert not torch.equal(found, sum(single).float())  # in bfloat16 it would be another


def test_a_run_stopped_and_resumed_ends_as_the_one_that_was_not(policy, tmp_path, one_thread):
    def run(folder, iterations, on_existing="new"):
        settings = LoopSettings(iterations=iterations, prompts_per_iteration=2, micro_batch=2, lora=FullSettings(), on_existing=on_existing,
                                optimizer=OptimizerSettings(learning_rate=1e-3, ema_decay=0.5))
        with use(Host(output=tmp_path / folder)), Session(policy, PromptList(PROMPTS), settings, "fingerprint") as session:
            while not session.ended:
                live, _, _ = session.begin()
                session.end(iteration(policy, live.learner))
            return session.snapshot(), session.folder

    before = state(policy)
    whole, folder = run("whole", 3)
    run("broken", 2)
    resumed, again = run("broken", 3, "resume")
    assert same(whole.tensors, resumed.tensors) and whole.digest() == resumed.digest() and whole.averaged
    one, other = (checkpoints.newest(f.checkpoints)[1] for f in (folder, again))
    assert same(one, other)
    assert same(state(policy), before) and not same(whole.tensors, before)
    second, _ = run("second queue", 3)
    assert second.digest() == whole.digest()


class Heard(Host):
    def __init__(self, **folders):
        super().__init__(**folders)
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def test_a_run_that_breaks_off_leaves_its_weights_and_the_base(policy, tmp_path):
    before, host = state(policy), Heard(output=tmp_path)
    settings = LoopSettings(iterations=3, prompts_per_iteration=2, micro_batch=2, lora=FullSettings())
    with use(host), pytest.raises(KeyboardInterrupt):
        with Session(policy, PromptList(PROMPTS), settings, "fingerprint") as session:
            session.end(iteration(policy, session.begin()[0].learner))
            kept = session.snapshot().tensors
            iteration(policy, session.begin()[0].learner)  # what is lost
            raise KeyboardInterrupt
    assert same(state(policy), before)
    file = tmp_path / "run" / "lora" / "run" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert same(load_file(file), kept) and not same(kept, before)
    assert any(f"weights so far in {file}" in line and line.startswith("stopped after iteration 1") for line in host.lines)


def test_base_and_snapshots_in_the_middle_of_a_training(policy):
    def picture():
        return sample_of(policy)

    base = picture()
    lora = Adapter(policy, LoraSettings(2, 4.0, "attention"))
    lora.load({name: torch.randn(p.shape, generator=generator("lora", name)) for name, p in lora.parameters.items()})
    with_lora, lora_snapshot = picture(), lora.snapshot(values(lora), 1, False, None, ())
    lora.remove()
    trained = FullWeights(policy, FullSettings())
    try:
        shake(trained)
        tuned = picture()
        snapshot = trained.snapshot(values(trained), 1, False, None, ())
        shake(trained)
        live = state(policy)
        with bare(policy):
            assert torch.equal(picture(), base)
        with applied(policy, snapshot):
            assert torch.equal(picture(), tuned)
        with applied(policy, lora_snapshot):
            assert torch.equal(picture(), with_lora)
        assert same(state(policy), live) and all(p.requires_grad for p in policy.denoiser.parameters())
        learner = learner_of(policy, trained)
        assert iteration(policy, learner).grad_norm > 0
    finally:
        trained.remove()
    adapter = Adapter(policy, LoraSettings(2, 4.0, "attention"))  # and in the middle of a LoRA's
    try:
        adapter.load(lora_snapshot.tensors)
        with applied(policy, snapshot):
            assert torch.equal(picture(), tuned)
        assert torch.equal(picture(), with_lora)
    finally:
        adapter.remove()
    assert torch.equal(picture(), base) and not torch.equal(tuned, base) and not torch.equal(with_lora, base)


def sample_of(policy, case=None):
    size, prompts = (case.size, case.prompts) if case else (SIZE, PROMPTS)
    steps, guidance = (case.steps, case.guidance_scale) if case else (3, 3.5)
    plan = SamplingPlan(policy.time_grid(steps, 0.0, size), NOISELESS[policy.process], 0.0, guidance, size)
    request = Request(prompts, 1, policy.latent_shape(size), seed=1, iteration=0, shared_noise=False, micro_batch=len(prompts))
    return sample(policy, request, encode(policy, prompts, size), plan, ("run", 0), record=False).pictures


def shake(trained):
    trained.load({name: p.detach() + torch.randn(p.shape, generator=generator("shake", name)) * 0.02 * p.detach().abs().mean()
                  for name, p in trained.parameters.items()})


def test_it_starts_from_a_lora_or_from_other_weights(policy):
    settings, base = LoraSettings(4, 8.0, "all linear layers"), sample_of(policy)
    lora = settings.attach(policy, seed=3)
    lora.load({name: torch.randn(p.shape, generator=generator("start", name)) * 0.1 for name, p in lora.parameters.items()})
    expected = sample_of(policy)
    snapshot = lora.snapshot(values(lora), 1, False, None, ())
    lora.remove()
    trained = FullSettings().starting_from(snapshot).attach(policy)
    try:
        trained.start_from(snapshot)
        rounding = 1e-5 if policy.dtype == torch.float32 else 0.05
        assert (sample_of(policy) - expected).abs().max() < rounding < (expected - base).abs().max()
        assert all(p.requires_grad for p in policy.denoiser.parameters())
        merged, weights = sample_of(policy), trained.snapshot(values(trained), 1, False, None, ())
    finally:
        trained.remove()
    trained = FullSettings().starting_from(weights).attach(policy)
    try:
        trained.start_from(weights)
        assert torch.equal(sample_of(policy), merged)
    finally:
        trained.remove()
    with pytest.raises(ValueError, match="a LoRA on 'all linear layers' cannot start from weights of a full fine-tuning, accepted: a LoRA; "):
        settings.starting_from(weights)


def test_what_does_not_fit_is_one_line(policy):
    trained = FullWeights(policy, FullSettings())
    try:
        snapshot = trained.snapshot(values(trained), 1, False, None, ())
        name = min(snapshot.tensors)
        fewer = {n: v for n, v in snapshot.tensors.items() if n != name}
        for tensors, said in ((fewer, f"1 names differ, such as '{name}'"), ({**fewer, name: torch.zeros(1, 1)}, rf"{name} is \[1, 1\] in the one and")):
            with pytest.raises(ValueError, match=f"the weights do not fit this policy: {said}"):
                trained.load(tensors)
            with pytest.raises(ValueError, match=said), applied(policy, dataclasses.replace(snapshot, tensors=tensors)):
                pass
        with pytest.raises(ValueError, match="are in training already"):
            FullWeights(policy, FullSettings())
    finally:
        trained.remove()


@pytest.mark.parametrize("case", families.cases(), ids=lambda case: case.name)
def test_diffusers_loads_the_weights_of_every_family(case, tmp_path):
    with case.within():
        pipeline = case.build()
        pipeline.save_pretrained(tmp_path / "diffusers" / case.name)
        with use(Host(models=tmp_path)):
            policy = policies.load(case.name)
        base = sample_of(policy, case)
        trained = FullWeights(policy, FullSettings())
        try:
            shake(trained)
            ours = sample_of(policy, case)
            snapshot = trained.snapshot(values(trained), 1, False, tmp_path, ())
            trained_state = {
                name: {key: value.clone() for key, value in module.state_dict().items()}
                for (name, _), module in zip(snapshot.components.values(), policy.denoisers.values())
            }
        finally:
            trained.remove()
        assert torch.equal(sample_of(policy, case), base) and (ours - base).abs().max() > 1e-4
        paths = files.save(snapshot, tmp_path / "tuned.safetensors")
        assert paths == [tmp_path / "tuned" / name / "diffusion_pytorch_model.safetensors" for name, _ in snapshot.components.values()]
        for (name, config), module in zip(snapshot.components.values(), policy.denoisers.values()):
            loaded, told = type(module).from_pretrained(tmp_path / "tuned" / name, output_loading_info=True)
            assert not any(told.values()), told
            assert str(tmp_path) not in config and dict(loaded.config, _name_or_path="") == dict(module.config, _name_or_path="")
            assert same(loaded.state_dict(), trained_state.pop(name))
            module.load_state_dict(loaded.state_dict())
        assert (sample_of(policy, case) - ours).abs().max() < 1e-5  # kernels may round by where a tensor lies in memory; the weights are equal bit for bit


def test_the_command_trains_them_and_load_policy_takes_the_file(cli, prompt, saved, tiny_loop, tmp_path):
    words = ("run", saved({k: v for k, v in prompt.items() if int(k) <= 11 and v["class_type"] != "PreviewImage"}), "--output", tmp_path / "output",
             *tiny_loop, "--set", f"Loop Start.lora_targets={ALL_WEIGHTS}", "--set", "Loop Start.learning_rate=1e-5")
    done = cli(*words)
    assert done.status == 0, done
    file = tmp_path / "output" / "quickstart" / "lora" / "quickstart" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert any(line.endswith(f"after 2 iterations: {file}") and "weights" in line for line in done.err), done.err
    base = policies.load("embedded")
    tensors = load_file(file)
    assert tensors.keys() == base.denoiser.state_dict().keys() and not same(tensors, base.denoiser.state_dict())
    models = tmp_path / "models"
    base.pipeline.save_pretrained(models / "diffusers" / "base")
    (models / "diffusion_models").mkdir()
    file.rename(models / "diffusion_models" / "tuned.safetensors")
    with use(Host(models=models)):
        assert same(policies.load("tuned.safetensors").denoiser.state_dict(), tensors)


def test_settings_of_the_inputs():
    assert full.settings(4, 8.0, "attention") == LoraSettings(4, 8.0, "attention") and full.settings(4, 8.0, ALL_WEIGHTS) == FullSettings()
