"""What diffusers and peft say while a LoRA is loaded."""

import contextlib
import logging
import re
import warnings


@contextlib.contextmanager
def complaints(but: str):
    """What diffusers and peft say of keys or adapters while the block runs, but for lines that begin as `but` (a regular expression) has it."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield said
        said += [str(w.message) for w in warned if "key" in str(w.message) or "adapter" in str(w.message)]
        said[:] = [line for line in said if not re.match(but, line)]
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
