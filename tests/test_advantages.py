"""Advantages against numpy in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from comfy_dancegrpo.grpo import estimators
from comfy_dancegrpo.grpo.advantages import best_and_worst, combine, of_one_reward
from comfy_dancegrpo.grpo.groups import BATCH, BATCH_STD, ESTIMATORS, LEARNED_VALUE, LEAVE_ONE_OUT, NORMALISE_FIRST, PER_PROMPT, RANK, SUM_FIRST
from comfy_dancegrpo.grpo.protocol import Column, Conditioning, Scores


def normalised(values):
    values = np.asarray(values, dtype=np.float64)
    return (values - values.mean()) / (values.std(ddof=1) + 1e-8)


def scores(groups, *columns):
    """Scores of a rollout of which nothing but its groups is looked at; columns are (weight, values)."""
    places = torch.tensor([groups[:row].count(group) for row, group in enumerate(groups)])
    words = torch.randn(max(groups) + 1, 5, 7, generator=torch.Generator().manual_seed(0))
    rollout = SimpleNamespace(groups=torch.tensor(groups), indices=places, prompts=tuple(f"p{group}" for group in groups), history={},
                              conditioning=Conditioning({"embeds": words}), seed=0)
    return Scores(rollout, tuple(Column(f"r{k}", weight, torch.tensor(values)) for k, (weight, values) in enumerate(columns)))


def test_each_group_by_itself_in_any_order():
    groups, values = torch.tensor([1, 0, 1, 0, 0]), torch.tensor([3.0, 10.0, 5.0, 11.0, 15.0])
    advantages, flat, _ = of_one_reward(values, groups)
    expected = np.empty(5)
    expected[[1, 3, 4]], expected[[0, 2]] = normalised([10, 11, 15]), normalised([3, 5])
    np.testing.assert_allclose(advantages, expected, atol=1e-6)
    assert not flat.any()


@pytest.mark.parametrize("offset, spread", [(0.0, 1.0), (1000.0, 0.5), (-30000.0, 1.0)])
def test_large_values_lose_nothing(offset, spread):
    values = torch.tensor(offset + spread * np.random.default_rng(0).standard_normal(8), dtype=torch.float32)
    advantages, flat, _ = of_one_reward(values, torch.zeros(8, dtype=torch.int64))
    assert not flat.any()
    np.testing.assert_allclose(advantages, normalised(values.numpy()), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("values, is_flat", [
    ([0.3, 0.3, 0.3], True), ([0.0, 0.0, 0.0], True), ([1e6, 1e6, 1e6 + 0.5], True), ([0.3, 0.3, 0.3 + 1e-7], True),
    ([0.3, 0.3, 0.30001], False), ([1e6, 1e6, 1e6 + 10], False),
])
def test_a_group_without_spread_is_flat(values, is_flat):
    advantages, flat, _ = of_one_reward(torch.tensor(values), torch.zeros(3, dtype=torch.int64))
    assert flat.tolist() == [is_flat] and bool((advantages == 0).all()) is is_flat


def test_the_limit_of_flatness():
    """std <= 1e-6 (1 + |mean|): two values m -+ h have std sqrt(2) h."""
    for factor, is_flat in ((0.98, True), (1.02, False)):
        h = factor * 1e-6 * (1 + 2.0) / np.sqrt(2)
        _, flat, _ = of_one_reward(torch.tensor([2 - h, 2 + h], dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
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


# -- advantages too near to 0 -----------------------------------------------------------------------------------------------------
def test_a_sample_whose_advantage_is_too_near_to_0_is_not_trained():
    """By hand: 0, 2, 3, 7 have the mean 3 and the std sqrt(26/3) = 2.944, so the advantages are -1.019, -0.340, 0 and 1.359; the second group's are +-0.707."""
    several = scores([0, 0, 0, 0, 1, 1, 2, 2], (1.0, [0.0, 2.0, 3.0, 7.0, 0.0, 1.0, 5.0, 5.0]))
    for threshold, trained, below in ((0.0, [1, 1, 1, 1, 1, 1, 0, 0], 0), (0.1, [1, 1, 0, 1, 1, 1, 0, 0], 1), (0.35, [1, 0, 0, 1, 1, 1, 0, 0], 2),
                                      (0.71, [1, 0, 0, 1, 0, 0, 0, 0], 4), (1.02, [0, 0, 0, 1, 0, 0, 0, 0], 5), (9.0, [0] * 8, 6)):
        found = combine(several, min_advantage=threshold)
        assert found.trained.tolist() == [bool(n) for n in trained] and found.below_threshold == below
        assert found.flat.tolist() == [False, False, True] and torch.equal(found.values, combine(several).values)


