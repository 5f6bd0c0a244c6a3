"""Group-relative advantages against numpy in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from comfy_dancegrpo.grpo.advantages import best_and_worst, combine, group_advantages
from comfy_dancegrpo.grpo.groups import NORMALISE_FIRST, SUM_FIRST
from comfy_dancegrpo.grpo.protocol import Column, Scores


def normalised(values):
    values = np.asarray(values, dtype=np.float64)
    return (values - values.mean()) / (values.std(ddof=1) + 1e-8)


def scores(groups, *columns):
    """Scores of a rollout of which nothing but its groups is looked at; columns are (weight, values)."""
    places = torch.tensor([groups[:row].count(group) for row, group in enumerate(groups)])
    rollout = SimpleNamespace(groups=torch.tensor(groups), indices=places)
    return Scores(rollout, tuple(Column(f"r{k}", weight, torch.tensor(values)) for k, (weight, values) in enumerate(columns)))


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


# -- several rewards ------------------------------------------------------------------------------------------------------------
def plainly(groups, columns, sum_first):
    """Advantages [N] in float64, without clamp, and which groups are flat, by Python's own sums."""
    def normalise(values, g):
        rows = [row for row, group in enumerate(groups) if group == g]
        mean = sum(values[row] for row in rows) / len(rows)
        std = (sum((values[row] - mean) ** 2 for row in rows) / (len(rows) - 1)) ** 0.5
        is_flat = std <= 1e-6 * (1 + abs(mean))
        return {row: 0.0 if is_flat else (values[row] - mean) / (std + 1e-8) for row in rows}, is_flat

    totals, flat = [0.0] * len(groups), []
    if sum_first:
        columns = [(1.0, [sum(weight * values[row] for weight, values in columns) for row in range(len(groups))])]
    for g in range(max(groups) + 1):
        parts = [(weight, *normalise(values, g)) for weight, values in columns]
        flat.append(all(is_flat or weight == 0 for weight, _, is_flat in parts))
        for weight, part, _ in parts:
            for row, value in part.items():
                totals[row] += weight * value
    return totals, flat


@pytest.mark.parametrize("combination", [NORMALISE_FIRST, SUM_FIRST])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, -2.0), (1.0, 0.0)])
def test_two_rewards_of_groups_of_any_size_and_order(combination, weights):
    source = np.random.default_rng(3)
    groups = [int(g) for g in source.permutation([0] * 2 + [1] * 5 + [2] * 7 + [3] * 4)]
    near_one, in_hundreds = source.random(18).astype(np.float32), (700 + 90 * source.standard_normal(18)).astype(np.float32)
    for row, group in enumerate(groups):
        if group == 3:
            near_one[row] = 0.625  # flat for one of the two
    columns = [(w, values.tolist()) for w, values in zip(weights, (near_one, in_hundreds))]
    found = combine(scores(groups, *columns), clamp=1000.0, combination=combination)
    expected, flat = plainly(groups, columns, combination == SUM_FIRST)
    np.testing.assert_allclose(found.values, expected, atol=5e-6)
    assert found.flat.tolist() == flat == [False, False, False, weights[1] == 0]
    assert found.trained.tolist() == [not flat[g] for g in groups]


def test_summed_first_the_units_of_the_rewards_count():
    """By hand: the sums are 1.03, 2.02 and 3.01, where the rewards normalised each, 1, 0, -1 and -1, 0, 1, cancel out."""
    small, large = [0.03, 0.02, 0.01], [1.0, 2.0, 3.0]
    both = scores([0, 0, 0], (1.0, small), (1.0, large))
    np.testing.assert_allclose(combine(both, combination=SUM_FIRST).values, [-1, 0, 1], atol=1e-5)
    np.testing.assert_allclose(combine(both).values, [0, 0, 0], atol=1e-5)


