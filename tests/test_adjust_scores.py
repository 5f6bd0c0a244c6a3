"""What may be done to scores before they become advantages: worked examples by hand, and runs that do it."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.adjustments import clip, rank, threshold
from comfy_dancegrpo.grpo.advantages import combine
from comfy_dancegrpo.grpo.protocol import Column, Scores
from comfy_dancegrpo.nodes.adjust_scores import AdjustScores
from comfy_dancegrpo.nodes.advantage import Advantage


def scores(groups, **columns):
    rollout = SimpleNamespace(groups=torch.tensor(groups), indices=torch.arange(len(groups)))
    return Scores(rollout, tuple(Column(name, 1.0, torch.tensor(values)) for name, values in columns.items()))


def adjust(found, operation, **inputs):
    return AdjustScores().adjust(found, operation, **{"threshold": 0.28, "low": 0.0, "high": 1.0, "column": "", **inputs})[0]


# -- the equations --------------------------------------------------------------------------------------------------------------
def test_threshold():
    """What equals the value is not above it, also where float32 rounds it up, as it does 0.28."""
    assert threshold(torch.tensor([0.27, 0.28, 0.2801, -1.0, 3.0]), 0.28).tolist() == [0, 0, 1, 0, 1]


def test_clip():
    assert clip(torch.tensor([-2.0, -0.5, 0.25, 7.0]), -0.5, 1.5).tolist() == [-0.5, -0.5, 0.25, 1.5]
    with pytest.raises(ValueError, match='"high": found 1, accepted: above "low" .1.'):
        clip(torch.tensor([1.0]), 1.0, 1.0)


@pytest.mark.parametrize("values, ranks", [
    ([0.3, -5.0, 0.1, 900.0], [2 / 3, 0, 1 / 3, 1]),  # ranks 3, 1, 2, 4 of 4
    ([5.0, 7.0, 5.0, 1.0, 5.0], [0.5, 1, 0.5, 0, 0.5]),  # ranks 3, 5, 3, 1, 3: the mean of 2, 3 and 4
    ([2.0, 2.0, 1.0, 1.0], [5 / 6, 5 / 6, 1 / 6, 1 / 6]),  # ranks 3.5, 3.5, 1.5, 1.5
    ([4.0, 4.0, 4.0], [0.5, 0.5, 0.5]),
    ([1.0, 0.0], [1, 0]),
])
def test_rank_within_a_group(values, ranks):
    assert rank(torch.tensor(values), torch.zeros(len(values), dtype=torch.int64)).tolist() == pytest.approx(ranks)


def test_ranks_are_of_each_group_by_itself():
    groups = torch.tensor([1, 0, 1, 0, 1])
    assert rank(torch.tensor([3.0, 10.0, 5.0, 11.0, 4.0]), groups).tolist() == [0, 0, 1, 1, 0.5]
    with pytest.raises(ValueError, match="group 1 has 1 samples"):
        rank(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]))


# -- the node -------------------------------------------------------------------------------------------------------------------
def test_the_newest_is_adjusted_or_the_one_that_is_named():
    both = scores([0, 0, 0], first=[0.1, 0.2, 0.3], second=[0.3, 0.2, 0.1])
    newest, named = adjust(both, "threshold", threshold=0.15), adjust(both, "threshold", threshold=0.15, column="first")
    assert [c.used.tolist() for c in newest.columns] == [both.columns[0].raw.tolist(), [1, 1, 0]]
    assert [c.used.tolist() for c in named.columns] == [[0, 1, 1], both.columns[1].raw.tolist()]
    assert [c.name for c in named.columns] == ["first", "second"] and named.rollout is both.rollout
    with pytest.raises(RunError, match="\"column\": found 'third', accepted: one of 'first', 'second'"):
        adjust(both, "rank", column="third")
    assert all(c.adjusted is None for c in both.columns)  # what came in is as it was


def test_adjustments_follow_each_other_and_the_raw_scores_stay():
    found = adjust(adjust(scores([0, 0, 0, 0], r=[0.0, 1.0, 5.0, 9.0]), "clip", low=0.5, high=5.0), "rank")
    assert found.columns[0].used.tolist() == pytest.approx([0, 1 / 3, 5 / 6, 5 / 6])
    assert found.columns[0].raw.tolist() == found.total.tolist() == [0, 1, 5, 9]


def test_negate_trains_against_and_the_total_still_rises_where_training_succeeds():
    plain = scores([0, 0, 0], r=[1.0, 2.0, 4.0])
    found = adjust(plain, "negate")
    assert torch.equal(combine(found).values, -combine(plain).values)
    assert found.total.tolist() == [-1, -2, -4] and found.columns[0].raw.tolist() == [1, 2, 4]
    before, after = adjust(adjust(plain, "negate"), "threshold", threshold=1.5), adjust(adjust(plain, "threshold", threshold=1.5), "negate")
    assert torch.equal(combine(before).values, combine(after).values)  # a threshold is in the reward's own units either way


def test_what_passes_in_all_or_none_of_a_group_is_flat():
    found = combine(adjust(scores([0, 0, 1, 1, 2, 2], r=[0.1, 0.2, 0.5, 0.9, 0.2, 0.4]), "threshold"))
    assert found.flat.tolist() == [True, True, False] and found.trained.tolist() == [False] * 4 + [True] * 2
    assert combine(adjust(scores([0, 0, 1, 1], r=[0.5, 0.5, 0.1, 0.2]), "rank")).flat.tolist() == [True, False]


def test_ranks_are_free_of_units_and_outliers():
    """Of any G values that differ, ranked ones have the advantages of 0, 1, ..., G - 1: G = 3 gives -1, 0, 1."""
    found = combine(adjust(scores([0, 0, 0], r=[0.1, 9000.0, 0.2]), "rank")).values
    assert found.tolist() == pytest.approx([-1, 1, 0], abs=1e-6)


@pytest.mark.parametrize("cls, inputs, verdict", [
    (AdjustScores, {"operation": "clip", "low": 2.0, "high": 1.0}, 'input "high": found 1, accepted: above "low" (2)'),
    (AdjustScores, {"operation": "clip", "low": 2.0, "high": None}, True),
    (AdjustScores, {"operation": "rank", "low": 2.0, "high": 1.0}, True),
    (AdjustScores, {"operation": "square", "low": 0.0, "high": 1.0},
     "input \"operation\": found 'square', accepted: one of 'threshold', 'rank', 'clip', 'negate'"),
    (Advantage, {"best_of": 3}, 'input "best_of": found 3, accepted: 0 (all), or an even number up to the size of a group'),
    (Advantage, {"best_of": -2}, 'input "best_of": found -2, accepted: 0 (all), or an even number up to the size of a group'),
    (Advantage, {"best_of": 8}, True), (Advantage, {"best_of": None}, True), (Advantage, {}, True),
    (Advantage, {"best_of_end": 3}, 'input "best_of_end": found 3, accepted: -1 (best_of stays), 0 (all), or an even number up to the size of a group'),
    (Advantage, {"best_of_end": -2}, 'input "best_of_end": found -2, accepted: -1 (best_of stays), 0 (all), or an even number up to the size of a group'),
    *((Advantage, {"best_of_end": end}, True) for end in (-1, 0, 8, None)),
])
def test_what_is_wrong_before_anything_is_loaded(cls, inputs, verdict):
    assert cls.VALIDATE_INPUTS(**inputs) == verdict


def test_a_fault_is_a_run_error():
    with pytest.raises(RunError, match='"best_of": found 4, accepted: 0 .all., or an even number up to the 3 of a group'):
        Advantage().compute(scores([0, 0, 0], r=[1.0, 2.0, 3.0]), 5.0, best_of=4)
    with pytest.raises(RunError, match='"high"'):
        adjust(scores([0, 0], r=[1.0, 2.0]), "clip", low=3.0)


# -- runs -----------------------------------------------------------------------------------------------------------------------
def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def with_adjustment(prompt, **inputs):
    """The quickstart's loop with an Adjust Scores between Score and Advantage."""
    inputs = {"operation": "threshold", "threshold": 0.28, "low": 0.0, "high": 1.0, "column": "", **inputs}
    prompt["20"] = {"class_type": "DanceGRPOAdjustScores", "inputs": {"scores": ["6", 0], **inputs}}
    prompt["7"]["inputs"]["scores"] = ["20", 0]
    return prompt


