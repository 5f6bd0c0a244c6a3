"""The update: its whole gradient against finite differences of a loss written in numpy, and all that it promises besides.

The policy is that of tests/support/perceptron.py.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from perceptron import (
    ALL, GROUP, PAIRS, PROMPTS, STEPS, Perceptron, Recorder,
    advantages_of, case, drifted, finite_difference, flat, numpy_pairs, relative_error, rollout_of,
)

from comfy_dancegrpo.grpo.objectives import clipped
from comfy_dancegrpo.grpo.pairs import chosen_transitions, input_of, shares
from comfy_dancegrpo.grpo.update import NotFinite, StaleRollout, update


# -- the gradient ---------------------------------------------------------------------------------------------------------------
def test_the_gradient_of_the_whole_update():
    learner, advantages = case()
    stats = update(learner, advantages, ALL)
    losses, ratios = numpy_pairs(learner.before[0], advantages, PAIRS, ALL.clip_range)
    a = advantages.values.numpy()[[n for n, _ in PAIRS]]
    up, down = ratios > 1 + ALL.clip_range, ratios < 1 - ALL.clip_range
    for branch in (up & (a > 0), down & (a < 0), up & (a < 0), down & (a > 0), ~up & ~down):
        assert branch.sum() >= 3  # clipped from both sides, out of the range and yet not clipped, and within it
    assert np.abs(np.abs(ratios - 1) - ALL.clip_range).min() > 1e-5  # none so near the kink that a difference would straddle it
    assert relative_error(learner.gradients[0], finite_difference(learner.before[0], advantages, PAIRS, ALL.clip_range)) < 1e-5
    assert stats.loss == pytest.approx(losses.mean(), rel=1e-9)
    assert stats.ratio_deviation == pytest.approx(np.abs(ratios - 1).max(), rel=1e-9)
    assert stats.clip_fraction == pytest.approx((up | down).mean())
    assert stats.approx_kl == pytest.approx((ratios - 1 - np.log(ratios)).mean(), rel=1e-6)
    assert stats.grad_norm == pytest.approx(np.linalg.norm(learner.gradients[0]), rel=1e-9)


def test_the_gradient_of_a_fresh_policy_is_not_halved_where_the_branches_meet():
    learner, advantages = case(drift=0.0)
    update(learner, advantages, ALL)
    wide = finite_difference(learner.before[0], advantages, PAIRS, clip_range=0.5)  # at a ratio of 1 the clip plays no part
    assert relative_error(learner.gradients[0], wide) < 1e-5


def test_the_gradient_of_each_of_several_optimizer_steps():
    learner, advantages = case(drift=1e-4, flat_group=1)
    settings = dataclasses.replace(ALL, optimizer_steps=3, train_fraction=0.5)
    stats = update(learner, advantages, settings)
    parts = shares(advantages.scores.rollout, advantages.trained, settings)
    assert len(parts) == len(learner.gradients) == 3
    for pairs, before, gradient in zip(parts, learner.before, learner.gradients):
        assert relative_error(gradient, finite_difference(before, advantages, pairs, ALL.clip_range, h=1e-7)) < 1e-5
    assert stats.grad_norm == pytest.approx(np.mean([np.linalg.norm(g) for g in learner.gradients]), rel=1e-9)


def test_the_gradient_is_clipped_as_a_whole():
    (free, advantages), (bound, same) = case(), case()
    norm = update(free, advantages, ALL).grad_norm
    stats = update(bound, same, dataclasses.replace(ALL, max_grad_norm=norm / 4))
    assert stats.grad_norm == norm
    np.testing.assert_allclose(bound.gradients[0], free.gradients[0] / 4, rtol=1e-5)


@pytest.mark.parametrize("micro_batch, padded", [(39, 0), (16, 9), (7, 3), (5, 1), (100, 61)])  # 39 inputs: the first step has one for each group
def test_padding_changes_nothing_but_the_count(micro_batch, padded):
    learner, advantages = case()
    whole = dataclasses.replace(advantages.scores.rollout, micro_batch=48)
    part = dataclasses.replace(whole, micro_batch=micro_batch)
    gradients = []
    for rollout in (whole, part):
        learner, _ = case()
        scored = dataclasses.replace(advantages, scores=dataclasses.replace(advantages.scores, rollout=rollout))
        stats = update(learner, scored, ALL)
        gradients.append(learner.gradients[0])
    assert relative_error(*gradients[::-1]) < 1e-12
    assert (stats.calls.forward, stats.calls.backward, stats.calls.padded) == (0, 39 + padded, padded)


# -- the ratio of a fresh policy ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("micro_batch", [16, 8, 7, 5, 1])
def test_replay_gives_the_ratio_one_exactly(micro_batch, one_thread):
    """One thread: where two share a matrix of few rows, its rows may round differently by their place in the batch."""
    learner = Recorder(Perceptron(torch.float32))
    stats = update(learner, advantages_of(rollout_of(learner, micro_batch=micro_batch, dtype=torch.float32)), ALL)
    assert stats.ratio_deviation == 0.0 and stats.clip_fraction == 0.0 and stats.approx_kl == 0.0


def test_the_ratio_deviation_is_that_of_the_first_optimizer_step():
    learner = Recorder(Perceptron(), learning_rate=1e-2)
    stats = update(learner, advantages_of(rollout_of(learner)), dataclasses.replace(ALL, optimizer_steps=4))
    assert stats.ratio_deviation < 1e-14 and stats.clip_fraction > 0.3 and stats.approx_kl > 0


def test_a_small_divergence_is_not_lost_in_float32():
    """Where rho - 1 is 1e-4, rho - 1 - log(rho) is 5e-9: far below what float32 resolves near 1."""
    learner = Recorder(Perceptron(torch.float32))
    advantages = advantages_of(rollout_of(learner, dtype=torch.float32))
    drifted(learner, 3e-5)
    stats = update(learner, advantages, ALL)
    _, ratios = numpy_pairs(learner.before[0], advantages, PAIRS, ALL.clip_range)
    expected = (ratios - 1 - np.log(ratios)).mean()
    assert 1e-9 < expected < 3e-8
    assert stats.approx_kl == pytest.approx(expected, rel=0.02)


# -- which transitions are trained ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fraction, count", [(0.01, 1), (0.25, 1), (0.6, 2), (0.75, 3), (1.0, 4)])
def test_the_share_of_the_transitions(fraction, count):
    rollout = rollout_of(Recorder(Perceptron()))
    chosen = [chosen_transitions(rollout, n, fraction) for n in range(rollout.size)]
    for steps in chosen:
        assert len(steps) == count and steps == sorted(set(steps)) and set(steps) <= set(range(STEPS - 1))  # never the last
    if count < 4:
        assert len(set(map(tuple, chosen))) > 1
        later = dataclasses.replace(rollout, iteration=1)
        assert chosen != [chosen_transitions(later, n, fraction) for n in range(rollout.size)]
    assert chosen == [chosen_transitions(rollout, n, fraction) for n in range(rollout.size)]


@pytest.mark.parametrize("optimizer_steps", [1, 2, 5, 12, 40])
def test_every_transition_is_in_one_optimizer_step(optimizer_steps):
    rollout = rollout_of(Recorder(Perceptron()))
    parts = shares(rollout, torch.ones(rollout.size, dtype=torch.bool), dataclasses.replace(ALL, optimizer_steps=optimizer_steps))
    assert len(parts) == optimizer_steps and sorted(pair for pairs in parts for pair in pairs) == PAIRS
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert sum(len({n for n, _ in pairs}) for pairs in parts) < rollout.size + optimizer_steps  # a sample's steps stay together


def test_more_optimizer_steps_than_transitions_take_one_each():
    rollout = rollout_of(Recorder(Perceptron()))
    parts = shares(rollout, torch.ones(rollout.size, dtype=torch.bool), dataclasses.replace(ALL, optimizer_steps=len(PAIRS) + 5))
    assert sorted(map(tuple, parts)) == [(pair,) for pair in PAIRS]


def test_flat_groups_train_nothing():
    learner, advantages = case(flat_group=1)
    stats = update(learner, advantages, ALL)
    kept = [(n, t) for n, t in PAIRS if n // GROUP != 1]
    assert advantages.flat.tolist() == [False, True, False] and stats.transitions == len(kept) == 32
    assert relative_error(learner.gradients[0], finite_difference(learner.before[0], advantages, kept, ALL.clip_range)) < 1e-5


def test_the_best_and_worst_of_each_group_are_replayed_and_the_others_are_not():
    learner = Recorder(Perceptron())
    rollout = rollout_of(learner)
    advantages, every = advantages_of(rollout, flat_group=1, best_of=2), advantages_of(rollout, flat_group=1)
    scores = advantages.scores.columns[0].raw.numpy().reshape(PROMPTS, GROUP)
    kept = sorted(g * GROUP + place for g in (0, 2) for place in (scores[g].argmin(), scores[g].argmax()))
    assert torch.equal(advantages.values, every.values)  # they were compared with the whole group
    seen = []
    learner.policy.net.register_forward_hook(lambda module, arguments, output: seen.append(len(output)))
    drifted(learner)
    stats = update(learner, advantages, ALL)
    pairs = [(n, t) for n, t in PAIRS if n in kept]
    assert stats.transitions == len(pairs) == 16 and sum(seen) == stats.calls.backward == 14  # 2 micro-batches of 7: the first step has one input for each of the 2 groups
    assert relative_error(learner.gradients[0], finite_difference(learner.before[0], advantages, pairs, ALL.clip_range)) < 1e-5


def test_what_is_below_the_threshold_is_not_replayed():
    learner = Recorder(Perceptron())
    rollout = rollout_of(learner)
    every = advantages_of(rollout)
    kept = (every.values.abs() >= 0.8).nonzero()[:, 0].tolist()
    seen = []
    learner.policy.net.register_forward_hook(lambda module, arguments, output: seen.append(len(output)))
    stats = update(learner, advantages_of(rollout, min_advantage=0.8), ALL)
    pairs = [(n, t) for n, t in PAIRS if n in kept]
    inputs = len({(n // GROUP, t) if t == 0 else (n, t) for n, t in pairs})  # the first step is one input for the group
    assert 0 < len(kept) < rollout.size and stats.transitions == len(pairs)
    assert sum(seen) == stats.calls.backward == -(-inputs // 7) * 7 < -(-len(PAIRS) // 7) * 7
    assert relative_error(learner.gradients[0], finite_difference(learner.before[0], every, pairs, ALL.clip_range)) < 1e-5


def test_an_iteration_of_flat_groups_alone_passes_and_changes_nothing():
    learner, advantages = case()
    before = flat(learner.parameters.values())
    dull = dataclasses.replace(advantages, trained=torch.zeros(PROMPTS * GROUP, dtype=torch.bool))
    stats = update(learner, dull, ALL)
    assert (stats.transitions, stats.calls.backward, stats.loss, stats.grad_norm) == (0, 0, 0.0, 0.0)
    assert (flat(learner.parameters.values()) == before).all() and learner.version == ("toy", 1)


# -- what is refused ------------------------------------------------------------------------------------------------------------
def test_a_stale_rollout_is_refused():
    learner, advantages = case()
    update(learner, advantages, ALL)
    after = flat(learner.parameters.values())
    with pytest.raises(StaleRollout, match="version 0 of 'toy', and the policy is at version 1"):
        update(learner, advantages, ALL)
    with pytest.raises(StaleRollout, match="'other'"):
        update(Recorder(learner.policy, run="other"), advantages, ALL)
    assert (flat(learner.parameters.values()) == after).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_leaves_everything_as_it_was(poison):
    learner, advantages = case(ema_decay=0.9)
    before = {name: value.clone() for name, value in learner.state().items()}
    handle = next(iter(learner.parameters.values())).register_hook(lambda g: g * poison)
    with pytest.raises(NotFinite, match='step 1 in a row; input "max_skipped_steps" lets 0 be skipped'):
        update(learner, advantages, dataclasses.replace(ALL, max_skipped_steps=0))
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in learner.state().items())
    update(learner, advantages, ALL)  # and nothing of it is left behind
    clean, same = case(ema_decay=0.9)
    update(clean, same, ALL)
    assert all(torch.equal(value, clean.state()[name]) for name, value in learner.state().items())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_no_number_is_skipped_and_the_others_are_taken(poison):
    """The second of three: what is left is the run whose second step had no gradient and took none."""
    settings = dataclasses.replace(ALL, optimizer_steps=3, max_skipped_steps=1)
    (learner, advantages), (clean, same) = case(ema_decay=0.9), case(ema_decay=0.9)
    steps, clip = [], learner.clip_grad_norm

    def poisoned(limit):
        steps.append(1)
        return poison if len(steps) == 2 else clip(limit)

    learner.clip_grad_norm = poisoned
    stats = update(learner, advantages, settings)
    assert (stats.skipped_steps, learner.skipped, learner.version[1]) == (1, 0, 1)  # in a row: the third was taken
    clean_step, taken = clean.optimizer_step, []
    clean.optimizer_step = lambda: clean.zero_grad() if taken.append(1) or len(taken) == 2 else clean_step()
    expected = update(clean, same, settings)
    assert all(torch.equal(value, clean.state()[name]) for name, value in learner.state().items())
    assert all(math.isfinite(value) for value in (stats.loss, stats.grad_norm, stats.approx_kl, stats.ratio_deviation))
    assert stats.ratio_deviation == expected.ratio_deviation and stats.transitions == 2 * expected.transitions // 3


def test_skipped_steps_in_a_row_are_counted_over_iterations_and_checkpoints():
    settings = dataclasses.replace(ALL, max_skipped_steps=2)
    learner, _ = case(drift=0.0)
    before = flat(learner.parameters.values())
    next(iter(learner.parameters.values())).register_hook(lambda g: g * math.nan)
    for iteration in range(2):
        stats = update(learner, advantages_of(rollout_of(learner, iteration)), settings)
        assert (stats.skipped_steps, stats.loss, stats.grad_norm, stats.transitions) == (1, 0.0, 0.0, 0) and learner.skipped == iteration + 1
    again, _ = case(drift=0.0)
    again.load_state(learner.state())
    next(iter(again.parameters.values())).register_hook(lambda g: g * math.nan)
    with pytest.raises(NotFinite, match="optimizer step 3 in a row"):
        update(again, advantages_of(rollout_of(again, 2)), settings)
    assert (flat(again.parameters.values()) == before).all()


def test_an_update_that_was_interrupted_leaves_no_gradient_behind():
    class Stop(Exception):
        pass

    def tick(done, total):
        if done > 20:
            raise Stop

    (stopped, advantages), (clean, same) = case(), case()
    with pytest.raises(Stop):
        update(stopped, advantages, ALL, tick)
    for learner, scored in ((stopped, advantages), (clean, same)):
        update(learner, scored, ALL)
    assert (stopped.gradients[0] == clean.gradients[0]).all()


def test_without_noise_there_is_nothing_to_train_on():
    learner = Recorder(Perceptron())
    with pytest.raises(ValueError, match="no noise"):
        update(learner, advantages_of(rollout_of(learner, eta=0.0)), ALL)


# -- bookkeeping ----------------------------------------------------------------------------------------------------------------
def test_calls_are_counted_as_the_denoiser_sees_them():
    learner = Recorder(Perceptron())
    seen = {"forward": 0, "backward": 0}

    def hook(module, arguments, output):
        seen["forward"] += len(output)
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.update(backward=seen["backward"] + len(gradient)))

    learner.policy.net.register_forward_hook(hook)
    rollout = rollout_of(learner, micro_batch=5)
    # the first step: 3 groups in a call of 5; the 4 others: 12 samples in calls of 5, 5 and 2
    assert (rollout.calls.forward, rollout.calls.backward, rollout.calls.padded) == (5 + 4 * 15, 0, 2 + 4 * 3) == (seen["forward"], 0, 14)
    ticks = []
    advantages, settings = advantages_of(rollout), dataclasses.replace(ALL, optimizer_steps=2)
    stats = update(learner, advantages, settings, lambda *now: ticks.append(now))
    assert (stats.calls.forward + stats.calls.backward, stats.calls.backward) == (seen["forward"] - 65, seen["backward"])
    inputs = [len({input_of(rollout, pair) for pair in pairs}) for pairs in shares(rollout, advantages.trained, settings)]
    assert stats.transitions == 48 and sum(inputs) < 48 and stats.calls.backward + stats.calls.forward - stats.calls.padded == sum(inputs)
    assert len(ticks) == sum(-(-count // 5) for count in inputs) and ticks[-1] == (48, 48) and ticks == sorted(set(ticks))


def test_what_the_clip_has_silenced_costs_no_backward_pass():
    """After a step far beyond the clip, what stands in the next step is silenced where its ratio has moved its own way."""
    (learner, advantages), (same, again) = case(drift=0.0, micro_batch=1, learning_rate=0.3), case(drift=0.0, micro_batch=48, learning_rate=0.3)
    settings = dataclasses.replace(ALL, optimizer_steps=2)
    spared, whole = update(learner, advantages, settings), update(same, again, settings)
    pairs = shares(advantages.scores.rollout, advantages.trained, settings)[1]
    values = advantages.values.double().numpy()[[n for n, _ in pairs]]
    _, ratios = numpy_pairs(learner.before[1], advantages, pairs, ALL.clip_range)
    silenced = ((values > 0) & (ratios > 1 + ALL.clip_range)) | ((values < 0) & (ratios < 1 - ALL.clip_range))
    alive = {input_of(advantages.scores.rollout, pair) for pair, silent in zip(pairs, silenced) if not silent}
    inputs = {input_of(advantages.scores.rollout, pair) for pair in pairs}
    assert 0 < len(alive) < len(inputs) and spared.calls.forward == len(inputs) - len(alive)
    assert whole.calls.forward == 0 and relative_error(learner.gradients[1], same.gradients[1]) < 1e-9


def test_a_step_that_is_silenced_whole_goes_on_by_momentum():
    """As it would with a backward pass: its gradient is zero, not missing."""
    learner, advantages = case(drift=0.0, micro_batch=1, learning_rate=0.3)
    as_it_is = clipped.clipped

    def silent(*given):
        loss, outside = as_it_is(*given)
        return loss * (not learner.gradients), outside

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipped, "clipped", silent)
        stats = update(learner, advantages, dataclasses.replace(ALL, optimizer_steps=2))
    assert stats.calls.forward > 0 and not learner.gradients[1].any() and (learner.after[1] != learner.before[1]).all()


def test_under_inference_mode_as_hosts_run_their_nodes():
    plain, hosted = Recorder(Perceptron(), ema_decay=0.9), Recorder(Perceptron(), ema_decay=0.9)
    update(plain, advantages_of(rollout_of(plain)), ALL)
    with torch.inference_mode():
        update(hosted, advantages_of(rollout_of(hosted)), ALL)
    assert (hosted.after[0] == plain.after[0]).all()
    assert not any(p.is_inference() for p in hosted.parameters.values())
    with torch.inference_mode():
        rollout = rollout_of(hosted, 1)
    update(hosted, advantages_of(rollout), ALL)  # sampled inside, trained outside
