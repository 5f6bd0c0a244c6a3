"""Watch rewards: scored on held-out prompts while a run trains and never trained on, so that a policy that cheats its own reward is found out.

`watch.jsonl` in the run's folder holds a line an evaluation, the first of iteration 0; `checkpoints/best` the state of the best one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import processes
from ..workflow.host import host
from . import checkpoints, metrics
from .folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from ..grpo.protocol import Conditioning
    from .evaluate import HeldOut
    from .live_policy import LivePolicy


@dataclass(frozen=True)
class Rule:
    """When a run is to stop: a reward's mean lies by more than its `max_drops` (in order; 0: it is only watched) below `reference`,
    which is its best so far or its start, in `patience` evaluations in a row."""

    max_drops: tuple[float, ...]
    patience: int = 2
    reference: str = "best"


def falls(rows: Sequence[dict[str, Any]], rule: Rule) -> list[str]:
    """For each evaluation what has fallen too far, in words; "" where nothing has."""
    found, references = [], {}
    for row in rows:
        fallen = []
        for (name, value), limit in zip(row["rewards"].items(), rule.max_drops):
            if name not in references or rule.reference == "best" and value > references[name][0]:
                references[name] = value, row["iteration"]
            before, when = references[name]
            if limit and before - value > limit:
                fallen.append(f"{name} is {value:.4f}, {before - value:.4f} below its {rule.reference} (iteration {when}) and more than {limit:g}")
        found.append(" and ".join(fallen))
    return found


class WatchLog:
    """A run's evaluations, what the rule says of them, and the best checkpoint, which is kept beside the others.

    The best is by the first reward, among the evaluations in which the rule finds nothing fallen: the start is always one of them.
    """

    def __init__(self, folder: RunFolder, rule: Rule | None):
        self._folder, self._rule = folder, rule or Rule(())
        self.saved = 0  # iteration of the run's last checkpoint: what was the best there stays on disk, for a killed run goes on from there
        self.settle: Callable[[], None] = lambda: None  # waits for a checkpoint that is being written
        self.rows = metrics.read(folder.watch) if processes.is_first() else []  # the others are told: their view of a shared folder may be older

    def cut_after(self, iteration: int) -> None:
        """Drops the evaluations after `iteration`, and a line that was broken off: a resumed run makes them again."""
        if self._folder.watch.is_file():
            metrics.cut_after(self._folder.watch, iteration)
            self.rows = metrics.read(self._folder.watch)

    @property
    def verdict(self) -> str:
        """Why the run is to stop, in one line; "" where it is not."""
        last = falls(self.rows, self._rule)[-self._rule.patience:]
        if len(last) < self._rule.patience or not all(last):
            return ""
        return last[-1] + (f", in {self._rule.patience} evaluations in a row" if self._rule.patience > 1 else "")

    @property
    def best(self) -> dict[str, Any] | None:
        """The best of the evaluations whose checkpoints are kept."""
        kept = {int(path.stem) for path in self._folder.best.glob("*.safetensors")}
        return self._best_of([row for row in self._whole() if row["iteration"] in kept])

    def _whole(self) -> list[dict[str, Any]]:
        return [row for row, fallen in zip(self.rows, falls(self.rows, self._rule)) if not fallen]

    @staticmethod
    def _best_of(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        return max(rows, key=lambda row: next(iter(row["rewards"].values())), default=None)  # of equal ones the first

    def add(self, row: dict[str, Any], state: dict[str, Tensor], micro_batch: int) -> None:
        """Another evaluation, of a learner's `state`."""
        processes.on_first(lambda: self._write(row, state, micro_batch), told=False)
        if not processes.is_first():
            self.rows.append(row)

    def _write(self, row: dict[str, Any], state: dict[str, Tensor], micro_batch: int) -> None:
        self.settle()
        former = self._best_of([r for r in self._whole() if r["iteration"] <= self.saved])
        before = self.best
        self.rows.append(row)
        if any(whole is row for whole in self._whole()) and self._best_of([*([before] if before else []), row]) is row:
            checkpoints.save(self._folder.best, checkpoints.Checkpoint(row["iteration"], state, micro_batch), kept=0)
            for path in self._folder.best.glob("*.safetensors"):
                if int(path.stem) not in (row["iteration"], former and former["iteration"]):
                    path.unlink()
        metrics.append(self._folder.watch, row)  # last: a row promises its checkpoint
        host().say(f"watch, iteration {row['iteration']}: {self._line(row)}")

    def _line(self, row: dict[str, Any]) -> str:
        said = []
        for name, value in row["rewards"].items():
            best = max(self.rows, key=lambda r: r["rewards"][name])
            told = "" if row is self.rows[0] else f" (start {self.rows[0]['rewards'][name]:.4f}, best {best['rewards'][name]:.4f} in {best['iteration']})"
            said.append(f"{name} {value:.4f}{told}")
        return ", ".join(said)

    def better(self) -> str:
        """Where a better one than the last evaluation's is, in one line; "" where none is."""
        best = self.best
        if best is None or best["iteration"] >= self.rows[-1]["iteration"]:
            return ""
        return f"Watch: the best by {_first(best)} is that of iteration {best['iteration']}; it is kept in {self._folder.best}"

    def given(self, iteration: int | None) -> str:
        """What a run that is stopped gives, in words: the LoRA of this iteration, or where that is None the last."""
        if iteration is None:
            return f"the best is missing in {self._folder.best}, or damaged: what is given is that of the last iteration"
        row = next(row for row in self.rows if row["iteration"] == iteration)
        which = f"that of iteration {iteration}" if iteration else "the one that training began with"
        return f"what is given is {which}, the best by {_first(row)}"

    def best_state(self) -> tuple[int, dict[str, Tensor]] | None:
        """The best evaluation's iteration, and the learner's state there; None where there is none, or it is damaged."""
        if (row := self.best) is None or (found := checkpoints.load(checkpoints.path_of(self._folder.best, row["iteration"]))) is None:
            return None
        return found[0], found[1]


def _first(row: dict[str, Any]) -> str:
    name, value = next(iter(row["rewards"].items()))
    return f"{name} ({value:.4f})"


class Watch:
    """Evaluates a policy in training, in every `every`-th iteration after its update; and once as it was before the first."""

    def __init__(self, held_out: HeldOut, every: int):
        self._held_out, self._every = held_out, every
        self._conditioning: Conditioning | None = None

    def __call__(self, live: LivePolicy) -> dict[str, Any] | None:
        """Called once an iteration; the evaluation that was due, or None. The training does not depend on it."""
        log, learner, iteration = live.watch, live.learner, live.iteration + 1
        if not log.rows:
            self._evaluate(live, live.iteration, live.state)
        return self._evaluate(live, iteration, learner.state()) if iteration % self._every == 0 else None

    def _evaluate(self, live: LivePolicy, iteration: int, state: dict[str, Tensor]) -> dict[str, Any]:
        from .prompt_cache import encode

        start, held_out = time.perf_counter(), self._held_out

        def tick(done: int, total: int) -> None:
            host().check_interrupt()
            host().progress(done, total)

        if self._conditioning is None:
            self._conditioning = encode(live.policy, held_out.prompts, held_out.plan.size)
        with live.learner.holding(live.learner.result(state)):
            scores = held_out.score(held_out.draw(live.policy, self._conditioning, tick))
        row = {"iteration": iteration, "rewards": {name: values.double().mean().item() for name, values in scores.items()},
               "averaged": live.learner.ema is not None, "seconds": round(time.perf_counter() - start, 4), "time": round(time.time(), 3)}
        live.watch.add(row, state, live.settings.micro_batch)
        return row
