"""Which process this is, and its device; wraps accelerate, and nothing else knows how many processes there are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from .errors import WorkflowError
from .workflow.host import host


@functools.cache
def _state():
    from accelerate import PartialState

    state = PartialState()
    if state.num_processes > 1:
        raise WorkflowError(f"{state.num_processes} processes were started; this version trains in one process")
    return state


def device():
    """The `torch.device` of this process."""
    return host().device() or _state().device


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """ComfyUI runs nodes under `torch.inference_mode`; weights made there could never be trained through."""
    import torch

    with torch.inference_mode(False), torch.no_grad():
        yield
