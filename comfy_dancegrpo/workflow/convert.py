"""The editor's saved graph -> the API prompt that is executed, as ComfyUI's editor converts it when Run is pressed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.workflow.problems import title_of, unknown_type
from comfy_dancegrpo.workflow.read import SavedWorkflow
from comfy_dancegrpo.workflow.schema import Input, inputs_of
from comfy_dancegrpo.workflow.subgraphs import BYPASSED, INPUT_NODE, MUTED, OUTPUT_NODE, Graph, build, inputs_of_saved
from comfy_dancegrpo.workflow.widgets import widget_values

# Nodes of the editor alone. A Reroute passes its input on, a PrimitiveNode holds a value for the widget that it feeds.
_REROUTE, _PRIMITIVE = "Reroute", "PrimitiveNode"
_NOTES = frozenset({"Note", "MarkdownNote"})
_EDITOR_NODES = _NOTES | {_REROUTE, _PRIMITIVE}


@dataclass(frozen=True)
class _Value:
    """A link that ends in a widget's value: a primitive's, or one that a subgraph instance sets."""

    value: Any


class _Dropped:
    """A link that comes from a muted node. The editor drops the input with it, also where a widget holds a value."""


def to_prompt(saved: SavedWorkflow, info: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The API prompt, `{id: {"class_type", "inputs", "_meta": {"title"}}}`; `info` is `schema.object_info`'s table.

    A list that a widget holds is wrapped, `{"__value__": [...]}`, for a bare list is a link. Muted and bypassed nodes, notes
    and groups are left out; nodes within a subgraph are named `outer:inner`.
    Raises WorkflowError with every problem: unknown nodes, links that lead nowhere, widget values missing or left over.
    """
    if saved.format == "api":
        return _with_titles(copy.deepcopy(saved.data), info)
    converter = _Converter(info)
    prompt = converter.convert(saved.data)
    if converter.problems:
        raise WorkflowError(*dict.fromkeys(converter.problems))
    if not prompt:
        raise WorkflowError(f"{saved.source}: the workflow is empty (no node of it is active)")
    return prompt


def _with_titles(prompt: dict[str, Any], info: dict[str, dict[str, Any]]) -> dict[str, Any]:
    for node in prompt.values():
        if isinstance(node, dict) and "class_type" in node:
            shown_name = info.get(str(node["class_type"]), {}).get("display_name")
            node["_meta"] = {"title": title_of({"class_type": shown_name or node["class_type"], **_meta(node)})}
    return prompt


def _meta(node: dict[str, Any]) -> dict[str, Any]:
    return {"_meta": node["_meta"]} if "_meta" in node else {}


