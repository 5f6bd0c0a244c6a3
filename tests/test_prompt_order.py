"""Which prompts an iteration trains on: every one in an epoch, and by a curriculum fewer of those whose groups have no spread."""

import pytest
import torch
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo import advantages
from comfy_dancegrpo.runs.prompt_order import PromptOrder, after, prompts_of
from safetensors.torch import load_file


@pytest.mark.parametrize("total, count", [(6, 2), (6, 4), (5, 3), (3, 7), (1, 2)])
def test_every_epoch_has_every_prompt_once(total, count):
    prompts = tuple(f"p{k}" for k in range(total))
    picked = [p for iteration in range(total * 2) for p in prompts_of(iteration, prompts, count, seed=8)]
    epochs = [picked[k:k + total] for k in range(0, len(picked), total)]
    assert len(epochs) == 2 * count and all(sorted(epoch) == list(prompts) for epoch in epochs)
    if total > 4:
        assert len(set(map(tuple, epochs))) > 1 and epochs[0] != list(prompts)


def test_the_order_of_the_prompts_is_that_of_the_seed():
    prompts = tuple("abcdefgh")
    assert prompts_of(3, prompts, 4, seed=1) == prompts_of(3, prompts, 4, seed=1)
    assert [prompts_of(k, prompts, 4, seed=1) for k in range(4)] != [prompts_of(k, prompts, 4, seed=2) for k in range(4)]


class Run:
    """A curriculum on its own: `flat` says of a prompt whether its group has no spread."""

    def __init__(self, prompts, count, curriculum=True):
        self.curriculum, self.order = {}, PromptOrder(tuple(prompts), count, 3, self, curriculum)

    def go(self, iterations, flat, start=0):
        for iteration in range(start, start + iterations):
            picked = self.order.of(iteration)
            assert tuple(self.order.upcoming(iteration, iteration + 1)) == picked
            self.order.end([flat(prompt) for prompt in picked])
            yield picked


def test_without_flat_groups_a_curriculum_changes_nothing():
    assert list(Run("abcde", 2).go(10, lambda prompt: False)) == [prompts_of(k, tuple("abcde"), 2, 3) for k in range(10)]
    assert list(Run("abcde", 2, curriculum=False).go(10, lambda prompt: True)) == [prompts_of(k, tuple("abcde"), 2, 3) for k in range(10)]


def test_a_prompt_whose_groups_have_no_spread_waits_longer_each_time():
    """Of two prompts, one in an iteration, one is always flat; the other is read once in every epoch, and so counts them."""
    text = "".join(picked for (picked,) in Run("ab", 1).go(80, "a".__eq__))
    epochs = [text[:place].count("b") for place, prompt in enumerate(text) if prompt == "a"]
    wanted = [0, 2, 5, 9, 14, 20, 27, 35, 44, 53, 62]  # 1, 2, 3 ... 8, 8, 8 epochs without it between two with
    assert len(epochs) >= len(wanted) and all(epoch - by_hand in (0, 1) for epoch, by_hand in zip(epochs, wanted))  # 1: it comes second in that epoch


def test_one_group_with_spread_ends_the_waiting():
    state = {"position": 0, "waiting": {"0": [3, 0]}}
    found = after(state, 1, 1, 3, [False])
    assert found == {"position": 1, "waiting": {}} and state["waiting"] == {"0": [3, 0]}
    assert after(state, 1, 1, 3, [True]) == {"position": 1, "waiting": {"0": [4, 5]}}


def test_all_prompts_may_wait():
    assert [picked for (picked,) in Run("a", 1).go(3, lambda prompt: True)] == ["a"] * 3
    with pytest.raises(RunError, match="3 groups, accepted"):
        Run("ab", 2).order.end([True] * 3)


def test_a_run_with_a_curriculum_that_is_killed_and_resumed_is_as_one_that_was_not(cli, loop_only, saved, tiny_loop, tmp_path, monkeypatch):
    """The group of the first prompt of each iteration is said to have no spread."""
    from comfy_dancegrpo.grpo import rollout

    flat, drawn, sample = advantages.flat_groups, [], rollout.sample
    monkeypatch.setattr(advantages, "flat_groups", lambda values, groups: flat(values, groups) | (torch.arange(int(groups.max()) + 1) == 0))
    monkeypatch.setattr(rollout, "sample", lambda policy, request, *more, **options: drawn.append(request.prompts) or sample(policy, request, *more, **options))
    prompts, start = (next(node for node in loop_only.values() if node["class_type"] == f"DanceGRPO{kind}")["inputs"] for kind in ("PromptSet", "LoopStart"))
    prompts["limit"] = 3
    start |= {"checkpoint_every": 1, "curriculum": True}
    words = ["run", saved(loop_only), "--output", tmp_path, *tiny_loop]

    def lora(name, *more):
        done = cli(*words, "--run", name, "--iterations", 4, *more)
        assert done.status == 0, done.err
        found = drawn[:]
        drawn.clear()
        return load_file(tmp_path / name / "checkpoints" / "0000004.safetensors"), found

    straight, picked = lora("straight")
    assert cli(*words, "--run", "resumed", "--iterations", 2).status == 0
    resumed, _ = lora("resumed", "--set", "Loop Start.on_existing=resume")
    assert "curriculum" in straight and straight.keys() == resumed.keys()
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []
    without, others = lora("without", "--set", "Loop Start.curriculum=false")
    assert picked[0] == others[0] and picked != others and "curriculum" not in without
