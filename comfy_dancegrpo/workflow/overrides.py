"""The command line's `--set "Node title or id.input=value"`: one widget's value, changed for one run."""

from __future__ import annotations

import copy
from typing import Any

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.workflow.problems import at_input, near, node_label, shown, title_of, unknown_type
from comfy_dancegrpo.workflow.schema import Input, find_input, inputs_of, type_name
from comfy_dancegrpo.workflow.validate import malformed

_BOOLEANS = {"true": True, "false": False}


def apply_overrides(prompt: dict[str, dict[str, Any]], registry: dict[str, type],
                    overrides: list[str]) -> dict[str, dict[str, Any]]:
    """A copy of the prompt with the overrides applied, in order; `validate` then checks the values' ranges and choices.

    Raises WorkflowError, a line for each override that names no node, several nodes, no input, or a linked input, or whose
    value is not of the widget's type.
    """
    changed = copy.deepcopy(prompt)
    problems: list[str] = []
    for override in overrides:
        try:
            _apply(changed, registry, override)
        except WorkflowError as error:
            problems += error.problems
    if problems:
        raise WorkflowError(*problems)
    return changed


def _apply(prompt: dict[str, dict[str, Any]], registry: dict[str, type], override: str) -> None:
    address, equals, text = override.partition("=")
    wanted, dot, name = (part.strip() for part in address.rpartition("."))  # a title may hold dots
    if not (equals and dot and wanted and name):
        raise WorkflowError(f"--set: found {override!r}, accepted: 'node title or id.input=value'")
    node_id = _find(prompt, wanted)
    line = malformed(node_id, prompt)
    if line is not None:
        raise WorkflowError(line)
    node, label = prompt[node_id], node_label(node_id, prompt)
    cls = registry.get(str(node["class_type"]))
    if cls is None:
        raise WorkflowError(unknown_type(label, node["class_type"], registry))
    item = find_input(cls.INPUT_TYPES(), name)
    if item is None:
        raise WorkflowError(f'--set: {label}: unknown input "{name}"{near(name, inputs_of(cls.INPUT_TYPES()))}')
    link = node["inputs"].get(name)
    if isinstance(link, list):
        source = f" from {node_label(str(link[0]), prompt)}; set the value there" if link else ""
        raise WorkflowError(f'--set: {label}: input "{name}" comes over a link{source}')
    node["inputs"][name] = _parse(f"--set: {label}", item, text)


def _find(prompt: dict[str, dict[str, Any]], wanted: str) -> str:
    """The node that an address means: by id first, then by title."""
    if wanted in prompt:
        return wanted
    titles = {node_id: title_of(node) for node_id, node in prompt.items()}
    found = [node_id for node_id, title in titles.items() if title == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        raise WorkflowError(f'--set: "{wanted}" is the title of nodes {", ".join(found)}, accepted: one of these ids')
    raise WorkflowError(f'--set: no node has the id or title "{wanted}"{near(wanted, titles.values())}')


def _parse(where: str, item: Input, text: str) -> Any:
    if item.choices is not None:
        return next((choice for choice in item.choices if str(choice) == text), text)
    if not item.is_widget:
        raise WorkflowError(at_input(where, item.name, shown(text), f"a link of type {type_name(item.socket_type)} only"))
    if item.type == "BOOLEAN":
        if text.strip().lower() not in _BOOLEANS:
            raise WorkflowError(at_input(where, item.name, shown(text), "true or false"))
        return _BOOLEANS[text.strip().lower()]
    if item.type in ("INT", "FLOAT"):
        try:
            return int(text) if item.type == "INT" else float(text)
        except ValueError:
            accepted = "a whole number" if item.type == "INT" else "a number"
            raise WorkflowError(at_input(where, item.name, shown(text), accepted)) from None
    return text
