"""Loading without the libraries' progress bars and advice: a run has one bar, its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars from diffusers and transformers, and only their errors, while the block runs; the user's own settings
    come back after it. (On import, transformers advises to install torchvision, which nothing here needs.)"""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    bars = [log for log in libraries if log.is_progress_bar_enabled()]
    levels = [log.get_verbosity() for log in libraries]
    for log in libraries:
        log.disable_progress_bar()
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in zip(libraries, levels):
            log.set_verbosity(level)
        for log in bars:
            log.enable_progress_bar()