def test_a_threshold_that_nothing_passes_trains_nothing_and_the_metrics_keep_the_raw_reward(cli, loop_only, saved, tiny_loop, tmp_path):
    done = cli("run", saved(with_adjustment(loop_only, threshold=1e6)), "--output", tmp_path, *tiny_loop)
    assert done.status == 0, done.err
    for row in rows(tmp_path / "quickstart"):
        (reward,) = row["rewards"].values()
        assert (row["flat_groups"], row["trained_samples"], row["transitions"], reward["used_mean"]) == (2, 0, 0, 0.0)
        assert row["reward_mean"] == reward["mean"] != 0 and row["reward_std"] == reward["std"] > 0


def test_the_best_and_worst_of_ranked_scores_in_one_go_and_resumed(cli, loop_only, saved, tiny_loop, tmp_path):
    loop_only["7"]["inputs"] |= {"best_of": 2, "combine": "sum, then normalise"}
    flow = saved(with_adjustment(loop_only, operation="rank"))
    done = cli("run", flow, "--output", tmp_path, *tiny_loop)
    assert done.status == 0, done.err
    for iterations in ("1", "2"):
        done = cli("run", flow, "--output", tmp_path / "parts", *tiny_loop, "--iterations", iterations, "--set", "Loop Start.on_existing=resume")
        assert done.status == 0, done.err
    whole, parts = (load_file(folder / "quickstart/checkpoints/0000002.safetensors") for folder in (tmp_path, tmp_path / "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(value, parts[name]) for name, value in whole.items())
    for row in rows(tmp_path / "quickstart"):
        (reward,) = row["rewards"].values()
        assert reward["used_mean"] == pytest.approx(0.5) and reward["mean"] != pytest.approx(0.5)
        assert (row["trained_samples"], row["transitions"], row["ratio_deviation"]) == (4, 8, 0.0)  # 2 of 3 steps of 2 of 3 in 2 groups


def test_a_best_of_that_is_more_than_the_group_is_one_line(cli, loop_only, saved, tiny_loop, tmp_path):
    done = cli("run", saved(loop_only), "--output", tmp_path, *tiny_loop, "--set", "Advantage.best_of=4")
    assert done.status == 3 and len(done.verdict) == 1
    assert 'node 7 "Advantage" (DanceGRPOAdvantage): input "best_of": found 4, accepted: 0 (all), or an even number up to the 3 of a group' in done.verdict[0]


def test_a_run_from_before_the_inputs_were_there_is_the_same_run(cli, loop_only, saved, tiny_loop, tmp_path):
    for name in ("combine", "best_of"):
        loop_only["7"]["inputs"].pop(name, None)
    assert cli("run", saved(loop_only), "--output", tmp_path, *tiny_loop).status == 0
    loop_only["7"]["inputs"] |= {"best_of": 0, "best_of_end": -1, "combine": "normalise each, then sum"}
    done = cli("run", saved(loop_only), "--output", tmp_path, *tiny_loop)
    assert done.status == 0 and "is finished and unchanged; nothing is trained" in "\n".join(done.err)
    loop_only["7"]["inputs"]["best_of"] = 2
    done = cli("run", saved(loop_only), "--output", tmp_path, *tiny_loop, "--set", "Loop Start.on_existing=resume")
    assert done.status == 3 and "Advantage.best_of was" in done.verdict[0]