def test_the_threshold_is_of_the_advantage_before_the_clamp_and_the_best_and_worst_are_chosen_first():
    one = scores([0, 0, 0, 0], (1.0, [0.0, 2.0, 3.0, 7.0]))
    assert combine(one, clamp=0.5, min_advantage=1.0).trained.tolist() == [True, False, False, True]
    found = combine(one, best_of=2, min_advantage=1.1)
    assert found.trained.tolist() == [False, False, False, True] and found.below_threshold == 1  # the two in the middle were left out before


@pytest.mark.parametrize("count", [1, 3, 6, 8, -2])
def test_what_does_not_fit_a_group_is_refused(count):
    with pytest.raises(ValueError, match=f'"best_of": found {count}, accepted: 0 .all., or an even number up to the 4 of a group'):
        combine(scores([0] * 5 + [1] * 4, (1.0, [float(n) for n in range(9)])), best_of=count)


# -- what a score is compared with ----------------------------------------------------------------------------------------------
GROUPS = [0, 0, 0, 1, 1, 1, 1]
VALUES = [1.0, 2.0, 6.0, 10.0, 10.5, 12.0, 11.5]


def expected(estimator):
    """By the papers' equations, a group at a time, in Python's own sums."""
    def mean(values):
        return sum(values) / len(values)

    def std(values):
        return (sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)) ** 0.5

    found = []
    for g, value in zip(GROUPS, VALUES):
        own = [v for v, other in zip(VALUES, GROUPS) if other == g]
        ranks = [sum(v > other for other in own) for v in own]  # none tie
        others = list(own)
        others.remove(value)
        found.append({
            "group": lambda: (value - mean(own)) / std(own),
            BATCH_STD: lambda: (value - mean(own)) / std(VALUES),
            BATCH: lambda: (value - mean(VALUES)) / std(VALUES),
            RANK: lambda: (ranks[own.index(value)] - mean(ranks)) / std(ranks),
            LEAVE_ONE_OUT: lambda: value - mean(others),
            PER_PROMPT: lambda: (value - mean(VALUES)) / std(VALUES),  # with nothing remembered: those of the iteration
            LEARNED_VALUE: lambda: (value - mean(VALUES)) / std(VALUES),  # with nothing learned
        }[estimator]())
    return found


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_estimator_in_any_order_of_the_rows(estimator):
    order = np.random.default_rng(1).permutation(len(VALUES))
    groups, values = [GROUPS[row] for row in order], [VALUES[row] for row in order]
    found = combine(scores(groups, (1.0, values)), estimator=estimator)
    np.testing.assert_allclose(found.values, np.array(expected(estimator))[order], rtol=2e-6, atol=1e-7)
    assert not found.flat.any() and (found.history is not None) == (estimator in (PER_PROMPT, LEARNED_VALUE))


def test_the_estimators_are_not_each_other():
    columns = [tuple(np.round(expected(estimator), 6)) for estimator in ESTIMATORS]
    assert len(set(columns)) == len(columns) - 2  # of a prompt's first iteration nothing is known but that


