"""What a learner holds from one update to the next: its state, its moving average, its optimizer, its learning rate."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers.optimization import get_scheduler
from perceptron import ALL, Perceptron, Recorder, advantages_of, case, flat, rollout_of

from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.groups import PER_PROMPT
from comfy_dancegrpo.grpo.protocol import Column, Scores
from comfy_dancegrpo.grpo.schedules import FALLING, share
from comfy_dancegrpo.grpo.update import update


# -- the state --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_state_carries_all_that_the_next_update_depends_on(ema_decay):
    def iterate(learner, iteration):
        update(learner, advantages_of(rollout_of(learner, iteration)), dataclasses.replace(ALL, optimizer_steps=2))

    first = Recorder(Perceptron(), ema_decay=ema_decay)
    iterate(first, 0)
    saved = first.state()
    other = Recorder(Perceptron(seed=1), ema_decay=ema_decay)
    iterate(other, 0)  # with moments of its own, which must not survive
    other.load_state(saved)
    assert other.version == ("toy", 1)
    for learner in (first, other):
        iterate(learner, 1)
    state = other.state()
    assert state.keys() == first.state().keys() and any(k.startswith("optimizer.exp_avg_sq.") for k in state)
    assert all(torch.equal(value, state[name]) for name, value in first.state().items())
    assert not any(torch.equal(value, state[name]) for name, value in saved.items() if name.startswith("parameters."))


def test_loading_an_untrained_state_forgets_the_moments():
    learner = Recorder(Perceptron())
    untrained = learner.state()
    update(learner, advantages_of(rollout_of(learner)), ALL)
    learner.load_state(untrained)
    assert learner.state().keys() == untrained.keys()
    assert all(torch.equal(value, untrained[name]) for name, value in learner.state().items())


def test_the_history_of_prompts_goes_with_the_checkpoints():
    """Two updates, and the second after a checkpoint in between: what is remembered, and so what is learned, is the same."""
    def iterate(learner, iteration):
        rollout = dataclasses.replace(rollout_of(learner, iteration), history=learner.history)
        values = torch.randn(rollout.size, generator=torch.Generator().manual_seed(iteration))
        return update(learner, combine(Scores(rollout, (Column("toy", 1.0, values),)), estimator=PER_PROMPT), ALL)

    straight, resumed = Recorder(Perceptron()), Recorder(Perceptron(seed=1))
    for iteration in range(4):
        iterate(straight, iteration)
        if iteration == 2:
            resumed.load_state(straight.state())
    iterate(resumed, 3)
    assert {name: len(scores) for name, scores in straight.history["toy"].items()} == dict.fromkeys("abc", 16)
    assert resumed.history == straight.history and (resumed.after[-1] == straight.after[-1]).all()
    plain = Recorder(Perceptron())
    update(plain, advantages_of(rollout_of(plain)), ALL)
    assert plain.history == {} and "history" not in plain.state()  # no other estimator carries anything about


def test_the_moving_average():
    decay, learner = 0.8, Recorder(Perceptron(), ema_decay=0.8)
    start = flat(learner.parameters.values())
    for iteration in range(3):
        update(learner, advantages_of(rollout_of(learner, iteration)), dataclasses.replace(ALL, optimizer_steps=2))
    expected = decay**6 * start + sum((1 - decay) * decay ** (5 - k) * after for k, after in enumerate(learner.after))
    assert len(learner.after) == 6
    np.testing.assert_allclose(flat(learner.ema.values()), expected, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(flat(learner.weights().values()), expected.astype(np.float32))
    np.testing.assert_array_equal(flat(learner.weights(averaged=False).values()), learner.after[-1].astype(np.float32))


# -- the optimizer ----------------------------------------------------------------------------------------------------------------
def test_adamw():
    """One step from a fresh state is -lr (g / (|g| + 1e-8) + wd p) (arXiv 1711.05101, algorithm 2)."""
    learner, advantages = case(learning_rate=0.01, weight_decay=0.1)
    update(learner, advantages, ALL)
    p, g = learner.before[0], learner.gradients[0]
    np.testing.assert_allclose(learner.after[0], p - 0.01 * (g / (np.abs(g) + 1e-8) + 0.1 * p), rtol=0, atol=1e-12)


def test_the_learning_rate_warms_up():
    """The first of four warm-up iterations steps with a quarter of the learning rate, and the fourth with the whole."""
    learner = Recorder(Perceptron(), learning_rate=0.01, warmup=4)
    rates = []
    for iteration in range(6):
        rates.append(update(learner, advantages_of(rollout_of(learner, iteration)), ALL).learning_rate)
    np.testing.assert_allclose(rates, [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    g = learner.gradients[0]
    np.testing.assert_allclose(learner.after[0], learner.before[0] - 0.0025 * g / (np.abs(g) + 1e-8), rtol=0, atol=1e-12)


def test_the_learning_rate_falls_with_the_square_root():
    """arXiv 1706.03762, eq. 3, scaled to its peak: min(n / w, sqrt(w / n))."""
    learner = Recorder(Perceptron(), learning_rate=0.01, warmup=3, schedule="inverse_sqrt")
    rates = [update(learner, advantages_of(rollout_of(learner, iteration)), ALL).learning_rate for iteration in range(8)]
    np.testing.assert_allclose(rates, [0.01 * min(n / 3, (3 / n) ** 0.5) for n in range(1, 9)])


@pytest.mark.parametrize("warmup, length", [(0, 1), (0, 12), (1, 12), (4, 12), (11, 12), (12, 12), (20, 12)])
@pytest.mark.parametrize("schedule", [*FALLING, "constant"])
def test_the_falling_schedules_are_those_of_diffusers(schedule, warmup, length):
    """Its step 0, which has a learning rate of 0 where there is a warm-up, is none of ours; nor is its last, which always has."""
    scheduler = get_scheduler({"constant": "constant_with_warmup"}.get(schedule, schedule), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
                              num_warmup_steps=max(1, warmup), num_training_steps=length + 1, num_cycles=3)
    theirs = [scheduler.lr_lambdas[0](iteration) for iteration in range(1, length + 1)]
    np.testing.assert_allclose([share(schedule, iteration, warmup, length, 3) for iteration in range(1, length + 1)], theirs, rtol=0, atol=1e-12)
    assert min(theirs) > 0 and max(theirs) <= 1


def test_the_learning_rate_falls_over_the_length_of_the_run():
    learner = Recorder(Perceptron(), learning_rate=0.01, warmup=2, schedule="linear", length=5)
    rates = [update(learner, advantages_of(rollout_of(learner, iteration)), ALL).learning_rate for iteration in range(5)]
    np.testing.assert_allclose(rates, [0.005, 0.01, 0.0075, 0.005, 0.0025])