def test_summed_first_a_group_is_flat_when_its_sums_are():
    opposite = scores([0, 0, 1, 1], (1.0, [1.0, 2.0, 1.0, 2.0]), (1.0, [2.0, 1.0, 5.0, 7.0]))
    found = combine(opposite, combination=SUM_FIRST)
    assert found.flat.tolist() == [True, False] and found.trained.tolist() == [False, False, True, True]
    assert found.values.tolist()[:2] == [0.0, 0.0]
    assert combine(scores([0, 0], (0.0, [1.0, 2.0])), combination=SUM_FIRST).flat.tolist() == [True]


# -- best of N ------------------------------------------------------------------------------------------------------------------
def test_the_best_and_the_worst_of_a_group():
    """By hand: of 4, 1, 3, 0, 5, 2 the two largest are the 5th and the 1st, the two smallest the 4th and the 2nd."""
    values, zero = torch.tensor([4.0, 1.0, 3.0, 0.0, 5.0, 2.0]), torch.zeros(6, dtype=torch.int64)
    assert best_and_worst(values, zero, torch.arange(6), 4).tolist() == [True, True, False, True, True, False]
    assert best_and_worst(values, zero, torch.arange(6), 2).tolist() == [False, False, False, True, True, False]
    assert best_and_worst(values, zero, torch.arange(6), 6).all()


def test_the_best_and_the_worst_of_ties_do_not_depend_on_the_order_of_rows():
    values, groups = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 7.0, 8.0]), torch.tensor([0, 0, 0, 0, 0, 1, 1])
    indices = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    chosen = best_and_worst(values, groups, indices, 2)  # of equal ones the later is the larger
    assert chosen.tolist() == [False, False, True, True, False, True, True]
    order = torch.tensor([6, 3, 1, 4, 0, 5, 2])
    assert torch.equal(best_and_worst(values[order], groups[order], indices[order], 2), chosen[order])


def test_they_are_chosen_by_what_all_rewards_make_of_them_before_the_clamp_and_compared_with_all():
    first, second = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [9.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    both = scores([0] * 6, (1.0, first), (2.0, second))
    found = combine(both, clamp=0.1, best_of=2)
    total = normalised(first) + 2 * normalised(second)
    assert total.argmax() == 0 and total.argmin() == 1  # and by the first reward alone they would be the last and the first
    assert found.trained.tolist() == [True, True, False, False, False, False]
    np.testing.assert_allclose(found.values, np.clip(total, -0.1, 0.1), atol=1e-6)


def test_of_a_flat_group_none_is_trained():
    binary = [0.0] * 4 + [1.0] * 4 + [0.0, 1.0, 0.0, 0.0]
    found = combine(scores([0] * 4 + [1] * 4 + [2] * 4, (1.0, binary)), best_of=2)
    assert found.flat.tolist() == [True, True, False]
    assert found.trained.tolist() == [False] * 8 + [True, True, False, False]


@pytest.mark.parametrize("count", [1, 3, 6, 8, -2])
def test_what_does_not_fit_a_group_is_refused(count):
    with pytest.raises(ValueError, match=f'"best_of": found {count}, accepted: 0 .all., or an even number up to the 4 of a group'):
        combine(scores([0] * 5 + [1] * 4, (1.0, [float(n) for n in range(9)])), best_of=count)


# -- what is refused ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("combination", [NORMALISE_FIRST, SUM_FIRST])
def test_a_score_that_is_no_number_is_refused(bad, combination):
    """One would make the advantages of its whole group NaN, and with them every weight of the policy."""
    with pytest.raises(ValueError, match=f"sample 2 is {bad}"):
        combine(scores([0, 0, 1, 1], (1.0, [1.0, 2.0, bad, 4.0])), combination=combination)


def test_a_group_of_one_is_refused():
    for groups in ([0, 0, 1], [0, 0, 2, 2]):
        with pytest.raises(ValueError, match="group 1 has [01] samples, accepted: at least 2"):
            combine(scores(groups, (1.0, [1.0, 2.0, 3.0, 4.0][:len(groups)])))
