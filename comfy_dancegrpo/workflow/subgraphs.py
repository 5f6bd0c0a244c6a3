"""The editor's saved graph as objects: nodes, links, and subgraph instances with the values they promote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.workflow.problems import label, shown
from comfy_dancegrpo.workflow.shape import shape_problems

# The ids that stand for a subgraph's own inputs and outputs inside its definition.
INPUT_NODE, OUTPUT_NODE = "-10", "-20"
MUTED, BYPASSED = 2, 4
CONTROL_VALUES = ("fixed", "increment", "decrement", "randomize", "increment-wrap")

# Two instances of the next in each of thirty definitions would be a billion; no graph that someone drew comes near this.
_MOST_INSTANCES = 10_000
# Older editors named the widget of a node within an inner instance "12: text"; the prefixes may repeat.
_OLD_NAME = re.compile(r"^\s*(\d+)\s*:\s*(.+)$")


class Link(NamedTuple):
    origin: str
    origin_slot: int
    target: str
    target_slot: int


@dataclass
class Graph:
    """The workflow itself, or one instance of a subgraph (then `host` is the instance's node in `parent`).

    `promoted` maps a subgraph input's name to the value that the instance sets for it, and `inner` maps (node id, widget
    name) to a value that it sets for an inner node directly; an input's link, and then these, win over an inner value.
    """

    nodes: dict[str, dict[str, Any]]
    links: dict[Any, Link]
    prefix: str = ""
    definition: dict[str, Any] = field(default_factory=dict)
    parent: Graph | None = None
    host: dict[str, Any] | None = None
    children: dict[str, Graph] = field(default_factory=dict)
    promoted: dict[str, Any] = field(default_factory=dict)
    inner: dict[tuple[str, str], Any] = field(default_factory=dict)

    def walk(self) -> Iterator[tuple[Graph, dict[str, Any]]]:
        """Every node that is neither muted nor bypassed nor within such an instance; instances yield what they hold."""
        for node_id, node in self.nodes.items():
            if node.get("mode") in (MUTED, BYPASSED):
                continue
            if node_id in self.children:
                yield from self.children[node_id].walk()
            else:
                yield self, node

    def id_of(self, node: dict[str, Any]) -> str:
        """The id that the editor gives the node in a prompt: `outer:inner` for one within an instance."""
        return f"{self.prefix}{node['id']}"

    def inputs(self) -> list[dict[str, Any]]:
        """The subgraph's own inputs, as its definition lists them."""
        return inputs_of_saved(self.definition)

    def label(self, node: dict[str, Any]) -> str:
        return label(self.id_of(node), title_of_saved(node))


def title_of_saved(node: dict[str, Any]) -> str:
    """The title of a saved node, or its type: the editor saves only titles that the user changed."""
    return str(node.get("title") or node.get("type"))


