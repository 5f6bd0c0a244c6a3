"""Each transition against float64 closed forms written here from the papers, and against diffusers' own schedulers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from comfy_dancegrpo.grpo.gaussian import Gaussian, log_prob
from comfy_dancegrpo.grpo.transitions import TRANSITIONS

SHAPE = (3, 5, 4)
FLOWS = [t.name for t in TRANSITIONS.values() if t.process == "flow" and t.stochastic]
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


@pytest.mark.parametrize("a", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("sigma, sigma_next", [(1.0, 0.9), (0.7, 0.45), (0.2, 0.05), (0.1, 0.0)])
def test_flow_grpo_sde(sigma, sigma_next, a):
    x, v = draws(2, seed=7)
    dt = sigma_next - sigma
    level = a * math.sqrt(sigma / (1 - (sigma_next if sigma == 1 else sigma)))
    mean = x + (v + level**2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt  # arXiv 2505.05470, eq. 9
    assert_all_close(step("flow_grpo_sde", x, v, sigma, sigma_next, a)[0], (mean, level * math.sqrt(-dt), x - sigma * v))


@pytest.mark.parametrize("a", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("sigma, sigma_next", [(1.0, 0.9), (0.7, 0.45), (0.2, 0.05), (0.1, 0.0)])
def test_cps(sigma, sigma_next, a):
    x, v = draws(2, seed=8)
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    # what is left of the old noise and what is fresh are the two legs of a right triangle: cos and sin of a pi / 2
    mean = (1 - sigma_next) * x0 + sigma_next * math.cos(a * math.pi / 2) * x1
    assert_all_close(step("cps", x, v, sigma, sigma_next, a)[0], (mean, sigma_next * math.sin(a * math.pi / 2), x0))


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


def test_flow_grpo_at_sigma_1_and_at_what_schedulers_shave_off_it():
    """UniPC's grid begins at 1 - 1e-6, where a sqrt(sigma / (1 - sigma)) would be 700; the authors' code takes sigma 1 - 0.9 there."""
    x, v = draws(2, seed=9)
    (_, at_one, _), _ = step("flow_grpo_sde", x, v, 1.0, 0.9, 0.7)
    (_, below, _), _ = step("flow_grpo_sde", x, v, 1 - 1e-6, 0.9, 0.7)
    np.testing.assert_allclose(at_one, 0.7 * math.sqrt(1 / 0.1) * math.sqrt(0.1), **CLOSE)
    np.testing.assert_allclose(below, at_one, rtol=2e-5)


@pytest.mark.parametrize("name", FLOWS)
def test_without_noise_it_is_the_ode(name):
    (x, v), levels = draws(2), (0.8, 0.55)
    assert_all_close(step(name, x, v, *levels, 0.0)[0], step("ode", x, v, *levels, 0.0)[0])


@pytest.mark.parametrize("levels", [(1.0, 0.9), (0.7, 0.45), (0.2, 0.0)])
@pytest.mark.parametrize("name", [*FLOWS, "ddim"])
def test_rows_with_noise_and_rows_without_at_once(name, levels):
    """eta as a tensor: each row is, bit for bit, what it is alone with its own eta as a number."""
    if name == "ddim":
        levels = (0.2, 0.5)
    x, v = (torch.tensor(a, dtype=torch.float32) for a in draws(2))
    before, after = (torch.full((len(x), 1, 1), level, dtype=torch.float32) for level in levels)
    etas = torch.tensor([0.6, 0.0, 0.3], dtype=torch.float32).view(-1, 1, 1)
    found = TRANSITIONS[name].step(x, v, before, after, etas)
    for row, eta in enumerate([0.6, 0.0, 0.3]):
        alone = TRANSITIONS[name].step(x[row:row + 1], v[row:row + 1], before[row:row + 1], after[row:row + 1], etas[row:row + 1])
        number = TRANSITIONS[name].step(x[row:row + 1], v[row:row + 1], before[row:row + 1], after[row:row + 1], eta)
        std = torch.broadcast_to(found.std, (len(x), 1, 1))[row:row + 1]
        assert torch.equal(found.mean[row:row + 1], alone.mean) and torch.equal(std, alone.std) and found.mean.isfinite().all()
        assert bool((std == 0).all()) == (eta == 0 or levels[1] == 0 and name == "cps")
        torch.testing.assert_close(alone.mean, number.mean, rtol=1e-6, atol=1e-6)
        assert eta or torch.equal(alone.mean, number.mean)  # without noise there is no rounding between the two


def test_each_row_has_its_own_levels():
    x, v = draws(2)
    before, after = [1.0, 0.6, 0.2], [0.8, 0.5, 0.0]
    (mean, _, _), _ = step("dance_sde", x, v, before, after, 0.4)
    for row in range(3):
        (alone, _, _), _ = step("dance_sde", x[row:row + 1], v[row:row + 1], before[row], after[row], 0.4)
        assert_all_close([mean[row:row + 1]], [alone])


@pytest.mark.parametrize("name, level, level_next", [("dance_sde", 0.8, 0.6), ("flow_grpo_sde", 0.8, 0.6), ("cps", 0.8, 0.6), ("ddim", 0.2, 0.5)])
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
M, S = 0.7, 0.5
STEPS = (16, 64, 256, 1024)


def noise_and_data(sigma):
    """(a, b): E[x1 | x] = a u and E[x0 | x] = m + b u of x_sigma = (1 - sigma) x0 + sigma x1, u = x - (1 - sigma) m, by Bayes' rule."""
    spread = (1 - sigma) ** 2 * S**2 + sigma**2
    return sigma / spread, (1 - sigma) * S**2 / spread


