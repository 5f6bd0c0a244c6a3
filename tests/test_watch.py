"""Watch rewards: they are scored on held-out prompts and train nothing, the rule stops the run, and the best checkpoint is the one given."""

import json

import pytest
import torch
from safetensors.torch import load_file

from comfy_dancegrpo.runs import checkpoints, watch
from comfy_dancegrpo.runs.folder import RunFolder
from comfy_dancegrpo.runs.watch import Rule, WatchLog, falls
from comfy_dancegrpo.trainer.console import ConsoleHost
from comfy_dancegrpo.workflow.host import Host, use


# -- the rule, worked by hand -----------------------------------------------------------------------------------------------------
def rows(*values, names=("first",)):
    """Evaluations, ten iterations apart; a value for each name."""
    columns = [value if isinstance(value, tuple) else (value,) for value in values]
    return [{"iteration": 10 * k, "rewards": dict(zip(names, column))} for k, column in enumerate(columns)]


@pytest.mark.parametrize("rule, fallen", [
    (Rule((0.1,), reference="best"), [0, 0, 0, 1, 1, 0]),  # below 0.8
    (Rule((0.1,), reference="start"), [0, 0, 0, 0, 1, 0]),  # below 0.6
    (Rule((0.25,), reference="best"), [0, 0, 0, 0, 1, 0]),
    (Rule((0.0,)), [0] * 6),  # only watched
    (Rule(()), [0] * 6),
])
def test_what_counts_as_a_fall(rule, fallen):
    assert [bool(found) for found in falls(rows(0.6, 0.7, 0.8, 0.65, 0.45, 0.75), rule)] == [bool(x) for x in fallen]


def test_a_fall_of_just_as_much_as_is_accepted_is_none():
    assert falls(rows(0.75, 0.5), Rule((0.25,))) == ["", ""]  # exact in binary


def test_each_reward_has_its_own_limit():
    found = falls(rows((0.5, 20.0), (0.5, 19.0), (0.2, 19.0), names=("a", "b")), Rule((0.1, 0.0)))
    assert found[:2] == ["", ""] and found[2].startswith("a is 0.2000, 0.3000 below its best (iteration 0) and more than 0.1") and "b is" not in found[2]
    found = falls(rows((0.5, 20.0), (0.2, 19.0), names=("a", "b")), Rule((0.1, 0.5)))
    assert "a is 0.2000" in found[1] and "b is 19.0000, 1.0000 below" in found[1]


class Listening(Host):
    def __init__(self, output):
        super().__init__(output=output)
        self.said = []

    def say(self, line):
        self.said.append(line)


@pytest.fixture
def folder(tmp_path):
    with use(Listening(tmp_path)) as host:
        found = RunFolder(tmp_path / "run")
        found.path.mkdir()
        found.said = host.said
        yield found


def state(k):
    return {"parameters.w": torch.full((2,), float(k)), "version": torch.tensor(k)}


def log_of(folder, values, rule, saved=()):
    """A run's log after these evaluations; `saved`: iterations that end with a checkpoint."""
    log = WatchLog(folder, rule)
    for row in rows(*values):
        log.add(row, state(row["iteration"]), 4)
        log.saved = row["iteration"] if row["iteration"] in saved else log.saved
    return log


def test_a_first_line_that_was_broken_off_is_dropped(folder):
    folder.watch.write_text('{"iteration": 0, "rew')  # a full disk
    log = WatchLog(folder, None)
    log.cut_after(0)
    log.add(rows(0.5)[0], state(0), 4)
    assert WatchLog(folder, None).rows == rows(0.5)


@pytest.mark.parametrize("patience, verdicts", [(1, [0, 0, 1, 0, 1, 1]), (2, [0, 0, 0, 0, 0, 1]), (3, [0] * 6)])
def test_patience_counts_evaluations_in_a_row(folder, patience, verdicts):
    log, found = WatchLog(folder, Rule((0.1,), patience)), []
    for row in rows(0.5, 0.6, 0.4, 0.55, 0.4, 0.3):
        log.add(row, state(0), 4)
        found.append(log.verdict)
    assert [bool(line) for line in found] == [bool(x) for x in verdicts]
    if patience == 2:
        assert found[-1] == "first is 0.3000, 0.3000 below its best (iteration 10) and more than 0.1, in 2 evaluations in a row"


def test_the_best_is_kept_and_comes_back_bit_for_bit(folder):
    log = log_of(folder, (0.5, 0.7, 0.6, 0.7), Rule((0.3,)))
    assert log.best["iteration"] == 10  # of two equal ones the first
    iteration, found = log.best_state()
    assert iteration == 10 and torch.equal(found["parameters.w"], torch.full((2,), 10.0))
    assert sorted(path.stem for path in folder.best.glob("*")) == ["0000000", "0000010"]
    assert WatchLog(folder, Rule((0.3,))).best["iteration"] == 10  # another process reads the same


