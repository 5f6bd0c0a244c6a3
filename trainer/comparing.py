"""`dancegrpo compare`: two runs side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfy_dancegrpo.runs import environment, overview

from .listing import console, moved, printable

LONGEST = 120  # characters of a value


def show(first: Path, second: Path) -> None:
    """Prints what two runs did, and in which settings and versions they differ. Raises WorkflowError where one of them is none."""
    from rich.table import Table

    out, runs = console(), (overview.of(first), overview.of(second))
    names = [path.name if first.name != second.name else str(path) for path in (first, second)]
    for title, rows in (("what they did", list(results(*runs))), ("settings that differ", list(settings(first, second))),
                        ("versions that differ", list(versions(first, second)))):
        if not rows:
            out.print(f"{title}: none")
            continue
        table = Table(title=title, title_justify="left", highlight=False)
        for column in ("", *names):
            table.add_column(printable(column), overflow="fold")
        for row in rows:
            table.add_row(*map(printable, row))
        out.print(table)


def results(*runs: overview.Overview) -> Iterator[tuple[str, ...]]:
    """Rows of a name and a value for each run."""
    yield ("state", *(run.state for run in runs))
    yield ("iterations", *(f"{run.iteration}/{run.iterations}" for run in runs))
    yield ("reward, first → last", *(moved(run) for run in runs))
    yield ("best reward (iteration)", *("" if run.best is None else f"{run.best:.4f} ({run.best_at})" for run in runs))
    rewards = [run.rows[-1].get("rewards", {}) if run.rows else {} for run in runs]
    yield ("trained on", *(", ".join(f"{name} x {told.get('weight', 1):g}" for name, told in found.items()) for found in rewards))
    for name in _names(run.watched[-1]["rewards"] if run.watched else {} for run in runs):
        yield (f"watched {name}, start → last", *(_watched(run, name) for run in runs))
    evaluated = [run.seen.get("evaluations") or {} for run in runs]
    for name in _names(evaluated):
        yield (f"evaluated {name}, gain (95 %)", *(_gain(found.get(name)) for found in evaluated))
    yield ("s/iteration", *("" if run.seconds is None else f"{run.seconds:.3f}" for run in runs))
    phases = [_phases(run) for run in runs]
    for name in _names(phases):
        yield (f"  {name}", *(f"{found[name]:.3f}" if name in found else "" for found in phases))


def settings(first: Path, second: Path) -> Iterator[tuple[str, str, str]]:
    """Widgets that differ, nodes that only one has; nodes are paired by their class, those of one class in the order of their ids."""
    ours, theirs = _by_class(first), _by_class(second)
    for key in _names((ours, theirs)):
        a, b = ours.get(key), theirs.get(key)
        if a is None or b is None:
            yield ((a or b)[0], "–" if a is None else "there", "–" if b is None else "there")  # type: ignore[index]
            continue
        for name in _names((a[1], b[1])):
            x, y = a[1].get(name), b[1].get(name)
            if x != y and name != "run_name":
                yield (f"{a[0]}: {name}", _short(x), _short(y))


def versions(first: Path, second: Path) -> Iterator[tuple[str, str, str]]:
    """What each went on with at last; all that the one tells where the other tells nothing is left out."""
    ours, theirs = ({name: value for entry in environment.read(path)[-1:] for name, value in _flat(entry).items()} for path in (first, second))
    for name in _names((ours, theirs)):
        if ours and theirs and ours.get(name) != theirs.get(name):
            yield (name, _short(ours.get(name)), _short(theirs.get(name)))


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    packages = entry.get("packages") if isinstance(entry.get("packages"), dict) else {}
    return {name: value for name, value in entry.items() if name not in ("packages", "from_iteration", "time")} | packages


def _by_class(path: Path) -> dict[tuple[str, int], tuple[str, dict[str, Any]]]:
    found: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {}
    for title, kind, widgets in overview.settings(path):
        found[kind, sum(other == kind for other, _ in found)] = title, widgets
    return found


def _names(tables: Any) -> list[Any]:
    """The keys of several tables, each once, in their order."""
    return list(dict.fromkeys(name for found in tables for name in found))


def _watched(run: overview.Overview, name: str) -> str:
    values = [row["rewards"][name] for row in run.watched if name in row["rewards"]]
    return f"{values[0]:.4f} → {values[-1]:.4f}" if values else ""


def _gain(told: dict[str, Any] | None) -> str:
    if told is None:
        return ""
    low, high = told.get("ci95") or (None, None)
    return f"{told['gain']:+.4f}" + ("" if low is None else f" ({low:+.4f} to {high:+.4f}), {told['n']} prompts")


def _phases(run: overview.Overview) -> dict[str, float]:
    names = _names(row["seconds"] for row in run.rows)
    return {name: sum(row["seconds"].get(name, 0.0) for row in run.rows) / len(run.rows) for name in names if name != "total"}


def _short(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
