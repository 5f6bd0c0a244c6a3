"""How a problem in a workflow is worded: `node 5 "Load Policy": input "policy": found 'foo', accepted: one of 'embedded'`."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Any

_SHOWN_CHOICES = 8
_SHOWN_LETTERS = 60


def label(node_id: str, title: str) -> str:
    """How a line names a node: one line of print, whatever the workflow holds."""
    return f'node {_printable(node_id)} "{_printable(title)}"'


def _printable(text: str) -> str:
    """Line breaks and what a terminal would obey become spaces."""
    return "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)


def title_of(node: Any) -> str:
    """The title of a prompt's node: what the user called it, else its class type."""
    if not isinstance(node, dict):
        return ""
    meta = node.get("_meta")
    return _printable(str((isinstance(meta, dict) and meta.get("title")) or node.get("class_type", "")))


def node_label(node_id: str, prompt: dict[str, Any]) -> str:
    """How a line names the node `node_id` of a prompt."""
    return label(node_id, title_of(prompt.get(node_id)))


def at_input(node: str, name: str, found: str, accepted: str) -> str:
    """The line about one input of a node that `label` or `node_label` named."""
    return f'{node}: input "{name}": found {found}, accepted: {accepted}'


def shown(value: Any) -> str:
    """A value as a line shows it, cut when long; quotes tell text from numbers."""
    text = repr(value)
    return text if len(text) <= _SHOWN_LETTERS else text[: _SHOWN_LETTERS - 1] + "…"


def one_of(choices: Iterable[Any], wanted: Any = None) -> str:
    """The accepted choices; of a long list the ones most like `wanted` come first, and the rest is counted."""
    choices = list(choices)
    if not choices:
        return "nothing (the list is empty)"
    if len(choices) <= _SHOWN_CHOICES:
        return "one of " + ", ".join(shown(c) for c in choices)
    alike = difflib.get_close_matches(str(wanted), [str(c) for c in choices], _SHOWN_CHOICES)
    first = sorted(choices, key=lambda c: alike.index(str(c)) if str(c) in alike else len(alike))[:_SHOWN_CHOICES]
    return f"one of {', '.join(shown(c) for c in first)} and {len(choices) - len(first)} more"


def near(wanted: str, names: Iterable[str]) -> str:
    """` (did you mean 'a' or 'b'?)`, or nothing when no name is like `wanted`; letter case does not count."""
    spelled = {name.lower(): name for name in names}
    alike = difflib.get_close_matches(wanted.lower(), spelled, 3)
    return f" (did you mean {' or '.join(repr(spelled[a]) for a in alike)}?)" if alike else ""


def unknown_type(node: str, class_type: Any, known: Iterable[str]) -> str:
    """The line about a node whose class is not installed."""
    return f"{node}: unknown node type {class_type!r}{near(str(class_type), known)}"