class _Converter:
    def __init__(self, info: dict[str, dict[str, Any]]):
        self.info = info
        self.problems: list[str] = []

    def convert(self, data: dict[str, Any]) -> dict[str, dict[str, Any]]:
        prompt: dict[str, dict[str, Any]] = {}
        for graph, node in build(data, self.problems).walk():
            if node["type"] in self.info:
                prompt[graph.id_of(node)] = self._node(graph, node)
            elif node["type"] not in _EDITOR_NODES:
                self.problems.append(unknown_type(graph.label(node), node["type"], self.info))
        return prompt

    def _node(self, graph: Graph, node: dict[str, Any]) -> dict[str, Any]:
        info = self.info[node["type"]]
        declared = inputs_of(info["input"], info.get("input_order"))
        values = self._widgets(graph, node, declared)
        for entry in inputs_of_saved(node):
            if entry.get("link") is None:
                continue
            name = str(entry.get("name"))
            if name not in declared:
                self.problems.append(f'{graph.label(node)}: found a link to input "{name}", which the node does not have')
            found = self._origin(graph, node, entry, entry.get("type"), frozenset())
            if isinstance(found, _Value):
                values[name] = _wrapped(found.value)
            elif isinstance(found, list):
                values[name] = found
            elif found is _Dropped:
                values.pop(name, None)
        inputs = {name: values[name] for name in declared if name in values}
        return {"class_type": node["type"], "inputs": inputs,
                "_meta": {"title": str(node.get("title") or info.get("display_name") or node["type"])}}

    def _widgets(self, graph: Graph, node: dict[str, Any], declared: dict[str, Input]) -> dict[str, Any]:
        values = widget_values(node, declared, graph.label(node), self.problems)
        for (node_id, name), value in graph.inner.items():
            if node_id != str(node["id"]):
                continue
            if name in declared and declared[name].is_widget:
                values[name] = value
            else:
                self.problems.append(f'{graph.label(node)}: its subgraph sets widget "{name}", which the node does not have')
        return {name: _wrapped(value) for name, value in values.items()}

    def _origin(self, graph: Graph, node: dict[str, Any], entry: dict[str, Any], wanted: Any,
                seen: frozenset[tuple[str, str]]) -> Any:
        """What an input's link leads to: `[id, slot]`, a _Value, _Dropped, or None where nothing is connected.

        `wanted` is the type that the receiving input declares; a bypassed node on the way passes on what fits it.
        """
        step = (graph.id_of(node), str(entry.get("name")))
        if step in seen:
            self.problems.append(f"{graph.label(node)}: links that pass through it run in a circle")
            return None
        link = graph.links.get(entry.get("link"))
        if link is None:
            self.problems.append(f'{graph.label(node)}: input "{entry.get("name")}": found link {entry.get("link")}, '
                                 "which the workflow does not have")
            return None
        if link.origin == INPUT_NODE and graph.host is not None:
            return self._from_host(graph, link.origin_slot, seen | {step})
        origin = graph.nodes.get(link.origin)  # a missing one was reported when the graph was built
        return None if origin is None else self._output(graph, origin, link.origin_slot, wanted, seen | {step})

    def _from_host(self, graph: Graph, slot: int, seen: frozenset[tuple[str, str]]) -> Any:
        """A subgraph's own input, seen from within: the instance's link wins over the value that its widget sets."""
        assert graph.parent is not None and graph.host is not None
        inputs = graph.inputs()
        if not 0 <= slot < len(inputs):
            self.problems.append(f"{graph.parent.label(graph.host)}: a link inside comes from its input {slot}, "
                                 f"but it has {len(inputs)}")
            return None
        name = inputs[slot].get("name")
        entry = next((e for e in inputs_of_saved(graph.host) if e.get("name") == name), {})
        if entry.get("link") is not None:
            return self._origin(graph.parent, graph.host, entry, entry.get("type"), seen)
        return _Value(graph.promoted[name]) if name in graph.promoted else None

    def _output(self, graph: Graph, node: dict[str, Any], slot: int, wanted: Any, seen: frozenset[tuple[str, str]]) -> Any:
        kind = node["type"]
        if kind == _REROUTE:
            entry = next(iter(inputs_of_saved(node)), {})
            return self._origin(graph, node, entry, wanted, seen) if entry.get("link") is not None else None
        if kind == _PRIMITIVE:
            return self._primitive(graph, node)
        if node.get("mode") == MUTED:
            return _Dropped
        if node.get("mode") == BYPASSED:
            entry = _bypass(node, slot, wanted)
            return self._origin(graph, node, entry, entry.get("type"), seen) if entry.get("link") is not None else None
        if str(node["id"]) in graph.children:
            return self._inner_output(graph, node, slot, wanted, seen)
        if kind in _NOTES:
            self.problems.append(f"{graph.label(node)}: a link comes from it, but a note gives nothing")
            return None
        return [graph.id_of(node), slot]

    def _primitive(self, graph: Graph, node: dict[str, Any]) -> _Value | None:
        values = node.get("widgets_values")
        if isinstance(values, list) and values:
            return _Value(values[0])
        self.problems.append(f"{graph.label(node)}: found no value in it, accepted: the value for the widget that it feeds")
        return None

    def _inner_output(self, graph: Graph, node: dict[str, Any], slot: int, wanted: Any,
                      seen: frozenset[tuple[str, str]]) -> Any:
        """An instance's output: whatever feeds that output inside it; an output fed by nothing gives nothing."""
        child = graph.children[str(node["id"])]
        outputs = child.definition.get("outputs") or []
        if not 0 <= slot < len(outputs):
            self.problems.append(f"{graph.label(node)}: a link comes from its output {slot}, but it has {len(outputs)}")
        link = next((k for k in child.links.values() if k.target == OUTPUT_NODE and k.target_slot == slot), None)
        if link is None:
            return None
        if link.origin == INPUT_NODE:
            return self._from_host(child, link.origin_slot, seen)
        origin = child.nodes.get(link.origin)
        return None if origin is None else self._output(child, origin, link.origin_slot, wanted, seen)


def _wrapped(value: Any) -> Any:
    return {"__value__": value} if isinstance(value, list) else value


def _bypass(node: dict[str, Any], slot: int, wanted: Any) -> dict[str, Any]:
    """The input that a bypassed node passes on at an output: the one beside it if it fits, else the first of that type."""
    inputs = inputs_of_saved(node)
    outputs = node.get("outputs") or []
    given = outputs[slot].get("type") if 0 <= slot < len(outputs) else wanted
    if wanted in ("*", ""):
        return inputs[slot] if 0 <= slot < len(inputs) else inputs[0] if inputs else {}

    def fits(entry: dict[str, Any]) -> bool:
        return _connectable(entry.get("type"), given) and _connectable(entry.get("type"), wanted)

    if 0 <= slot < len(inputs) and fits(inputs[slot]):
        return inputs[slot]
    exact = [entry for entry in inputs if entry.get("type") == wanted]
    return next(iter(exact or [entry for entry in inputs if fits(entry)]), {})


def _connectable(a: Any, b: Any) -> bool:
    """The editor's rule, looser than the server's: letter case does not count, and "*", "" and 0 fit anything."""
    if a in ("*", "", 0, None) or b in ("*", "", 0, None):
        return True
    one, other = ({part.strip() for part in str(side).lower().split(",")} for side in (a, b))
    return "*" in one | other or not one.isdisjoint(other)
