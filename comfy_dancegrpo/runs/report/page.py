"""The page: what of a run is told, in which order."""

from __future__ import annotations

import time
from pathlib import Path

from .. import environment, history, overview
from ..folder import RunFolder
from . import sections
from .html import page, tag


def build(path: Path) -> str:
    """The whole page. Raises `WorkflowError` where there is no run."""
    run = overview.of(path)
    points, pairs = history.read(RunFolder(path))
    points = [point for point in points if point.get("iteration", 0) <= run.iteration]  # what a resumed run has not come to again
    parts = [
        sections.head(run), sections.reward(run, points), sections.rewards(run), sections.watched(run), sections.evaluations(run), sections.before_after(pairs),
        sections.over_time(points), sections.health(run), sections.timing(run), sections.settings(overview.settings(path)),
        sections.environment(environment.read(path)), sections.checkpoints(overview.checkpoints(path)),
        tag("p", "made ", time.strftime("%Y-%m-%d %H:%M"), " by dancegrpo report; this file needs no other", cls="quiet"),
    ]
    return page(run.seen["name"], [part for part in parts if part])
