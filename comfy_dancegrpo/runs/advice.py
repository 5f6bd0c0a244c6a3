"""What a run's metrics tell that users of published trainers came upon: a line each, once a run, that names a section of a page. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

PAGE = "docs/it_does_not_learn.md"
Row = dict[str, Any]
WINDOW = 5  # iterations in a row, before anything is told of them


def flat_groups(rows: list[Row]) -> str | None:
    last = rows[-WINDOW:]
    if len(last) == WINDOW and all(2 * row["flat_groups"] >= row["groups"] for row in last):
        return f"half of the groups or more have had no spread for {WINDOW} iterations, and train nothing"


def alike(rows: list[Row]) -> str | None:
    share = _mean(rows[-WINDOW:], lambda row: row["pictures"]["near_duplicates"])
    if len(rows) >= WINDOW and share > 0.5:
        return f"the pictures of a group look alike ({share:.0%} of the pairs in the last {WINDOW} iterations)"


def clipped(rows: list[Row]) -> str | None:
    share = _mean(rows[-WINDOW:], lambda row: row["clip_fraction"])
    if len(rows) >= WINDOW and share > 0.9:
        return f"{share:.0%} of the transitions are out of the clip range (in the last {WINDOW} iterations)"


def gradient(rows: list[Row]) -> str | None:
    before, now = [row["grad_norm"] for row in rows[-51:-1] if row["grad_norm"] > 0], rows[-1]["grad_norm"]
    if len(before) >= 2 * WINDOW and now > 10 * statistics.median(before):
        return f"the gradient's norm is {now:.3g}, {now / statistics.median(before):.0f} times that of the iterations before"


def flat_reward(rows: list[Row]) -> str | None:
    if len(rows) < 60:
        return None
    first, last = ([row["reward_mean"] for row in part] for part in (rows[:20], rows[-20:]))
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / 20)
    if statistics.mean(last) - statistics.mean(first) < error:
        return f"the reward has not risen: {statistics.mean(first):.4g} in the first 20 iterations, {statistics.mean(last):.4g} in the last"


def changed(rows: list[Row]) -> str | None:
    """The reward has risen, and the pictures are not what they were."""
    if len(rows) < 4 * WINDOW or _mean(rows[-WINDOW:], _reward) <= _mean(rows[:WINDOW], _reward):
        return None
    before, now = ({name: _mean(part, lambda row: row["pictures"][name]) for name in ("sharpness", "saturation", "grid")}
                   for part in (rows[:WINDOW], rows[-WINDOW:]))
    for name, least in (("sharpness", 3), ("saturation", 1.75)):
        if min(before[name], now[name]) > 0 and not 1 / least < now[name] / before[name] < least:
            return f"the reward rises, and the pictures' {name} went from {before[name]:.3g} to {now[name]:.3g}"
    if now["grid"] > before["grid"] + 6:
        return f"the reward rises, and a grid comes out in the pictures ({before['grid']:.1f} to {now['grid']:.1f} dB)"


CHECKS: dict[str, Callable[[list[Row]], str | None]] = {
    "groups-without-spread": flat_groups,
    "the-pictures-of-a-group-are-alike": alike,
    "nothing-but-clipped-steps": clipped,
    "the-gradients-norm-jumps": gradient,
    "the-reward-does-not-rise": flat_reward,
    "the-reward-rises-and-the-pictures-get-worse": changed,
}
"""By the section of the page that tells what to do."""


def see(section: str) -> str:
    return f"see {PAGE}#{section}"


class Advice:
    """Of one run, whose rows of metrics it is given in turn. groups: sampled in each iteration."""

    def __init__(self, groups: int):
        self._groups, self._rows, self._said = groups, [], set[str]()

    def of(self, row: Row) -> list[str]:
        """The lines that this row gives rise to."""
        self._rows.append({**row, "groups": self._groups})
        del self._rows[20:-60]  # the first and the last are all that is looked at
        lines = []
        for section, check in CHECKS.items():
            if section not in self._said and all(name in row for name in ("pictures", "grad_norm")) and (line := check(self._rows)):
                self._said.add(section)
                lines.append(f"iteration {row['iteration']}: {line}; {see(section)}")
        return lines

    def follow(self, rows: Iterable[Row]) -> None:
        """Of a run that is resumed: what was said is not said again."""
        for row in rows:
            self.of(row)


def _mean(rows: list[Row], of: Callable[[Row], float]) -> float:
    return statistics.fmean(map(of, rows)) if rows else math.nan


def _reward(row: Row) -> float:
    return row["reward_mean"]