def test_ties_share_a_rank():
    """By hand: 1, 1, 5 have the ranks 1.5, 1.5 and 3, whose mean is 2 and whose std is 0.866."""
    found = combine(scores([0, 0, 0], (1.0, [1.0, 1.0, 5.0])), estimator=RANK).values
    np.testing.assert_allclose(found, np.array([-0.5, -0.5, 1.0]) / 0.75**0.5, rtol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_flat_groups_train_nothing_whatever_they_are_compared_with(estimator):
    """Each of a group scores 0.9, where the rest of the batch is far below: there is still nothing that could be learned by comparing them."""
    found = combine(scores([0, 0, 1, 1, 1], (1.0, [0.9, 0.9, 0.1, 0.2, 0.4])), estimator=estimator)
    assert found.flat.tolist() == [True, False] and found.trained.tolist() == [False, False, True, True, True]
    assert found.values[:2].tolist() == [0.0, 0.0] and bool((found.values[2:] != 0).any())


@pytest.mark.parametrize("combination", [NORMALISE_FIRST, SUM_FIRST])
@pytest.mark.parametrize("estimator", [BATCH_STD, BATCH, RANK, LEAVE_ONE_OUT, PER_PROMPT, LEARNED_VALUE])
def test_several_rewards_are_combined_alike_by_any_estimator(estimator, combination):
    first, second = [0.1, 0.4, 0.2, 0.9, 0.8, 0.3], [30.0, 10.0, 20.0, 50.0, 10.0, 40.0]
    groups = [0, 0, 0, 1, 1, 1]
    found = combine(scores(groups, (2.0, first), (-0.5, second)), estimator=estimator, combination=combination, clamp=1000.0)

    def alone(values):
        return combine(scores(groups, (1.0, values)), estimator=estimator, clamp=1000.0).values.double()
    together = alone([2.0 * a - 0.5 * b for a, b in zip(first, second)]) if combination == SUM_FIRST else 2.0 * alone(first) - 0.5 * alone(second)
    np.testing.assert_allclose(found.values, together, rtol=1e-5, atol=1e-5)


# -- statistics of each prompt, over the iterations -------------------------------------------------------------------------------
def visited(iterations, estimator=PER_PROMPT):
    """The advantages of each iteration of [(prompts, values)], the history handed on as the learner does."""
    history, found = {}, []
    for prompts, values in iterations:
        of_iteration = scores([0] * len(values) if len(set(prompts)) == 1 else [sorted(set(prompts)).index(p) for p in prompts], (1.0, values))
        of_iteration.rollout.prompts, of_iteration.rollout.history = tuple(prompts), history
        found.append(combine(of_iteration, estimator=estimator, clamp=1000.0))
        history = found[-1].history
    return found, history


def test_a_prompts_own_statistics_count_from_sixteen_scores_on():
    source = np.random.default_rng(5)
    easy, hard = 10 + source.standard_normal((5, 6)), 2 + 0.1 * source.standard_normal((5, 6))
    iterations = [(["easy"] * 6 + ["hard"] * 6, np.concatenate([a, b]).astype(np.float32).tolist()) for a, b in zip(easy, hard)]
    found, history = visited(iterations)
    for k in range(5):
        batch = np.float64(iterations[k][1])
        seen = {name: np.float64([v for prompts, values in iterations[:k + 1] for p, v in zip(prompts, values) if p == name]) for name in ("easy", "hard")}
        for name, rows in (("easy", slice(0, 6)), ("hard", slice(6, 12))):
            known = batch if len(seen[name]) < 16 else seen[name][-32:]
            np.testing.assert_allclose(found[k].values[rows], (batch[rows] - known.mean()) / known.std(ddof=1), rtol=1e-5, atol=1e-6)
    assert abs(found[0].values[:6].mean()) > 0.9 and abs(found[4].values[:6].mean()) < 0.6  # an easy prompt is not better than a hard one
    assert {name: len(of_prompt) for name, of_prompt in history["r0"].items()} == {"easy": 30, "hard": 30}


def test_the_last_scores_of_a_prompt_are_remembered_and_no_more():
    iterations = [(["a"] * 20, [float(k * 20 + i) for i in range(20)]) for k in range(3)]
    _, history = visited(iterations)
    assert history == {"r0": {"a": [float(v) for v in range(28, 60)]}}


def test_what_is_remembered_is_left_as_it_was_and_is_kept_by_reward():
    history = {"r0": {"a": [1.0] * 16}}
    before = scores([0, 0], (1.0, [3.0, 5.0]), (1.0, [7.0, 8.0]))
    before.rollout.prompts, before.rollout.history = ("a", "a"), history
    found = combine(before, estimator=PER_PROMPT)
    assert history == {"r0": {"a": [1.0] * 16}}
    assert found.history == {"r0": {"a": [1.0] * 16 + [3.0, 5.0]}, "r1": {"a": [7.0, 8.0]}}
    assert combine(before).history is None  # another estimator neither needs nor keeps any


def test_prompts_with_unlike_pictures_are_unlike():
    from comfy_dancegrpo.prompts import pictured

    one, other = pictured(["edit it", "edit it"], torch.stack([torch.zeros(2, 2, 3), torch.ones(2, 2, 3)]))
    assert len({estimators.key(one), estimators.key(other), estimators.key("edit it")}) == 3


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
