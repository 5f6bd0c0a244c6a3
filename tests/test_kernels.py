"""Attention backends and compiled blocks: chosen by Load Policy, the same in rollout and training, and refused in one line where they cannot be had."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from comfy_dancegrpo import policies, processes
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings
from comfy_dancegrpo.grpo.protocol import Column, SamplingPlan, Scores, Size
from comfy_dancegrpo.grpo.rollout import Request, sample
from comfy_dancegrpo.grpo.update import UpdateSettings, update
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings
from comfy_dancegrpo.policies import kernels
from comfy_dancegrpo.runs.prompt_cache import encode

SIZE, PROMPTS = Size(32, 32), ("a large red circle in the center on a white background", "a small blue star")


class Recorder(Learner):
    def optimizer_step(self):
        self.gradients = {name: p.grad.clone() for name, p in self.parameters.items()}
        super().optimizer_step()


def iteration(policy, checkpointing=False, at_last=lambda rollout: None):
    """(gradients by parameter, statistics, rollout) of one iteration with a LoRA that is not at its start; `at_last` is called while it is attached."""
    adapter = Adapter(policy, LoraSettings(4, 4.0, "attention and feed-forward"))
    policy.checkpoint_gradients(checkpointing)
    try:
        source = torch.Generator().manual_seed(3)
        for p in adapter.parameters.values():
            p.data.add_(torch.randn(p.shape, generator=source) * 0.05)
        learner = Recorder(policy, adapter.parameters, OptimizerSettings(), "run")
        plan = SamplingPlan(policy.time_grid(3, 3.0, SIZE), "dance_sde", 0.7, 3.5, SIZE)
        request = Request(PROMPTS, 2, policy.latent_shape(SIZE), seed=1, iteration=0, micro_batch=4)
        rollout = sample(policy, request, encode(policy, PROMPTS, SIZE), plan, learner.version)
        stats = update(learner, combine(Scores(rollout, (Column("toy", 1.0, torch.arange(float(rollout.size))),))), UpdateSettings(train_fraction=1.0))
        at_last(rollout)
        return learner.gradients, stats, rollout
    finally:
        policy.checkpoint_gradients(False)
        adapter.remove()


def distance(found, expected):
    found, expected = (torch.cat([tensors[name].double().flatten() for name in sorted(expected)]) for tensors in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def plain():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield iteration(policies.load("embedded"))
    torch.set_num_threads(before)


# -- attention ------------------------------------------------------------------------------------------------------------------------
def test_the_names_are_diffusers_own():
    from diffusers.models.attention_dispatch import AttentionBackendName

    assert {*kernels.BACKENDS} - {kernels.DEFAULT} <= {name.value for name in AttentionBackendName}


def test_a_chosen_attention_computes_the_same_in_another_way(one_thread, plain, monkeypatch):
    """The processors have it, other models' do not, and the ratio stays one."""
    from diffusers.models import attention_dispatch

    before, calls = attention_dispatch._AttentionBackendRegistry.get_active_backend(), []
    policy = policies.load("embedded", attention_backend="_native_math")
    backends = attention_dispatch._AttentionBackendRegistry._backends
    math = backends[attention_dispatch.AttentionBackendName._NATIVE_MATH]
    monkeypatch.setitem(backends, attention_dispatch.AttentionBackendName._NATIVE_MATH, lambda *a, **k: calls.append(1) or math(*a, **k))
    gradients, stats, rollout = iteration(policy)
    assert calls and stats.ratio_deviation == 0.0
    assert 0 < distance(gradients, plain[0]) < 1e-4  # other kernels, the same function
    assert (rollout.pictures - plain[2].pictures).abs().max() < 1e-4
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend() == before
    calls.clear()
    iteration(policies.load("embedded"))
    assert not calls


@pytest.mark.parametrize("name, said", [("flash", "flash-attn"), ("_native_efficient", "cpu in float32"), ("sage", "accepted: 'default', 'native'")])
def test_what_cannot_be_had_is_one_line(name, said):
    with pytest.raises(RunError) as raised:
        policies.load("embedded", attention_backend=name)
    line = str(raised.value)
    print(f"\n{line}")
    assert line.startswith(f'input "attention_backend": found {name!r}') and said in line and "accepted: 'default'" in line and "\n" not in line


def test_a_kernel_without_a_backward_pass_is_refused(monkeypatch):
    from diffusers.models import attention_dispatch

    backends, name = attention_dispatch._AttentionBackendRegistry._backends, attention_dispatch.AttentionBackendName._NATIVE_MATH
    monkeypatch.setitem(backends, name, lambda query, key, value, **rest: query + key.detach() + value)
    with pytest.raises(RunError, match="it has no backward pass; accepted: 'default'"):
        policies.load("embedded", attention_backend=name.value)