def inputs_of_saved(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The input slots of a saved node or subgraph definition."""
    return node.get("inputs") or []


def build(data: dict[str, Any], problems: list[str]) -> Graph:
    """The graph of a saved workflow; what cannot be followed in it is left out and appended to `problems`, one line each.

    Raises WorkflowError when the workflow has not the shape of one (`shape_problems`), or expands without end.
    """
    malformed = shape_problems(data)
    if malformed:
        raise WorkflowError(*malformed)
    listed = (data.get("definitions") or {}).get("subgraphs") or []
    return _Builder({definition["id"]: definition for definition in listed}, problems).graph(data)


class _Builder:
    def __init__(self, definitions: dict[str, dict[str, Any]], problems: list[str]):
        self.definitions = definitions
        self.problems = problems
        self.instances = 0

    def graph(self, data: dict[str, Any], parent: Graph | None = None, host: dict[str, Any] | None = None,
              above: tuple[str, ...] = ()) -> Graph:
        prefix = f"{parent.id_of(host)}:" if parent and host else ""
        graph = Graph(self._nodes(data, prefix), self._links(data), prefix, data if host else {}, parent, host)
        self._check_ends(graph)
        if parent and host:
            self._promote(graph, parent, host)
        for node_id, node in list(graph.nodes.items()):
            definition = self.definitions.get(str(node.get("type")))
            if definition is None:
                continue
            if definition["id"] in above:
                self.problems.append(f"{graph.label(node)}: a subgraph that holds itself")
                del graph.nodes[node_id]
                continue
            self.instances += 1
            if self.instances > _MOST_INSTANCES:
                raise WorkflowError(f"the workflow holds more than {_MOST_INSTANCES} subgraphs within subgraphs")
            graph.children[node_id] = self.graph(definition, graph, node, (*above, definition["id"]))
        return graph

    def _nodes(self, data: dict[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
        nodes: dict[str, dict[str, Any]] = {}
        for node in data.get("nodes") or []:
            if str(node["id"]) in nodes:
                self.problems.append(f"{label(prefix + str(node['id']), title_of_saved(node))}: two nodes have this id")
            else:
                nodes[str(node["id"])] = node
        return nodes

    def _links(self, data: dict[str, Any]) -> dict[Any, Link]:
        links: dict[Any, Link] = {}
        for saved in data.get("links") or []:
            try:
                link_id, link = _read_link(saved)
                links[link_id] = link
            except (KeyError, IndexError, TypeError, ValueError):
                self.problems.append(f"found {shown(saved)} among the links, accepted: "
                                     "[id, from node, from slot, to node, to slot, type], or an object with the same")
        return links

    def _check_ends(self, graph: Graph) -> None:
        """Both ends of every link must exist, and the input at its end must name it: an input's own word is what counts."""
        for link_id, link in graph.links.items():
            where = f"link {link_id} (node {graph.prefix}{link.origin} to node {graph.prefix}{link.target})"
            inside = graph.host is not None
            if link.origin not in graph.nodes and not (inside and link.origin == INPUT_NODE):
                self.problems.append(f"{where}: comes from a node that is not there")
            if link.target not in graph.nodes:
                if not (inside and link.target == OUTPUT_NODE):
                    self.problems.append(f"{where}: leads to a node that is not there")
            elif not any(entry.get("link") == link_id for entry in inputs_of_saved(graph.nodes[link.target])):
                self.problems.append(f"{where}: leads to an input that does not name it")

    def _promote(self, graph: Graph, parent: Graph, host: dict[str, Any]) -> None:
        """Reads what the instance's widgets set, then what the instance around it sets for those widgets."""
        values = host.get("widgets_values")
        if isinstance(values, dict):
            graph.promoted.update(values)
        else:
            self._promote_list(graph, parent.label(host), self._host_widgets(graph, parent, host), list(values or []))
        for (node_id, name), value in parent.inner.items():
            if node_id != str(host["id"]):
                continue
            older = _OLD_NAME.match(name)
            if older:
                graph.inner[older[1], older[2]] = value
            else:
                graph.promoted[name] = value
        known = {entry.get("name") for entry in graph.inputs()}
        for name in graph.promoted.keys() - known:
            self.problems.append(f'{parent.label(host)}: sets "{name}", which the subgraph does not have')

    def _promote_list(self, graph: Graph, where: str, widgets: list[tuple[str, str]], values: list[Any]) -> None:
        spare = len(values) - len(widgets)
        position = 0
        for node_id, name in widgets:
            value = values[position] if position < len(values) else None
            position += 1
            if spare > 0 and position < len(values) and values[position] in CONTROL_VALUES:
                position, spare = position + 1, spare - 1  # older editors kept the seed's control beside the promoted seed
            if value is None or name.startswith("$$") or name == "control_after_generate":
                continue  # nothing set here, a preview, or what only the editor uses
            if node_id == INPUT_NODE:
                graph.promoted[name] = value
            elif node_id in graph.nodes:
                graph.inner[node_id, name] = value
            else:
                self.problems.append(f'{where}: sets widget "{name}" of inner node {node_id}, which is not there')
        if position < len(values):
            self.problems.append(f"{where}: found widget values left over: {shown(values[position:])}")

    def _host_widgets(self, graph: Graph, parent: Graph, host: dict[str, Any]) -> list[tuple[str, str]]:
        """The instance's widgets in the order of its values: (INPUT_NODE, input name), or (inner node id, widget name).

        The newest editors save one value for each subgraph input that ends in a widget. Earlier ones list further widgets
        in `proxyWidgets`, where node "-1" stands for the instance's own inputs; inputs that it does not list come first.
        """
        behind = {str(entry.get("name")): self._widget_behind(graph, entry) for entry in graph.inputs()}
        owner = {source: name for name, source in behind.items() if source}
        listed = []
        for node_id, name in self._proxies(parent.label(host), host):
            own = name if node_id == "-1" else owner.get((node_id, name))
            listed.append((node_id, name) if own is None else (INPUT_NODE, own))
        return [(INPUT_NODE, name) for name in owner.values() if (INPUT_NODE, name) not in listed] + listed

    def _proxies(self, where: str, host: dict[str, Any]) -> list[tuple[str, str]]:
        saved = (host.get("properties") or {}).get("proxyWidgets") or []
        try:
            return [(str(entry[0]), str(entry[1])) for entry in (json.loads(saved) if isinstance(saved, str) else saved)]
        except (ValueError, TypeError, LookupError):
            self.problems.append(f"{where}: found proxyWidgets {shown(saved)}, accepted: a list of [node id, widget name]")
            return []

    def _widget_behind(self, graph: Graph, entry: dict[str, Any]) -> tuple[str, str] | None:
        """The first inner (node id, widget name) that a subgraph input feeds, or None when it feeds sockets only."""
        for link_id in entry.get("linkIds") or []:
            link = graph.links.get(link_id)
            node = graph.nodes.get(link.target) if link else None
            slot = next((s for s in inputs_of_saved(node or {}) if s.get("link") == link_id), None)
            if link and slot and isinstance(slot.get("widget"), dict):
                return link.target, str(slot["widget"].get("name"))
        return None


def _read_link(saved: Any) -> tuple[Any, Link]:
    """Either form of a saved link. Raises KeyError, IndexError, TypeError or ValueError when it has neither."""
    if isinstance(saved, dict):
        link_id = saved["id"]
        ends = [saved[key] for key in ("origin_id", "origin_slot", "target_id", "target_slot")]
    else:
        link_id, *ends = saved[:5]
    hash(link_id)
    origin, origin_slot, target, target_slot = ends
    return link_id, Link(str(origin), int(origin_slot), str(target), int(target_slot))
