"""Each transition against float64 closed forms written here from the papers, and against diffusers' own schedulers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from comfy_dancegrpo.grpo.gaussian import Gaussian, log_prob
from comfy_dancegrpo.grpo.transitions import TRANSITIONS

SHAPE = (3, 5, 4)
CLOSE = dict(rtol=0, atol=1e-10)


def draws(count, seed=0):
    source = np.random.default_rng(seed)
    return [source.standard_normal(SHAPE) for _ in range(count)]


def step(name, x, output, level, level_next, eta):
    """The transition at one level for each row: mean, std and x0 as float64 arrays of the full shape."""
    tensors = [torch.tensor(a, dtype=torch.float64) for a in (x, output)]
    levels = [torch.tensor(a, dtype=torch.float64).expand(len(x)).view(-1, 1, 1) for a in (level, level_next)]
    gaussian = TRANSITIONS[name].step(*tensors, *levels, eta)
    return [np.broadcast_to(t.numpy(), x.shape) for t in (gaussian.mean, gaussian.std, gaussian.x0)], gaussian


def assert_all_close(found, expected):
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, np.broadcast_to(b, a.shape), **CLOSE)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sigma, sigma_next", [(1.0, 0.9), (0.7, 0.45), (0.2, 0.05), (0.1, 0.0)])
def test_dance_sde(sigma, sigma_next, eta):
    x, v = draws(2)
    # x = (1 - sigma) x0 + sigma x1, v = x1 - x0; the score of N((1 - sigma) x0, sigma^2) is -x1 / sigma
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    h = sigma - sigma_next
    expected = x - h * v - eta**2 / 2 * h * x1 / sigma, eta * math.sqrt(h), x0
    assert_all_close(step("dance_sde", x, v, sigma, sigma_next, eta)[0], expected)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("abar, abar_next", [(0.005, 0.05), (0.3, 0.6), (0.9, 0.99), (0.97, 1.0)])
def test_ddim(abar, abar_next, eta):
    x, eps = draws(2, seed=1)
    x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    variance = eta**2 * (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
    mean = math.sqrt(abar_next) * x0 + math.sqrt(1 - abar_next - variance) * eps
    assert_all_close(step("ddim", x, eps, abar, abar_next, eta)[0], (mean, math.sqrt(variance), x0))


def test_ddim_at_eta_1_is_the_posterior_of_the_forward_process():
    """q(x_prev | x_t, x0) of DDPM (arXiv 2006.11239, eq. 6 and 7)."""
    (x, eps), abar, abar_next = draws(2, seed=2), 0.4, 0.55
    alpha = abar / abar_next
    x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    mean = (math.sqrt(abar_next) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - abar_next) * x) / (1 - abar)
    std = math.sqrt((1 - abar_next) / (1 - abar) * (1 - alpha))
    assert_all_close(step("ddim", x, eps, abar, abar_next, 1.0)[0], (mean, std, x0))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("index", [0, 4, 9])
def test_ddim_is_that_of_diffusers(index, eta):
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(10)
    t = int(scheduler.timesteps[index])
    before = scheduler.alphas_cumprod[t].item()
    after = scheduler.alphas_cumprod[t - 100].item() if t >= 100 else 1.0
    x, eps, noise = draws(3, seed=3)
    theirs = scheduler.step(torch.tensor(eps), t, torch.tensor(x), eta=eta, variance_noise=torch.tensor(noise))
    (mean, std, x0), _ = step("ddim", x, eps, before, after, eta)
    assert_all_close((mean + std * noise, x0), (theirs.prev_sample.numpy(), theirs.pred_original_sample.numpy()))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ode_is_that_of_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6))
    t = np.linspace(1, 0, 7)
    np.testing.assert_allclose(scheduler.sigmas, shift * t / (1 + (shift - 1) * t), rtol=0, atol=1e-6)
    x = draws(1)[0]
    for index, v in enumerate(draws(6, seed=4)):
        before, after = scheduler.sigmas[index].item(), scheduler.sigmas[index + 1].item()
        theirs = scheduler.step(torch.tensor(v), scheduler.timesteps[index], torch.tensor(x)).prev_sample.numpy()
        (mean, std, x0), _ = step("ode", x, v, before, after, eta=0.5)
        np.testing.assert_allclose(mean, theirs, rtol=0, atol=1e-6)  # the scheduler computes in float32
        assert_all_close((mean, std, x0), (x + (after - before) * v, 0.0, x - before * v))
        x = mean


def test_dance_sde_without_noise_is_the_ode():
    (x, v), levels = draws(2), (0.8, 0.55)
    assert_all_close(step("dance_sde", x, v, *levels, 0.0)[0], step("ode", x, v, *levels, 0.0)[0])


def test_each_row_has_its_own_levels():
    x, v = draws(2)
    before, after = [1.0, 0.6, 0.2], [0.8, 0.5, 0.0]
    (mean, _, _), _ = step("dance_sde", x, v, before, after, 0.4)
    for row in range(3):
        (alone, _, _), _ = step("dance_sde", x[row:row + 1], v[row:row + 1], before[row], after[row], 0.4)
        assert_all_close([mean[row:row + 1]], [alone])


@pytest.mark.parametrize("name, level, level_next", [("dance_sde", 0.8, 0.6), ("ddim", 0.2, 0.5)])
def test_log_prob(name, level, level_next):
    x, output, noise = draws(3, seed=5)
    (mean, std, _), gaussian = step(name, x, output, level, level_next, 0.5)
    x_next = mean + 1.3 * std * noise
    found = log_prob(torch.tensor(x_next), gaussian)
    densities = np.log(np.exp(-0.5 * ((x_next - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi)))
    assert found.dtype == torch.float64 and found.shape == (3,)
    np.testing.assert_allclose(found.numpy(), densities.reshape(3, -1).mean(1), **CLOSE)
    theirs = torch.distributions.Normal(gaussian.mean, gaussian.std).log_prob(torch.tensor(x_next)).mean((1, 2))
    torch.testing.assert_close(found, theirs, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_log_prob_is_computed_in_float32_at_least(dtype):
    mean, x_next = (torch.tensor(a).to(dtype) for a in draws(2, seed=6))
    std = torch.full((3, 1, 1), 0.25, dtype=dtype)
    found = log_prob(x_next, Gaussian(mean, std, mean))
    exact = torch.distributions.Normal(mean.double(), std.double()).log_prob(x_next.double()).mean((1, 2))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)  # bf16 arithmetic would be 1e-2 away


# -- the Gaussian toy: data N(m, s^2), whose velocity field is known, so that a chain's mean and variance are a recursion ---------
def chain(eta, steps, m=0.7, s=0.5):
    """Mean and variance after `steps` of dance_sde with the exact velocity, from N(0, 1) down to sigma 0.02 (the score of the
    last step divides by sigma^2).

    x_sigma = (1 - sigma) x0 + sigma x1 is N((1 - sigma) m, (1 - sigma)^2 s^2 + sigma^2), and the velocity is E[x1 - x0 | x_sigma],
    linear in x. So is a step's mean: a and b are read off it at x = 0 and x = 1.
    """
    mean, variance = 0.0, 1.0
    sigmas = np.linspace(1, 0.02, steps + 1)
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        x = np.array([[[0.0]], [[1.0]]])
        spread = (1 - sigma) ** 2 * s**2 + sigma**2
        velocity = -m + (sigma - (1 - sigma) * s**2) / spread * (x - (1 - sigma) * m)
        (line, std, _), _ = step("dance_sde", x, velocity, sigma, sigma_next, eta)
        a, b = line[1].item() - line[0].item(), line[0].item()
        mean, variance = a * mean + b, a**2 * variance + std[0].item() ** 2
    return mean, variance


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_sde_keeps_the_marginals_of_the_flow(eta):
    m, s, end = 0.7, 0.5, 0.02
    exact = np.array([(1 - end) * m, (1 - end) ** 2 * s**2 + end**2])
    errors = [np.abs(np.array(chain(eta, steps)) - exact).max() for steps in (250, 500, 1000)]
    assert errors[-1] < 2e-3
    assert errors[0] / errors[1] > 1.7 and errors[1] / errors[2] > 1.7  # and shrinks as the steps do: first order
