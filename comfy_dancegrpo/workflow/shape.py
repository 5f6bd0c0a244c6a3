"""Whether a saved graph has the shape that the conversion reads: it is data from a stranger, and nothing later asks again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from comfy_dancegrpo.workflow.problems import label, shown

_WORDS = {list: "a list", dict: "an object", str: "text", int: "a number"}


def shape_problems(data: dict[str, Any]) -> list[str]:
    """One line for each part of the editor's graph, or of a subgraph's definition, that has another shape."""
    problems = [*_graph("the workflow", data), *_field("the workflow", data, "definitions", dict)]
    definitions = data.get("definitions")
    if isinstance(definitions, dict):
        problems += _field("the workflow's definitions", definitions, "subgraphs", list)
        for definition in _listed(definitions, "subgraphs"):
            problems += _definition(definition)
    return problems


def _field(where: str, holder: dict[str, Any], key: str, *kinds: type) -> Iterator[str]:
    """A field may be left out, or null."""
    value = holder.get(key)
    if value is not None and not isinstance(value, kinds):
        yield f"{where}: {key}: found {shown(value)}, accepted: {' or '.join(_WORDS[kind] for kind in kinds)}"


def _listed(holder: dict[str, Any], key: str) -> list[Any]:
    value = holder.get(key)
    return value if isinstance(value, list) else []


def _definition(definition: Any) -> Iterator[str]:
    if not isinstance(definition, dict) or not isinstance(definition.get("id"), str):
        yield f"found {shown(definition)} among the subgraphs, accepted: an object with 'id'"
        return
    where = f'subgraph "{definition.get("name") or definition["id"]}"'
    yield from _graph(where, definition)
    for key in ("inputs", "outputs"):
        yield from _slots(where, definition, key)
        for slot in _listed(definition, key):
            if isinstance(slot, dict):
                yield from _field(where, slot, "linkIds", list)
                for link_id in _listed(slot, "linkIds"):
                    yield from _field(where, {"linkIds": link_id}, "linkIds", int, str)


def _graph(where: str, data: dict[str, Any]) -> Iterator[str]:
    yield from _field(where, data, "nodes", list)
    yield from _field(where, data, "links", list)
    for node in _listed(data, "nodes"):
        yield from _node(node)


def _node(node: Any) -> Iterator[str]:
    if not isinstance(node, dict) or not isinstance(node.get("id"), (int, str)) or not isinstance(node.get("type"), str):
        yield f"found {shown(node)} among the nodes, accepted: an object with 'id' and 'type'"
        return
    where = label(str(node["id"]), str(node.get("title") or node["type"]))
    yield from _field(where, node, "widgets_values", list, dict)
    yield from _field(where, node, "properties", dict)
    yield from _slots(where, node, "inputs")
    yield from _slots(where, node, "outputs")


def _slots(where: str, holder: dict[str, Any], key: str) -> Iterator[str]:
    yield from _field(where, holder, key, list)
    for slot in _listed(holder, key):
        if not isinstance(slot, dict) or not isinstance(slot.get("name", ""), str):
            yield f"{where}: found {shown(slot)} among the {key}, accepted: an object with 'name'"
        elif key == "inputs":
            yield from _field(where, slot, "link", int, str)
