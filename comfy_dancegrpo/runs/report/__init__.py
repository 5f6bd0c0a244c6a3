"""The report of a run: one HTML file that opens anywhere. No script, nothing that is fetched; all text of a run is escaped."""

from __future__ import annotations

from pathlib import Path

from ...workflow.host import host
from ..folder import write_atomically

NAME = "report.html"


def write(run: Path, file: Path | None = None) -> Path:
    """Writes the report of a run, as it stands now, beside its other files, or to `file`. Raises `WorkflowError` where there is no run, and `OSError`."""
    from .page import build

    file = file or run / NAME
    write_atomically(file, build(run))
    return file


def leave(run: Path) -> None:
    """The same, at the end of a run; whatever fails in it is said in one line, and the run does not."""
    try:
        write(run)
    except Exception as error:  # a report is never worth a run
        host().say(f"the report {run / NAME} could not be written ({type(error).__name__}: {' '.join(str(error).split())}); "
                   f'"dancegrpo report" makes it at any time')
