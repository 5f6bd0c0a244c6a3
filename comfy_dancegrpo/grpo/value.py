"""A learned value of a prompt: the reward to be expected of it, as the baseline of an advantage (DPOK, arXiv 2305.16381; PPO's critic, arXiv 1707.06347).

V(p) = mean + spread f(z), f(z) = w2 . tanh(W1 z + b1) + b2, of the prompt's features z. mean and spread are those of the first scores that it saw, as
which it begins: w2 and b2 are 0. Everything is float64 on the CPU: each process computes the same, and a checkpoint keeps it to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .noise import generator
from .protocol import Conditioning

FEATURES, HIDDEN = 64, 32
STEPS, LEARNING_RATE = 20, 3e-3  # of Adam, at each iteration
EPSILON = 1e-3  # Adam's: with its usual 1e-8 a parameter whose gradient is rounding alone, as b1's by two prompts, would move as far as any

State = Mapping[str, Sequence[float]]
"""mean, spread, centre [FEATURES] and scale of the features, Adam's count of steps, and the parameters W1, b1, w2, b2 in a row with Adam's moments of them."""


def features(conditioning: Conditioning, seed: int) -> Tensor:
    """[P, FEATURES]: each sequence of embeddings [P, L, d], averaged over its tokens in float32, and each pooled embedding [P, d], of length sqrt(d),
    through a random projection of the seed's, which keeps distances (Johnson and Lindenstrauss) and is alike long for every family; summed.
    """
    tensors = conditioning.positive
    found = torch.zeros(len(next(iter(tensors.values()))), FEATURES, dtype=torch.float64)
    for name, value in tensors.items():
        if name == "mask" or value.ndim not in (2, 3) or not value.is_floating_point():
            continue
        pooled = (_over_tokens(value.float(), tensors.get("mask")) if value.ndim == 3 else value.float()).cpu().double()
        size = pooled.shape[1]
        pooled = pooled / pooled.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
        found += pooled @ torch.randn(size, FEATURES, dtype=torch.float64, generator=generator("value", seed, name)) / size**0.5
    return found


def _over_tokens(value: Tensor, mask: Tensor | None) -> Tensor:
    """[P, d]: the mean over L, without padding: zeros, which depend on the other prompts, and what a mask [P, L] leaves out."""
    words = value.ne(0).any(2)
    if mask is not None and mask.shape == words.shape:
        words = words & mask.bool()
    return (value * words[..., None]).sum(1) / words.sum(1, keepdim=True).clamp(min=1)


def begun(values: Tensor, z: Tensor, seed: int) -> State:
    """Before anything was learned, at the first scores [N] of prompts with features z [N, FEATURES]."""
    mean, spread, scale = values.mean().item(), values.std().item(), (z - z.mean(0)).square().mean().sqrt().item()
    weights = torch.randn(HIDDEN * FEATURES, dtype=torch.float64, generator=generator("value", seed)) / FEATURES**0.5
    parameters = torch.cat([weights, weights.new_zeros(2 * HIDDEN + 1)])
    none = [0.0] * len(parameters)
    return {"mean": [mean], "spread": [spread if spread > 1e-6 * (1 + abs(mean)) else 1.0], "centre": z.mean(0).tolist(),
            "scale": [scale if scale > 1e-6 else 1.0], "steps": [0], "parameters": parameters.tolist(), "first": none, "second": none}


def expected(state: State, z: Tensor) -> Tensor:
    """V [N] of prompts with features z."""
    kept = _tensors(state)
    return kept["mean"] + kept["spread"] * perceptron(kept["parameters"], (z - kept["centre"]) / kept["scale"])


def fitted(state: State, values: Tensor, z: Tensor) -> State:
    """After `STEPS` steps of Adam (arXiv 1412.6980, algorithm 1) on the mean square of V - values over the N scores."""
    kept = _tensors(state)
    parameters, first, second, steps = kept["parameters"], kept["first"], kept["second"], int(kept["steps"])
    wanted, z = (values - kept["mean"]) / kept["spread"], (z - kept["centre"]) / kept["scale"]
    for steps in range(steps + 1, steps + 1 + STEPS):
        slope = gradient(parameters, z, wanted)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        parameters = parameters - LEARNING_RATE * first / (1 - 0.9**steps) / ((second / (1 - 0.999**steps)).sqrt() + EPSILON)
    return {**state, "steps": [steps], "parameters": parameters.tolist(), "first": first.tolist(), "second": second.tolist()}


def perceptron(parameters: Tensor, z: Tensor) -> Tensor:
    """f [N] of z [N, FEATURES]."""
    w1, b1, w2, b2 = _parts(parameters)
    return (z @ w1.T + b1).tanh() @ w2 + b2


def gradient(parameters: Tensor, z: Tensor, wanted: Tensor) -> Tensor:
    """Of mean (f - wanted)^2 by the parameters, backwards by hand: no autograd, which nodes may not have on."""
    w1, b1, w2, b2 = _parts(parameters)
    hidden = (z @ w1.T + b1).tanh()
    error = 2 * (hidden @ w2 + b2 - wanted) / len(z)
    back = error[:, None] * w2 * (1 - hidden**2)
    return torch.cat([(back.T @ z).flatten(), back.sum(0), error @ hidden, error.sum()[None]])


def _parts(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w1, *rest = parameters.split([HIDDEN * FEATURES, HIDDEN, HIDDEN, 1])
    return w1.view(HIDDEN, FEATURES), *rest


def _tensors(state: State) -> dict[str, Tensor]:
    return {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in state.items()}
