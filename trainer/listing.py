"""`dancegrpo runs`: a table of the runs in an output folder."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.runs import live, overview


def show(output: Path) -> None:
    """Prints the runs, the one that moved last first; one whose files are damaged has a row that says so. Raises WorkflowError for no folder."""
    if not output.is_dir():
        raise WorkflowError(f"--output: found {output}, which is not a folder")
    found = live.list_runs(output)
    if not found:
        print(f"no runs in {output}")
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, highlight=False)
    for name in ("run", "state", "iteration", "reward first → last", "best", "s/iteration", "changed"):
        table.add_column(name, justify="left" if name in ("run", "state", "changed") else "right", overflow="fold", no_wrap=name != "run")
    for run in found:
        table.add_row(*map(printable, _row(output / run["name"])))
    console().print(table)
    print("A reward is the mean of up to 10 iterations; each has other prompts than the next.")


def _row(path: Path) -> list[str]:
    try:
        run = overview.of(path)
    except WorkflowError:
        return [path.name, "damaged", "", "", "", "", ""]
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed)) if run.changed is not None else ""
    return [path.name, run.state, f"{run.iteration}/{run.iterations}", moved(run), f"{run.best:.4f} ({run.best_at})" if run.best is not None else "",
            f"{run.seconds:.2f}" if run.seconds is not None else "", changed]


def console():
    """As wide as the terminal; 120 columns where what is printed goes elsewhere, which has no width."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 120)


def moved(run: overview.Overview) -> str:
    """The reward, first → last."""
    return f"{run.first:.4f} → {run.last:.4f}" if run.first is not None and run.last is not None else ""


def printable(text: str) -> str:
    """Without what would steer a terminal: names and settings may come from strangers."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
