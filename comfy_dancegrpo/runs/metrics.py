"""metrics.jsonl: one line per iteration."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .folder import write_atomically

if TYPE_CHECKING:  # the rest of this file reads and writes lines, and a page's server imports no torch for it
    from ..grpo.protocol import Column
    from ..grpo.update import UpdateStats


def row(iteration: int, stats: UpdateStats, total_seconds: float, held_up: float = 0.0) -> dict[str, Any]:
    """What is written of one iteration (iteration counts from 1).

    reward_mean and reward_std are over the samples of the weighted sum of raw scores; group_std is the mean spread within
    groups. Each reward's mean and std are of its raw scores too; used_mean, where they were adjusted, of what trained in their place.
    below_threshold samples did not train because their advantage was too near to 0, trained_samples went into the update; denoiser_calls count
    samples, padding included and told apart; seconds are by phase, of checkpoints those that training was `held_up` by them before this iteration.
    """
    scores = stats.advantages.scores
    rollout = scores.rollout
    total = scores.total
    group_std = sum(total[rollout.groups == g].std().item() for g in range(len(stats.advantages.flat)))
    return {
        "iteration": iteration,
        "reward_mean": total.mean().item(),
        "reward_std": total.std().item(),
        "group_std": group_std / len(stats.advantages.flat),
        "rewards": {column.name: _of_reward(column) for column in scores.columns},
        "ratio_deviation": stats.ratio_deviation,
        "clip_fraction": stats.clip_fraction,
        "approx_kl": stats.approx_kl,
        **({} if stats.reference_kl is None else {"reference_kl": stats.reference_kl}),
        "grad_norm": stats.grad_norm,
        "loss": stats.loss,
        "learning_rate": stats.learning_rate,
        "flat_groups": int(stats.advantages.flat.sum()),
        "below_threshold": stats.advantages.below_threshold,
        "trained_samples": int(stats.advantages.trained.sum()),
        "transitions": stats.transitions,
        "skipped_steps": stats.skipped_steps,
        "denoiser_calls": {
            "forward": rollout.calls.forward + stats.calls.forward,
            "backward": rollout.calls.backward + stats.calls.backward,
            "padded": rollout.calls.padded + stats.calls.padded,
        },
        "seconds": {**{k: round(v, 4) for k, v in rollout.seconds.items()}, "reward": round(scores.seconds, 4),
                    "update": round(stats.seconds, 4), "checkpoint": round(held_up, 4), "total": round(total_seconds + held_up, 4)},
        "time": round(time.time(), 3),
    }


def _of_reward(column: Column) -> dict[str, float]:
    adjusted = {} if column.adjusted is None else {"used_mean": column.adjusted.mean().item()}
    return {"mean": column.raw.mean().item(), "std": column.raw.std().item(), "weight": column.weight, **adjusted}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows so far; an unfinished last line (the run was killed while writing) is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class Follower:
    """The columns of files that grow, of which only what was appended since the last call is read.

    names: of the columns, the file's own. `kept` files are remembered, those that were asked for last. Threads may share one.
    """

    def __init__(self, names: tuple[str, ...], kept: int = 8):
        self._names, self._kept = names, kept
        self._known: dict[Path, _Known] = {}
        self._lock = threading.Lock()

    def columns(self, path: Path, points: int) -> dict[str, list[Any]]:
        """At most `points` + 1 values of each column, evenly apart, the last always.

        A value that a row has not is None; an unfinished last line is left out, as by `read`. No file has no rows.
        """
        with self._lock:
            known = self._known.pop(path, None)
            try:
                with path.open("rb", buffering=0) as file:
                    known = self._follow(file, known)
            except FileNotFoundError:
                known = _Known(None, self._names)
            else:
                self._known[path] = known
            while len(self._known) > self._kept:
                del self._known[next(iter(self._known))]
            count = len(known.columns[self._names[0]])
            stride = max(1, -(-count // points))
            places = [*range(0, count, stride), *([count - 1] if count and (count - 1) % stride else [])]
            return {name: [values[i] for i in places] for name, values in known.columns.items()}

    def _follow(self, file: BinaryIO, known: _Known | None) -> _Known:
        """What is known of a file after reading on: from its beginning where it is another, or was cut, since it was known."""
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        if known is not None and known.identity == identity:
            file.seek(known.end - len(known.last))  # a file number may be given again: the last line known must still be there
            if _read(file, len(known.last)) != known.last:
                known = None
        else:
            known = None
        if known is None:
            known = _Known(identity, self._names)
            file.seek(0)
        appended = _read(file, max(0, status.st_size - known.end))
        lines = appended.split(b"\n")[:-1]
        for line in filter(None, lines):
            row = json.loads(line)
            for name, values in known.columns.items():
                values.append(row.get(name))
        if lines:
            known.last = lines[-1] + b"\n"
            known.end += sum(len(line) + 1 for line in lines)
        return known


class _Known:
    """What was read of a file: up to which byte, its last line, and the columns."""

    def __init__(self, identity: tuple[int, int] | None, names: tuple[str, ...]):
        self.identity, self.end, self.last = identity, 0, b""
        self.columns: dict[str, list[Any]] = {name: [] for name in names}


def _read(file: BinaryIO, count: int) -> bytes:
    """So many bytes of an unbuffered file, or those up to its end."""
    parts = []
    while count > 0 and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def append(path: Path, values: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(values) + "\n")


def cut_after(path: Path, iteration: int) -> None:
    """Drops the rows after `iteration`: a resumed run writes them again."""
    kept = [r for r in read(path) if r["iteration"] <= iteration]
    write_atomically(path, "".join(json.dumps(r) + "\n" for r in kept))