def chain(name, eta, steps):
    """(mean, std) of what is decoded after `steps` of the transition itself with the exact velocity, from N(0, 1): the last step's x0.

    The velocity is E[x1 - x0 | x], linear in x, and so is a step's mean: its slope and height are read off at x = 0 and x = 1.
    """
    mean, variance = 0.0, 1.0
    sigmas = np.linspace(1, 0, steps + 1)
    for k, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        x = np.array([[[0.0]], [[1.0]]])
        noise, data = noise_and_data(sigma)
        velocity = -M + (noise - data) * (x - (1 - sigma) * M)
        (line, std, x0), _ = step(name, x, velocity, sigma, sigma_next, eta)
        line, added = (x0, 0.0) if k == steps - 1 else (line, std[0].item())
        slope, height = line[1].item() - line[0].item(), line[0].item()
        mean, variance = slope * mean + height, slope**2 * variance + added**2
    return mean, math.sqrt(variance)


def recursion(name, eta, steps):
    """The same std, from the papers' equations alone: a variance for each sigma, of u = x - (1 - sigma) m."""
    variance = 1.0
    for k in range(steps - 1):
        sigma, sigma_next, h = 1 - k / steps, 1 - (k + 1) / steps, 1 / steps
        noise, data = noise_and_data(sigma)
        if name == "cps":
            std = sigma_next * math.sin(eta * math.pi / 2)
            slope = (1 - sigma_next) * data + math.sqrt(sigma_next**2 - std**2) * noise
        else:
            level = eta if name == "dance_sde" else eta * math.sqrt(sigma / (h if k == 0 else 1 - sigma))
            slope = 1 - h * (noise - data) - level**2 / 2 * h * noise / sigma  # x - h v + level^2 / 2 h score, the score being -E[x1 | x] / sigma
            std = level * math.sqrt(h)
        variance = slope**2 * variance + std**2
    return noise_and_data(1 / steps)[1] * math.sqrt(variance)


def errors(name, eta):
    """By how much the std of what is decoded is off that of the data, signed, as a share of it."""
    return [chain(name, eta, steps)[1] / S - 1 for steps in STEPS]


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("name", FLOWS)
def test_a_chains_spread_is_the_discrete_recursion_and_its_mean_is_kept(name, eta):
    for steps in STEPS:
        mean, std = chain(name, eta, steps)
        assert mean == pytest.approx(M, abs=1e-12) and std == pytest.approx(recursion(name, eta, steps), rel=1e-12)


@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_dance_sde_keeps_the_marginals_of_the_flow_to_first_order(eta):
    found = errors("dance_sde", eta)
    assert abs(found[0]) < 0.08 and abs(found[-1]) < 0.0013
    for before, after in zip(found, found[1:]):
        assert before / after == pytest.approx(4, rel=0.03)  # a quarter of the step, a quarter of the error


@pytest.mark.parametrize("eta, rest", [(0.3, 0.0004), (0.7, 0.0023)])
def test_flow_grpo_sde_keeps_the_marginals_of_the_flow_but_for_what_its_first_steps_add(eta, rest):
    """The noise level diverges at sigma 1; the second sigma in its place leaves up to 0.2 % too much spread, whatever the number of steps."""
    found = errors("flow_grpo_sde", eta)
    assert found[0] < -10 * rest and abs(found[1]) < abs(found[0]) / 4 and max(map(abs, found[2:])) < max(rest, abs(found[1]) / 4)
    assert abs(found[-1]) < rest and 0 < found[-1]


def test_cps_keeps_the_noise_of_each_level_and_narrows_the_data(monkeypatch):
    """One picture alone is kept exactly, in any number of steps; a spread of them is not, however many (docs/algorithms.md)."""
    for eta, expected in ((0.3, (0.887, 0.948, 0.965, 0.970)), (0.7, (0.776, 0.826, 0.843, 0.849))):
        np.testing.assert_allclose(1 + np.array(errors("cps", eta)), expected, rtol=0, atol=5e-4)
    monkeypatch.setattr(f"{__name__}.S", 0.0)
    for steps in (2, 6, 50):
        assert chain("cps", 0.7, steps) == (pytest.approx(M, abs=1e-12), pytest.approx(0.0, abs=1e-12))