def test_the_best_of_the_last_checkpoint_stays_for_a_run_that_is_killed(folder):
    log_of(folder, (0.1, 0.2, 0.3, 0.4, 0.5), Rule(()), saved=(20,))
    assert sorted(path.stem for path in folder.best.glob("*")) == ["0000020", "0000040"]
    log = WatchLog(folder, Rule(()))
    log.cut_after(20)
    assert [row["iteration"] for row in log.rows] == [0, 10, 20] and log.best["iteration"] == 20
    before = (folder.path / "watch.jsonl").read_bytes()
    for row in rows(0.1, 0.2, 0.3, 0.4, 0.5)[3:]:
        log.add(row, state(row["iteration"]), 4)
    assert log.best["iteration"] == 40 and (folder.path / "watch.jsonl").read_bytes().startswith(before)


def test_what_has_fallen_is_never_the_best(folder):
    """By the first reward the last evaluation is the best, but the second has fallen there."""
    log = WatchLog(folder, Rule((0.0, 0.1), 1))
    for row in rows((0.1, 0.9), (0.2, 0.85), (0.9, 0.3), names=("trained on by mistake", "guard")):
        log.add(row, state(row["iteration"]), 4)
    assert log.verdict.startswith("guard is 0.3000") and log.best["iteration"] == 10


def test_a_damaged_best_is_said_and_the_last_is_given(folder):
    log = log_of(folder, (0.5, 0.4), Rule((0.05,), 1))
    path = checkpoints.path_of(folder.best, 0)
    path.write_bytes(path.read_bytes()[:-1])
    assert log.verdict and log.best_state() is None
    assert any(f"checkpoint {path} is damaged" in line for line in folder.said) and "that of the last iteration" in log.given(None)


# -- in a run -----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def watched(loop_only, prompt):
    """`watched(**inputs)`: the quickstart's loop with a Watch in its body, which scores by the exact reward and by CLIP."""
    def build(**inputs):
        sampling = {name: value for name, value in prompt["16"]["inputs"].items() if name not in ("policy", "lora", "prompts", "reward", "grid_columns", "grid_rows", "reward_2")}
        small = {"steps": 2, "batch_size": 4, "samples_per_prompt": 1, "every": 1, "max_drop": 0.0, "patience": 1, "below": "start"}
        graph = {**loop_only, "14": {**prompt["14"], "inputs": {**prompt["14"]["inputs"], "limit": 6}}, "15": prompt["15"]}
        graph["20"] = {"class_type": "DanceGRPOWatch", "_meta": {"title": "Watch"}, "inputs": {
            "policy": ["4", 0], "update": ["9", 0], "prompts": ["14", 0], "reward": ["15", 0], "reward_2": ["3", 0], **sampling, **small, **inputs}}
        return graph
    return build


