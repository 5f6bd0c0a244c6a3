"""The prompt as a graph: links, what a node class declares, who descends from whom.

A prompt is the API format, `{id: {"class_type", "inputs", "_meta": {"title"}}}`; a link is `[id, slot]` among the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import WorkflowError
from .problems import node_label, title_of
from .schema import Input, find_input

Prompt = dict[str, dict[str, Any]]


def is_link(value: Any) -> bool:
    """Whether an input's value is a link, by ComfyUI's rule: a list of a string and a number."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], (int, float))


def links(node: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """A node's linked inputs as (input name, source id, source slot), in the order of its inputs."""
    for name, value in node["inputs"].items():
        if is_link(value):
            yield name, value[0], int(value[1])


def label(prompt: Prompt, node_id: str) -> str:
    """How the engine's messages name a node: `node 12 "My sampler" (GroupSample)`."""
    class_type = prompt.get(node_id, {}).get("class_type", "")
    return node_label(node_id, prompt) + (f" ({class_type})" if class_type != title_of(prompt.get(node_id)) else "")


def ancestors(prompt: Prompt, roots: Iterable[str], stop: Callable[[str], bool] = lambda node_id: False) -> dict[str, None]:
    """All that `roots` read, links of every kind followed; an ancestor for which `stop` holds is kept but not passed."""
    return _reach(roots, lambda node_id: (source for _, source, _ in links(prompt[node_id]) if source in prompt), stop)


def descendants(prompt: Prompt, roots: Iterable[str], stop: Callable[[str], bool] = lambda node_id: False) -> dict[str, None]:
    """All that read from `roots`; a descendant for which `stop` holds is kept but not passed."""
    readers: dict[str, list[str]] = {}
    for node_id, node in prompt.items():
        for _, source, _ in links(node):
            readers.setdefault(source, []).append(node_id)
    return _reach(roots, lambda node_id: readers.get(node_id, ()), stop)


def _reach(roots: Iterable[str], neighbours: Callable[[str], Iterable[str]], stop: Callable[[str], bool]) -> dict[str, None]:
    found: dict[str, None] = {}  # a dict keeps the order in which they were found
    waiting = [n for root in roots for n in neighbours(root)]
    while waiting:
        node_id = waiting.pop()
        if node_id not in found:
            found[node_id] = None
            if not stop(node_id):
                waiting.extend(neighbours(node_id))
    return found


def is_v3(node_class: type) -> bool:
    """Whether a lent class is of ComfyUI's V3 kind: class methods called on a clone that holds the hidden values."""
    return hasattr(node_class, "PREPARE_CLASS_CLONE")


WIRE = "DANCEGRPO_"  # the types of our wires begin so


class NodeSpec:
    """What the executor needs to know of a node class, read from it once: `INPUT_TYPES()` may list folders.

    `everywhere` tells whether every process runs it: what makes values of our wires, of which each process has its part, or says so.
    Others run in the first process alone. `hidden` maps an argument's name to "UNIQUE_ID", "PROMPT" and so on; a V3 class is given `v3_hidden` in another way.
    """

    def __init__(self, node_class: type):
        self.cls = node_class
        self.input_is_list = bool(getattr(node_class, "INPUT_IS_LIST", False))
        self.is_output = bool(getattr(node_class, "OUTPUT_NODE", False))
        self.n_outputs = len(node_class.RETURN_TYPES)
        self.everywhere = bool(getattr(node_class, "EVERY_PROCESS", False)) or any(str(t).startswith(WIRE) for t in node_class.RETURN_TYPES)
        is_list = tuple(getattr(node_class, "OUTPUT_IS_LIST", None) or ())
        self.output_is_list = (is_list + (False,) * self.n_outputs)[: self.n_outputs]
        self._types = node_class.INPUT_TYPES()
        self.hidden = {name: kind for name, kind in self._types.get("hidden", {}).items() if isinstance(kind, str)}
        self.v3_hidden = tuple(node_class.GET_SCHEMA().hidden or ()) if is_v3(node_class) else ()
        self._inputs: dict[str, Input | None] = {}

    def input(self, name: str) -> Input | None:
        """The declared input of that name, or None."""
        if name not in self._inputs:
            self._inputs[name] = find_input(self._types, name)
        return self._inputs[name]

    def is_raw(self, name: str) -> bool:
        """Whether the node receives the link itself."""
        return self._option(name, "rawLink")

    def is_lazy(self, name: str) -> bool:
        """Whether the link's source is evaluated only when the node asks for it."""
        return self._option(name, "lazy")

    def _option(self, name: str, option: str) -> bool:
        declared = self.input(name)
        return declared is not None and bool(declared.options.get(option))

    def may_expand(self, node: dict[str, Any]) -> bool:
        """Whether the node may come to read more of the graph than its plain links say."""
        asks = "DYNPROMPT" in (*self.hidden.values(), *self.v3_hidden)
        return asks or any(self.is_raw(name) or self.is_lazy(name) for name, _, _ in links(node))


class DynamicPrompt:
    """A prompt and what nodes grafted into it while it runs; the methods are those of ComfyUI's DYNPROMPT, which nodes call."""

    def __init__(self, prompt: Prompt, original: Prompt | None = None):
        self.nodes = dict(prompt)
        self._original = prompt if original is None else original
        self._parents: dict[str, str] = {}
        self._display: dict[str, str] = {}

    def get_node(self, node_id: str) -> dict[str, Any]:
        try:
            return self.nodes[node_id]
        except KeyError:
            raise WorkflowError(f"node {node_id} is linked, but is not in the workflow") from None

    def has_node(self, node_id: str) -> bool:
        return node_id in self.nodes

    def all_node_ids(self) -> set[str]:
        return set(self.nodes)

    def get_original_prompt(self) -> Prompt:
        return self._original

    def get_parent_node_id(self, node_id: str) -> str | None:
        return self._parents.get(node_id)

    def get_real_node_id(self, node_id: str) -> str:
        """The saved node that a grafted one descends from."""
        while node_id in self._parents:
            node_id = self._parents[node_id]
        return node_id

    def get_display_node_id(self, node_id: str) -> str:
        """The saved node that shows a grafted one's progress."""
        while node_id in self._display:
            node_id = self._display[node_id]
        return node_id

    def add_ephemeral_node(self, node_id: str, node: dict[str, Any], parent_id: str, display_id: str) -> None:
        if node_id in self.nodes:
            raise ValueError(f"expands into node {node_id}, which is already there")
        self.nodes[node_id] = {**node, "inputs": node.get("inputs", {})}
        self._parents[node_id] = parent_id
        if display_id != node_id:
            self._display[node_id] = display_id

    def label(self, node_id: str) -> str:
        """The label of the saved node behind `node_id`."""
        return label(self.nodes, self.get_real_node_id(node_id))
