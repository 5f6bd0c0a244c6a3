"""Group-relative advantages against numpy in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from comfy_dancegrpo.grpo.advantages import combine, group_advantages
from comfy_dancegrpo.grpo.protocol import Scores


def normalised(values):
    values = np.asarray(values, dtype=np.float64)
    return (values - values.mean()) / (values.std(ddof=1) + 1e-8)


def scores(groups, *columns):
    """Scores of a rollout of which nothing but its groups is looked at; columns are (weight, values)."""
    rollout = SimpleNamespace(groups=torch.tensor(groups), size=len(groups))
    return Scores(rollout, tuple((f"r{k}", weight, torch.tensor(values)) for k, (weight, values) in enumerate(columns)))


def test_each_group_by_itself_in_any_order():
    groups, values = torch.tensor([1, 0, 1, 0, 0]), torch.tensor([3.0, 10.0, 5.0, 11.0, 15.0])
    advantages, flat, std = group_advantages(values, groups)
    expected = np.empty(5)
    expected[[1, 3, 4]], expected[[0, 2]] = normalised([10, 11, 15]), normalised([3, 5])
    np.testing.assert_allclose(advantages, expected, atol=1e-6)
    np.testing.assert_allclose(std, [np.std([10, 11, 15], ddof=1), np.std([3, 5], ddof=1)], rtol=1e-6)
    assert not flat.any()


@pytest.mark.parametrize("offset, spread", [(0.0, 1.0), (1000.0, 0.5), (-30000.0, 1.0)])
def test_large_values_lose_nothing(offset, spread):
    values = torch.tensor(offset + spread * np.random.default_rng(0).standard_normal(8), dtype=torch.float32)
    advantages, flat, _ = group_advantages(values, torch.zeros(8, dtype=torch.int64))
    assert not flat.any()
    np.testing.assert_allclose(advantages, normalised(values.numpy()), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("values, is_flat", [
    ([0.3, 0.3, 0.3], True), ([0.0, 0.0, 0.0], True), ([1e6, 1e6, 1e6 + 0.5], True), ([0.3, 0.3, 0.3 + 1e-7], True),
    ([0.3, 0.3, 0.30001], False), ([1e6, 1e6, 1e6 + 10], False),
])
def test_a_group_without_spread_is_flat(values, is_flat):
    advantages, flat, _ = group_advantages(torch.tensor(values), torch.zeros(3, dtype=torch.int64))
    assert flat.tolist() == [is_flat] and bool((advantages == 0).all()) is is_flat


def test_the_limit_of_flatness():
    """std <= 1e-6 (1 + |mean|): two values m -+ h have std sqrt(2) h."""
    for factor, is_flat in ((0.98, True), (1.02, False)):
        h = factor * 1e-6 * (1 + 2.0) / np.sqrt(2)
        _, flat, _ = group_advantages(torch.tensor([2 - h, 2 + h], dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
        assert flat.tolist() == [is_flat]


def test_rewards_are_normalised_before_they_are_weighted():
    groups = [0, 0, 0, 1, 1, 1]
    small, large = [0.1, 0.2, 0.4, 0.5, 0.1, 0.2], [100.0, 900.0, 300.0, 700.0, 200.0, 400.0]
    found = combine(scores(groups, (0.5, small), (2.0, large)))
    expected = np.concatenate([0.5 * normalised(small[k:k + 3]) + 2.0 * normalised(large[k:k + 3]) for k in (0, 3)])
    np.testing.assert_allclose(found.values, expected, atol=1e-5)
    assert found.group_std == pytest.approx(np.mean([np.std(small[:3], ddof=1), np.std(small[3:], ddof=1)]), rel=1e-5)
    assert found.values.dtype == torch.float32


def test_clamped_after_the_sum():
    values = [0.0] * 49 + [1.0]  # the last is 6.9 standard deviations out
    found = combine(scores([0] * 50, (1.0, values))).values
    assert normalised(values)[-1] > 5 and found[-1] == 5.0
    np.testing.assert_allclose(found[:-1], normalised(values)[:-1], atol=1e-6)
    assert combine(scores([0] * 50, (-1.0, values))).values[-1] == -5.0
    assert combine(scores([0, 0], (9.0, [0.0, 1.0])), clamp=2.0).values.tolist() == [-2.0, 2.0]
    halves = combine(scores([0] * 50, (1.0, values), (-1.0, values)))  # the sum is clamped, not each term
    assert halves.values.abs().max() < 1e-6


def test_a_group_is_flat_when_every_reward_that_counts_is():
    groups, spread, none = [0, 0, 1, 1], [0.1, 0.9, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3]
    assert combine(scores(groups, (1.0, spread))).flat.tolist() == [False, True]
    assert combine(scores(groups, (1.0, none), (1.0, spread))).flat.tolist() == [False, True]
    assert combine(scores(groups, (1.0, none), (0.0, spread))).flat.tolist() == [True, True]
    assert combine(scores(groups, (1.0, none))).values.tolist() == [0.0] * 4