def test_a_family_whose_attention_is_its_own_says_so():
    with pytest.raises(RunError, match=r"accepted by 'embedded_diffusion': 'default', since UNet2DConditionModel does not let it be chosen"):
        policies.load("embedded_diffusion", attention_backend="native")


# -- compiled blocks -------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def compiler():
    """A backend that runs what it is given, counts it by kind, and rounds otherwise where no gradient is asked for, as real ones may."""
    made = {"forward": 0, "backward": 0, "inference": 0}

    def of(kind):
        def compile(graph, inputs):
            made[kind] += 1
            graph.recompile()
            if kind != "inference":
                return graph.forward
            return lambda *arguments: [value * (1 + 1e-5) if torch.is_tensor(value) and value.is_floating_point() else value for value in graph.forward(*arguments)]

        return make_boxed_func_of(compile)

    def make_boxed_func_of(compile):
        from functorch.compile import make_boxed_func

        return lambda graph, inputs: make_boxed_func(compile(graph, inputs))

    torch._dynamo.reset()
    yield aot_autograd(fw_compiler=of("forward"), bw_compiler=of("backward"), inference_compiler=of("inference")), made
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_compiled_function_in_rollout_and_training(one_thread, plain, compiler, checkpointing):
    backend, made = compiler
    policy = policies.load("embedded")
    kernels.compile_blocks(policy, backend)
    made["inference"] = 0  # of the trial, which asks for no gradient

    def without_gradient(rollout):
        """The planted fault: a rollout that takes the function without a gradient differs."""
        def predict():
            with torch.no_grad():
                rows = rollout.groups
                return policy.predict(rollout.states[:, 0], rollout.plan.grid.timesteps[:1].expand(len(rows)), rollout.conditioning.rows(rows), rollout.plan)

        made["in rollout"] = made["inference"]
        right, policy.compiled = predict(), False
        assert not torch.equal(right, predict()) and made["inference"] > made["in rollout"]

    gradients, stats, rollout = iteration(policy, checkpointing, (lambda rollout: None) if checkpointing else without_gradient)
    blocks = {type(block) for denoiser in policy.denoisers.values() for block in denoiser.modules() if type(block).__name__ in denoiser._repeated_blocks}
    assert made["forward"] >= len(blocks) and made["backward"] >= len(blocks) and made.get("in rollout", made["inference"]) == 0
    assert stats.ratio_deviation == 0.0 and not rollout.states.requires_grad
    assert distance(gradients, plain[0]) < 1e-5 and (rollout.pictures - plain[2].pictures).abs().max() < 1e-5


def test_a_batch_of_another_size_leaves_the_runs_own_kernels_alone(compiler):
    """Nothing is made for sizes in general, which would take the place of what the rollout was drawn with."""
    backend, made = compiler
    policy = policies.load("embedded")
    kernels.compile_blocks(policy, backend)
    plan = SamplingPlan(policy.time_grid(3, 3.0, SIZE), "dance_sde", 0.7, 3.5, SIZE)
    conditioning = encode(policy, PROMPTS, SIZE)

    def predict(rows):
        before = sum(made.values())
        x = torch.randn(rows, *policy.latent_shape(SIZE), generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            policy.predict(x, plan.grid.timesteps[:1].expand(rows), conditioning.rows(torch.zeros(rows, dtype=torch.int64)), plan)
        return sum(made.values()) - before

    assert predict(2) > 0 and predict(3) > 0
    assert predict(2) == predict(3) == 0


def test_compile_is_refused_in_one_line(monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no compiler\nand advice")

    policy = policies.load("embedded")
    with pytest.raises(RunError, match=r'^input "compile": found true, which cannot be had on cpu here: .*; accepted: false$') as raised:
        kernels.compile_blocks(policy, fails)
    assert "no compiler" in str(raised.value) and not policy.compiled
    monkeypatch.setattr(type(policy.denoiser), "_repeated_blocks", [])
    with pytest.raises(RunError, match="accepted by 'embedded': false, since diffusers names no blocks of FluxTransformer2DModel"):
        kernels.compile_blocks(policy, fails)
    monkeypatch.setattr(processes, "sharded", lambda: True)
    with pytest.raises(RunError, match="accepted where processes share the weights"):
        kernels.compile_blocks(policy, fails)
    torch._dynamo.reset()
