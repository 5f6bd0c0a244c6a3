"""metrics.jsonl: one line per iteration."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folder import write_atomically

if TYPE_CHECKING:  # the rest of this file reads and writes lines, and a page's server imports no torch for it
    from ..grpo.update import UpdateStats


def row(iteration: int, stats: UpdateStats, learning_rate: float, total_seconds: float) -> dict[str, Any]:
    """What is written of one iteration (iteration counts from 1).

    reward_mean and reward_std are over the samples of the weighted sum of raw scores; group_std is the mean spread within
    groups; denoiser_calls count samples, padding included and told apart; seconds are by phase.
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
        "rewards": {name: {"mean": v.mean().item(), "std": v.std().item(), "weight": w} for name, w, v in scores.columns},
        "ratio_deviation": stats.ratio_deviation,
        "clip_fraction": stats.clip_fraction,
        "approx_kl": stats.approx_kl,
        "grad_norm": stats.grad_norm,
        "loss": stats.loss,
        "learning_rate": learning_rate,
        "flat_groups": int(stats.advantages.flat.sum()),
        "transitions": stats.transitions,
        "denoiser_calls": {
            "forward": rollout.calls.forward + stats.calls.forward,
            "backward": rollout.calls.backward + stats.calls.backward,
            "padded": rollout.calls.padded + stats.calls.padded,
        },
        "seconds": {**{k: round(v, 4) for k, v in rollout.seconds.items()}, "reward": round(scores.seconds, 4),
                    "update": round(stats.seconds, 4), "total": round(total_seconds, 4)},
        "time": round(time.time(), 3),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The rows so far; an unfinished last line (the run was killed while writing) is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def append(path: Path, values: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(values) + "\n")


def cut_after(path: Path, iteration: int) -> None:
    """Drops the rows after `iteration`: a resumed run writes them again."""
    kept = [r for r in read(path) if r["iteration"] <= iteration]
    write_atomically(path, "".join(json.dumps(r) + "\n" for r in kept))