def lora(folder):
    return load_file(folder / "lora/quickstart.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def evaluations(folder):
    found = [json.loads(line) for line in (folder / "watch.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: row[key] for key in ("iteration", "rewards", "averaged")} for row in found]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_that_is_watched_is_the_run_that_is_not(cli, watched, loop_only, saved, tiny_loop, tmp_path, ema):
    words = [*tiny_loop, "--iterations", 3, "--set", f"Loop Start.ema_decay={ema}"]
    done = cli("run", saved(watched(every=2)), "--output", tmp_path / "watched", *words)
    assert done.status == 0, done.err
    assert cli("run", saved(loop_only), "--output", tmp_path / "alone", *words).status == 0
    assert equal(lora(tmp_path / "watched/quickstart"), lora(tmp_path / "alone/quickstart"))
    found = evaluations(tmp_path / "watched/quickstart")
    assert [row["iteration"] for row in found] == [0, 2] and all(row["averaged"] == bool(ema) for row in found)
    assert [list(row["rewards"]) for row in found] == [["shapes_agreement", "clip_score"]] * 2 and found[0]["rewards"] != found[1]["rewards"]
    assert not (tmp_path / "alone/quickstart/watch.jsonl").exists()
    assert sum("watch, iteration" in line for line in done.err) == 2


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_is_watched_is_what_evaluate_finds(cli, watched, saved, tiny_loop, tmp_path, prompt, ema):
    """The same figures, to the last digits, before training and after, of the moving average where that is on."""
    graph = watched(every=2)
    graph["16"] = {**prompt["16"], "inputs": {**prompt["16"]["inputs"], **{name: graph["20"]["inputs"][name] for name in ("steps", "batch_size", "samples_per_prompt")},
                                              "reward": ["15", 0], "reward_2": ["3", 0]}}
    done = cli("run", saved(graph), "--output", tmp_path, *tiny_loop, "--set", f"Loop Start.ema_decay={ema}")
    assert done.status == 0, done.err
    figures = json.loads((tmp_path / "quickstart/summary.json").read_text(encoding="utf-8"))["evaluations"]
    before, after = evaluations(tmp_path / "quickstart")
    assert figures.keys() == before["rewards"].keys()
    for name, values in figures.items():
        assert before["rewards"][name] == pytest.approx(values["before"], abs=1e-6) and after["rewards"][name] == pytest.approx(values["after"], abs=1e-6)


@pytest.fixture
def falling(monkeypatch):
    """The watch rewards in the order in which they are scored: up, and then down."""
    from comfy_dancegrpo.runs.evaluate import HeldOut

    score, values = HeldOut.score, iter([0.5, 0.6, 0.3, 0.2, 0.1])

    def told(self, pictures):
        found, value = score(self, pictures), next(values)
        return {name: torch.full_like(scores, value) for name, scores in found.items()}

    monkeypatch.setattr(HeldOut, "score", told)


def test_the_rule_stops_the_run_and_the_best_is_given(cli, watched, loop_only, saved, tiny_loop, tmp_path, falling, monkeypatch):
    words = [*tiny_loop, "--iterations", 9]
    done = cli("run", saved(watched(max_drop=0.2, patience=2, below="best")), "--output", tmp_path / "watched", *words)
    assert done.status == 0, done.err
    folder = tmp_path / "watched/quickstart"
    line = "shapes_agreement is 0.2000, 0.4000 below its best (iteration 1) and more than 0.2, in 2 evaluations in a row"
    given = "what is given is that of iteration 1, the best by shapes_agreement (0.6000)"
    assert f"Watch: {line}; {given}" in done.err
    assert any("stopped after iteration 3: checkpoint in" in said and 'resume and a larger "max_drop" go on from there' in said for said in done.err)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert (record["state"], record["iterations"], record["stopped_by"]) == ("stopped", 3, line)
    monkeypatch.undo()
    assert cli("run", saved(loop_only), "--output", tmp_path / "one", *tiny_loop, "--iterations", 1).status == 0
    # what Save LoRA wrote is the LoRA of iteration 1, though another schedule would follow: the learning rate does not look ahead
    assert equal(lora(folder), lora(tmp_path / "one/quickstart"))
    again = [*words, "--set", "Loop Start.on_existing=resume"]
    done = cli("run", saved(watched(max_drop=0.2, patience=2, below="best")), "--output", tmp_path / "watched", *again)
    assert done.status == 0 and f"Watch: {line}; {given}" in done.err and len(evaluations(folder)) == 4  # nothing is trained
    done = cli("run", saved(watched(max_drop=0.0)), "--output", tmp_path / "watched", *again)
    assert done.status == 0 and any("goes on after iteration 3" in said for said in done.err)
    assert [row["iteration"] for row in evaluations(folder)] == list(range(10))
    assert cli("run", saved(loop_only), "--output", tmp_path / "all", *words).status == 0
    assert equal(lora(folder), lora(tmp_path / "all/quickstart"))


@pytest.mark.parametrize("every, at", [(1, 3), (1, 1)])
def test_killed_and_resumed_is_left_alone(cli, watched, saved, tiny_loop, tmp_path, monkeypatch, every, at):
    """Killed after an evaluation and before its iteration is counted; a checkpoint every other iteration."""
    graph, words = saved(watched(every=every)), [*tiny_loop, "--iterations", 4, "--set", "Loop Start.checkpoint_every=2"]
    assert cli("run", graph, "--output", tmp_path / "alone", *words).status == 0
    end, calls = watch.Watch.__call__, []

    def stop(self, live):
        found = end(self, live)
        calls.append(live.iteration)
        if live.iteration + 1 == at:
            raise KeyboardInterrupt
        return found

    from comfy_dancegrpo.runs.session import Session

    with monkeypatch.context() as patch:
        patch.setattr(watch.Watch, "__call__", stop)
        patch.setattr(Session, "_keep", lambda self, broken_off: None)  # as a killed one, which writes nothing more
        patch.setattr(Session, "_let_go", lambda self: self._lock.release())
        assert cli("run", graph, "--output", tmp_path / "killed", *words).status != 0
    done = cli("run", graph, "--output", tmp_path / "killed", *words, "--set", "Loop Start.on_existing=resume")
    assert done.status == 0 and calls[-1] == at - 1, done.err
    alone, resumed = tmp_path / "alone/quickstart", tmp_path / "killed/quickstart"
    assert equal(lora(alone), lora(resumed)) and evaluations(alone) == evaluations(resumed)
    assert [path.name for path in sorted((alone / "checkpoints/best").glob("*"))][-1] == [path.name for path in sorted((resumed / "checkpoints/best").glob("*"))][-1]


@pytest.mark.parametrize("change, words", [
    (lambda graph: graph["20"]["inputs"].update(steps=3), "was made by another workflow (Watch.steps was 2 and is 3)"),
    (lambda graph: graph.pop("20"), "was made by another workflow"),
])
def test_what_is_watched_belongs_to_the_run(cli, watched, saved, tiny_loop, tmp_path, change, words):
    graph = watched()
    assert cli("run", saved(graph), "--output", tmp_path, *tiny_loop, "--iterations", 1).status == 0
    change(graph)
    done = cli("run", saved(graph), "--output", tmp_path, *tiny_loop, "--set", "Loop Start.on_existing=resume")
    assert done.status == 3 and words in done.verdict[0]


def test_two_of_them_and_inputs_from_inside_the_loop_are_refused_in_one_line(cli, watched, saved, tiny_loop, tmp_path):
    graph = watched()
    graph["21"] = {**graph["20"]}
    done = cli("run", saved(graph), "--output", tmp_path, *tiny_loop)
    assert done.status == 3 and "found 2 Watch nodes in the loop's body, accepted: one" in done.verdict[0]
    graph = watched(prompts=["4", 1])
    done = cli("run", saved(graph), "--output", tmp_path, *tiny_loop)
    assert done.status == 3 and 'node 20 "Watch" (DanceGRPOWatch): input "prompts": found a link from inside the loop' in done.verdict[0]


def test_prompts_that_are_trained_on_are_told(cli, watched, saved, tiny_loop, tmp_path):
    done = cli("run", saved(watched(prompts=["2", 0])), "--output", tmp_path, *tiny_loop, "--set", "2.limit=6", "--iterations", 1)
    assert done.status == 0 and any("Watch: 6 of its 6 prompts were trained on" in line for line in done.err)


def test_an_interrupt_in_an_evaluation_leaves_the_policy_in_training_alone(cli, watched, saved, tiny_loop, loop_only, tmp_path, monkeypatch):
    """It comes while the moving average, or the start, is in the policy's place."""
    asked, check = [], ConsoleHost.check_interrupt

    def interrupt(self):
        check(self)
        if asked and asked.pop():
            from comfy_dancegrpo.errors import Interrupted
            raise Interrupted("stopped")

    from comfy_dancegrpo.runs.evaluate import HeldOut

    draw, count = HeldOut.draw, []

    def told(self, policy, conditioning, tick):
        count.append(1)
        if len(count) == 3:  # of iteration 2
            asked.append(True)
        return draw(self, policy, conditioning, tick)

    words = [*tiny_loop, "--iterations", 3, "--set", "Loop Start.ema_decay=0.9"]
    with monkeypatch.context() as patch:
        patch.setattr(ConsoleHost, "check_interrupt", interrupt)
        patch.setattr(HeldOut, "draw", told)
        done = cli("run", saved(watched()), "--output", tmp_path / "watched", *words)
    assert done.status == 130 and any("stopped after iteration 1" in line for line in done.err)
    assert cli("run", saved(watched()), "--output", tmp_path / "watched", *words, "--set", "Loop Start.on_existing=resume").status == 0
    assert cli("run", saved(loop_only), "--output", tmp_path / "alone", *words).status == 0
    assert equal(lora(tmp_path / "watched/quickstart"), lora(tmp_path / "alone/quickstart"))


def test_weights_that_are_held_reach_the_policy_and_its_own_come_back_bit_for_bit():
    """Where the parameters are masters of what the policy computes with, that is told of both changes; and an error brings them back too."""
    from comfy_dancegrpo.grpo.learner import Learner, OptimizerSettings

    master, told = torch.nn.Parameter(torch.tensor([0.1, 1e-40, -0.0])), []
    learner = Learner(None, {"w": master}, OptimizerSettings(ema_decay=0.5), "run", lambda: told.append(master.detach().clone()))
    own, other = master.detach().clone(), torch.tensor([7.0, 8.0, 9.0])
    with pytest.raises(ValueError, match="in the block"), learner.holding({"w": other}):
        assert torch.equal(told[-1], other)
        raise ValueError("in the block")
    assert len(told) == 2 and torch.equal(told[-1].view(torch.int32), own.view(torch.int32)) and learner.parameters["w"] is master and master.requires_grad
    state = learner.state() | {"ema.w": other}
    assert torch.equal(learner.result(state)["w"], other)
