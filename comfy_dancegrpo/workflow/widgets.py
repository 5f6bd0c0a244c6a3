"""A saved node's widget values by name: the editor saves them in the order of its widgets, with a few of its own between."""

from __future__ import annotations

from typing import Any

from comfy_dancegrpo.workflow.problems import near, shown
from comfy_dancegrpo.workflow.schema import Input
from comfy_dancegrpo.workflow.subgraphs import CONTROL_VALUES

# Names under which the editor keeps values of its own in a dict of widget values.
_EDITOR_ONLY = frozenset({"control_after_generate", "control_filter_list", "upload", "videopreview", "preview"})
_UPLOAD_VALUES = ("image", "video", "audio", "", None)


def widget_values(node: dict[str, Any], inputs: dict[str, Input], where: str, problems: list[str]) -> dict[str, Any]:
    """The values that a saved node's widgets hold, by input name.

    A workflow saved before its node gained widgets at the end has no values for them: a missing value takes the declared
    `default`, and an optional input without one is left out. Any other missing value, and any value left over (but the
    editor's own: the control after a seed, the upload button's), is appended to `problems`.
    """
    widgets = [item for item in inputs.values() if item.is_widget]
    saved = node.get("widgets_values")
    if isinstance(saved, dict):
        values = _from_dict(saved, widgets, where, problems)
    else:
        values = _from_list(list(saved or []), widgets, inputs, where, problems)
    for item in widgets:
        if item.name in values:
            continue
        if "default" in item.options:
            values[item.name] = item.options["default"]
        elif item.required:
            problems.append(f'{where}: input "{item.name}": found no saved value, accepted: a value (the class declares no '
                            "default; save the workflow again in the editor)")
    return values


def _from_dict(saved: dict[str, Any], widgets: list[Input], where: str, problems: list[str]) -> dict[str, Any]:
    names = [item.name for item in widgets]
    for name in saved.keys() - set(names) - _EDITOR_ONLY:
        problems.append(f'{where}: found a value for widget "{name}", which the node does not have{near(name, names)}')
    return {name: saved[name] for name in names if name in saved}


def _from_list(saved: list[Any], widgets: list[Input], inputs: dict[str, Input], where: str,
               problems: list[str]) -> dict[str, Any]:
    uploads = any(item.is_upload for item in inputs.values())
    slots = _slots(saved, widgets, uploads, controls=True)
    if len(slots) != len(saved):
        # before the editor gave every seed its control, the value after a seed was the next widget's own
        without = _slots(saved, widgets, uploads, controls=False)
        slots = without if len(without) == len(saved) else slots
    if len(saved) > len(slots):
        problems.append(f"{where}: found {len(saved)} widget values, accepted: {len(slots)}; left over: "
                        f"{shown(saved[len(slots):])}")
    return {item.name: value for item, value in zip(slots, saved) if item is not None}


def _slots(saved: list[Any], widgets: list[Input], uploads: bool, controls: bool) -> list[Input | None]:
    """The widget that each saved value belongs to, in order; None for a value that only the editor uses."""
    slots: list[Input | None] = []
    for index, item in enumerate(widgets):
        slots.append(item)
        if controls and item.controls and len(slots) < len(saved) and saved[len(slots)] in CONTROL_VALUES:
            slots += [None] * item.controls
        last_required = item.required and not any(other.required for other in widgets[index + 1:])
        if uploads and last_required:  # the upload button is the last of the required widgets
            spare = len(saved) - len(slots) - len(widgets[index + 1:])
            while spare > 0 and saved[len(slots)] in _UPLOAD_VALUES:
                slots, spare = [*slots, None], spare - 1
    return slots
