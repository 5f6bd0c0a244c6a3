"""`--output` with an address: runs that are kept in a storage too, and the spool on this machine that they are trained in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from comfy_dancegrpo import processes, pulse
from comfy_dancegrpo.errors import RunError, WorkflowError
from comfy_dancegrpo.runs import storage

from .console import StoppedAtOnce

if TYPE_CHECKING:
    from comfy_dancegrpo.workflow.host import Host

    from .session import Options


def placed(output: str, spool: Path | None) -> tuple[Path, str | None]:
    """The output folder on this machine, and the address of the storage where `--output` is one."""
    if not storage.is_url(output):
        return Path(output), None
    return spool or storage.default_spool(output), output


def give(host: Host, options: Options) -> None:
    """Gives the first process's host the storage that the options name. Raises `WorkflowError` for one that cannot be opened."""
    if options.spool is not None and options.storage is None:
        raise WorkflowError(f"--spool: found {options.spool} beside --output {options.output}; accepted: with an address, such as --output s3://bucket/runs")
    if options.storage is not None and processes.is_first():
        host.storage = storage.Storage(options.storage, options.output)


@contextlib.contextmanager
def stored(host: Host) -> Iterator[None]:
    """When the block has ended, whatever it ended by, all that it wrote of runs is in the storage; else raises `RunError`, or says so beside another error."""
    try:
        yield
    except StoppedAtOnce:
        raise
    except BaseException:
        if line := _close(host):
            host.say(f"WARNING: {line}")
        raise
    if line := _close(host):
        raise RunError(line)


def _close(host: Host) -> str:
    if host.storage is None:
        return ""
    with pulse.keeping():
        return host.storage.close()
