"""The optimizers by name: each trains, is resumed bit for bit, or says in one line which package it wants."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from comfy_dancegrpo import nodes
from comfy_dancegrpo.grpo import optimizers
from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings

INSTALLED = [name for name in optimizers.OPTIMIZERS if optimizers.problem(name) is None]


def learner_of(name, seed=0, ema_decay=0.9):
    source = torch.Generator().manual_seed(seed)
    parameters = {"a.lora_A.weight": (4, 6), "b.lora_B.weight": (6, 4), "bias": (5,)}  # matrices and a vector, which adafactor treats apart
    made = {key: torch.nn.Parameter(torch.randn(shape, generator=source)) for key, shape in parameters.items()}
    return Learner(None, made, OptimizerSettings(learning_rate=1e-2, ema_decay=ema_decay, name=name), "run")


def train(learner, first, count):
    for step in range(first, first + count):
        source = torch.Generator().manual_seed(100 + step)
        for p in learner.parameters.values():
            p.grad = torch.randn(p.shape, generator=source)
        learner.optimizer_step()
        learner.finish_iteration()


def test_those_that_come_with_the_requirements_are_installed():
    assert {"adamw", "adafactor"} <= set(INSTALLED)


@pytest.mark.parametrize("name", INSTALLED)
def test_resumed_is_never_interrupted(name):
    whole, first, other = learner_of(name), learner_of(name), learner_of(name, seed=1)
    train(whole, 0, 6)
    train(first, 0, 3)
    train(other, 0, 2)  # with a state of its own, which must not survive
    saved = first.state()
    before = {key: value.clone() for key, value in saved.items()}
    other.load_state(saved)
    train(other, 3, 3)
    state = other.state()
    assert state.keys() == whole.state().keys()
    assert all(torch.equal(value, state[key]) for key, value in whole.state().items())
    assert all(torch.equal(value, before[key]) for key, value in saved.items())  # what was loaded is not trained on
    assert not any(torch.equal(state[key], saved[key]) for key in saved if key.startswith("parameters."))


def test_optimizers_differ_and_their_state_too():
    made = {name: learner_of(name) for name in ("adamw", "adafactor")}
    for learner in made.values():
        train(learner, 0, 2)
    states = {name: learner.state() for name, learner in made.items()}
    assert not torch.equal(states["adamw"]["parameters.bias"], states["adafactor"]["parameters.bias"])
    size = {name: sum(v.numel() for key, v in state.items() if key.startswith("optimizer.") and "lora_" in key) for name, state in states.items()}
    assert size["adafactor"] < size["adamw"] / 2  # a row and a column in place of two matrices


def test_a_state_of_an_older_version_is_read():
    first, other = learner_of("adamw"), learner_of("adamw", seed=1)
    train(first, 0, 2)
    other.load_state({key: value for key, value in first.state().items() if key != "optimizer"})
    train(first, 2, 1), train(other, 2, 1)
    assert all(torch.equal(value, other.state()[key]) for key, value in first.state().items())


@pytest.mark.parametrize("device, fused", [("cuda", True), ("cpu", None), ("mps", None)])
def test_adamw_is_fused_on_cuda_alone(device, fused, monkeypatch):
    """There is no GPU here: what stands in for a parameter has a device alone, and for AdamW what it is asked for."""
    asked = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **options: asked.append(options))
    optimizers.make("adamw", [SimpleNamespace(device=torch.device(device))] * 2, OptimizerSettings())
    optimizers.make("adamw", [SimpleNamespace(device=torch.device(device)), SimpleNamespace(device=torch.device("cpu"))], OptimizerSettings())
    assert [options.get("fused") for options in asked] == [fused, None]


@pytest.mark.parametrize("fused_first", [True, False])
def test_a_run_goes_on_with_the_kernels_of_its_device(fused_first, monkeypatch):
    """torch has a fused AdamW for CPUs too, which stands in for that of a GPU; AdamW itself (arXiv 1711.05101, algorithm 2) is computed beside it in float64."""
    make = torch.optim.AdamW

    def of(fused):
        monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **options: make(parameters, **options, **({"fused": True} if fused else {})))
        return learner_of("adamw", ema_decay=0.0)

    first, other = of(fused_first), of(not fused_first)
    train(first, 0, 3)
    other.load_state(first.state())
    assert [bool(learner.optimizer.param_groups[0]["fused"]) for learner in (first, other)] == [fused_first, not fused_first]
    train(other, 3, 3)
    s, x = other.settings, learner_of("adamw").parameters["bias"].detach().double()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(6):
        source = torch.Generator().manual_seed(100 + step)
        g = [torch.randn(p.shape, generator=source) for p in other.parameters.values()][-1].double()
        m, v = s.betas[0] * m + (1 - s.betas[0]) * g, s.betas[1] * v + (1 - s.betas[1]) * g**2
        hats = m / (1 - s.betas[0] ** (step + 1)), v / (1 - s.betas[1] ** (step + 1))
        x = x - s.learning_rate * s.weight_decay * x - s.learning_rate * hats[0] / (hats[1].sqrt() + 1e-8)
    assert (other.parameters["bias"].double() - x).abs().max() < 1e-6


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check = nodes.NODE_CLASS_MAPPINGS["DanceGRPOLoopStart"].VALIDATE_INPUTS
    assert check("run", "prodigy") == 'input "optimizer": found \'prodigy\', which needs prodigyopt; pip install prodigyopt, or choose another'
    assert check("run", "adamw") is True and check("run") is True
    assert "found 'sgd', accepted: 'adamw'" in check("run", "sgd")
    with pytest.raises(ValueError, match="needs bitsandbytes"):
        learner_of("adamw_8bit")
