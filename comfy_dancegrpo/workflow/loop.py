"""The loop: which nodes are its body, what the body takes from outside, and running the body again and again.

A Loop Start class has the attribute `LOOP_START = True`, a Loop End class `LOOP_END = True`, a class that may stop the loop from a side branch
`LOOP_WATCH = True`, and Loop End declares what it takes
from the body as {"lazy": True, "rawLink": True}, so that no executor evaluates the body for it. Loop End calls `find_body`
and returns `expand(body, ...)`: one runner node, whose links are the values from outside. The runner steps a `BodyRunner`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from graphlib import TopologicalSorter
from types import MappingProxyType
from typing import Any

from ..errors import RunError, WorkflowError
from . import calls
from .execute import Executor, Link
from .graph import NodeSpec, Prompt, ancestors, descendants, is_link, label, links

BODY = "body"  # the runner's input that carries `LoopBody.to_json()`
OUTSIDE = "outside_"  # and, numbered, those that carry the values from outside


def blocked(n: int) -> tuple:
    """What Loop Start returns for its `n` outputs when a host executes it: values that keep the body silent there."""
    comfy = sys.modules.get("comfy_execution.graph_utils")
    return (comfy.ExecutionBlocker(None) if comfy else calls.Blocked(),) * n


@dataclass(frozen=True)
class LoopBody:
    """A loop, cut out of its prompt.

    `nodes` holds Loop Start and the body in API format; `outside` the links that lead into them or to Loop End's lazy inputs
    from elsewhere, each once; `results` what those inputs of Loop End name, by input name.
    """

    start_id: str
    end_id: str
    nodes: Prompt
    outside: list[list]
    results: dict[str, list]

    def to_json(self) -> str:
        """One text for equal bodies: it travels as a widget's value, and ComfyUI caches by it."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> LoopBody:
        """Reads `to_json`'s text. Raises WorkflowError for any other."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError):
            raise WorkflowError("the loop's runner is made by Loop End and cannot be used by itself") from None

    def outside_inputs(self) -> dict[str, list]:
        """The runner's inputs for the values from outside."""
        return {f"{OUTSIDE}{i}": list(link) for i, link in enumerate(self.outside)}


def find_body(prompt: Prompt, loop_end_id: str, registry: Mapping[str, type]) -> LoopBody:
    """Finds the loop that `loop_end_id` closes.

    The body is every descendant of Loop Start that is reached without passing through Loop End, side branches included.
    Raises WorkflowError: no Loop Start above, or two; a nested loop; a second Loop End; a body that waits for the loop's end.
    """
    start_id = _find_start(prompt, loop_end_id, registry)
    inside = descendants(prompt, [start_id], stop=lambda node_id: node_id == loop_end_id)
    inside = [node_id for node_id in inside if node_id != loop_end_id]
    _refuse_other_loops(prompt, loop_end_id, inside, registry)
    nodes = {node_id: _plain(prompt[node_id]) for node_id in prompt if node_id in {start_id, *inside}}
    _refuse_what_comes_after(prompt, loop_end_id, nodes)
    spec = NodeSpec(registry[prompt[loop_end_id]["class_type"]])
    results = {name: [source, slot] for name, source, slot in links(prompt[loop_end_id]) if spec.is_raw(name)}
    named = [*((source, slot) for node in nodes.values() for _, source, slot in links(node)), *map(tuple, results.values())]
    outside = sorted(list(link) for link in set(named) if link[0] not in nodes)
    return LoopBody(start_id, loop_end_id, nodes, outside, results)


def check_loops(prompt: Prompt, registry: Mapping[str, type]) -> None:
    """Checks every loop of a valid prompt. Raises WorkflowError, one line for each loop that is not one."""
    problems: dict[str, None] = {}
    closed = set()
    for node_id in (n for n in prompt if _is(prompt, n, registry, "LOOP_END")):
        try:
            closed.add(find_body(prompt, node_id, registry).start_id)
        except WorkflowError as error:
            problems.update(dict.fromkeys(error.problems))
    opened = [n for n in prompt if _is(prompt, n, registry, "LOOP_START") and n not in closed]
    if not problems:
        problems.update((f"{label(prompt, n)}: no Loop End closes this loop", None) for n in opened)
    if problems:
        raise WorkflowError(*problems)


def _find_start(prompt: Prompt, end_id: str, registry: Mapping[str, type]) -> str:
    """The one Loop Start above Loop End; loops that are closed further up are not looked into."""
    above = ancestors(prompt, [end_id], stop=lambda node_id: _is(prompt, node_id, registry, "LOOP_END"))
    starts = sorted((node_id for node_id in above if _is(prompt, node_id, registry, "LOOP_START")), key=list(prompt).index)
    if not starts:
        raise WorkflowError(f"{label(prompt, end_id)}: no Loop Start above it that is not closed by another Loop End (loops do not nest)")
    if len(starts) > 1:
        nested = any(other in descendants(prompt, [start]) for start in starts for other in starts if other != start)
        found = " and ".join(label(prompt, start) for start in starts[:2])
        raise WorkflowError(f"{label(prompt, end_id)}: found {found} above it, accepted: one Loop Start"
                            + (" (loops do not nest)" if nested else ""))
    return starts[0]


def _refuse_other_loops(prompt: Prompt, end_id: str, inside: Collection[str], registry: Mapping[str, type]) -> None:
    for node_id in inside:
        if _is(prompt, node_id, registry, "LOOP_START"):
            raise WorkflowError(f"{label(prompt, node_id)}: is inside the loop of {label(prompt, end_id)}; loops do not nest")
    for node_id in inside:
        if _is(prompt, node_id, registry, "LOOP_END"):
            raise WorkflowError(f"{label(prompt, node_id)}: closes the same loop as {label(prompt, end_id)}, accepted: one Loop End")


def _refuse_what_comes_after(prompt: Prompt, end_id: str, body: Collection[str]) -> None:
    after = {end_id, *descendants(prompt, [end_id])}.difference(body)
    for node_id in body:
        for name, source, _ in links(prompt[node_id]):
            if source in after:
                raise WorkflowError(f'{label(prompt, node_id)}: input "{name}": found a link from {label(prompt, source)}, which comes after '
                                    f"{label(prompt, end_id)}; accepted here, in the loop's body: what is there before the loop ends")


def _is(prompt: Prompt, node_id: str, registry: Mapping[str, type], attribute: str) -> bool:
    return bool(getattr(registry.get(prompt[node_id]["class_type"]), attribute, False))


def _plain(node: dict[str, Any]) -> dict[str, Any]:
    """A node without what hosts write into prompts while they run (ComfyUI: `is_changed`)."""
    plain = {"class_type": node["class_type"], "inputs": dict(node["inputs"])}
    title = (node.get("_meta") or {}).get("title")
    return {**plain, "_meta": {"title": title}} if title else plain


def expand(body: LoopBody, runner_class_type: str, results: int) -> dict[str, Any]:
    """What Loop End returns: the runner, grafted in with links to the values from outside, and its `results` outputs."""
    runner_id = f"{body.end_id}.loop"
    runner = {"class_type": runner_class_type, "inputs": {BODY: body.to_json(), **body.outside_inputs()}}
    return {"result": tuple([runner_id, slot] for slot in range(results)), "expand": {runner_id: runner}}


def fingerprint(prompt: Prompt, body: LoopBody, leave_out: Collection[tuple[str, str]] = (),
                registry: Mapping[str, type] = MappingProxyType({})) -> str:
    """sha256 over all that Loop End descends from: class types, inputs and how they are linked.

    Node ids, titles, the order of nodes and side branches (a preview in the body) do not matter; a branch that may stop the loop does. `leave_out` names inputs, as (class type, input name), that may
    change without it being another run. An optional input at the default that its class of `registry` declares counts as one that is
    not there: older graphs lack what a node has learned since. A source in a cycle or not in the prompt raises, but validation comes first.
    """
    ends = [body.end_id, *(node_id for node_id in body.nodes if _is(prompt, node_id, registry, "LOOP_WATCH"))]
    ids = {*ends, *ancestors(prompt, ends)}
    sources = {node_id: {source for _, source, _ in links(prompt[node_id])} for node_id in ids}
    digests: dict[str, str] = {}
    defaults = functools.cache(lambda class_type: _optional_defaults(registry.get(class_type)))
    for node_id in TopologicalSorter(sources).static_order():
        node = prompt[node_id]
        inputs = {
            name: ["link", digests[value[0]], int(value[1])] if is_link(value) else ["value", _number(value)]
            for name, value in node["inputs"].items()
            if (node["class_type"], name) not in leave_out and (is_link(value) or value != defaults(node["class_type"]).get(name, _NONE))
        }
        digests[node_id] = _digest([node["class_type"], inputs])
    return _digest(sorted(digests.values()))


_NONE = object()


def _optional_defaults(cls: type | None) -> dict[str, Any]:
    """Of the class's optional inputs that are widgets."""
    optional = cls.INPUT_TYPES().get("optional", {}) if cls is not None else {}
    return {name: spec[1]["default"] for name, spec in optional.items()
            if isinstance(spec, (tuple, list)) and len(spec) > 1 and isinstance(spec[1], dict) and "default" in spec[1]}


def _number(value: Any) -> Any:
    """1.0 as 1: hosts differ in whether they make a FLOAT input's number a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class BodyRunner:
    """Runs a loop's body, step after step; node objects live as long as it does.

    `outside` maps the runner's inputs ("outside_0", ...) to their values as lists, as a node with INPUT_IS_LIST receives them.
    `original` and `extra_pnginfo` are the host's PROMPT and EXTRA_PNGINFO, for body nodes that ask (Save Image writes them).
    """

    def __init__(self, body: LoopBody, registry: Mapping[str, type], outside: Mapping[str, list],
                 original: Prompt | None = None, extra_pnginfo: Any = None):
        self.body = body
        self._executor = Executor(body.nodes, registry, original, extra_pnginfo)
        self._outside: dict[Link, list] = {(link[0], link[1]): outside[name] for name, link in zip(body.outside_inputs(), body.outside)}
        self._start = self._executor.spec(body.nodes, body.start_id)
        self._outputs = [node_id for node_id in self._executor.output_nodes() if node_id != body.start_id]

    def start_inputs(self) -> dict[str, Any]:
        """Loop Start's inputs as its function would receive them, hidden ones left out.

        Raises RunError where a link carries several values and Loop Start is not INPUT_IS_LIST, or a blocked one.
        """
        return self._known(self.body.start_id, self.body.nodes[self.body.start_id]["inputs"])

    def classes(self) -> set[type]:
        """Of all nodes of the prompt that the loop needs."""
        prompt, inside = self._executor.original, [*self.body.nodes, self.body.end_id]
        return {self._executor.spec(prompt, node_id).cls for node_id in {*inside, *ancestors(prompt, inside)}}

    def watches(self, names: Collection[str]) -> list[dict[str, Any]]:
        """Of each node that may stop the loop (`LOOP_WATCH`), the inputs of these names. Raises RunError where one comes from inside the loop."""
        found = []
        for node_id, node in self.body.nodes.items():
            if getattr(self._executor.spec(self.body.nodes, node_id).cls, "LOOP_WATCH", False):
                inputs = {name: value for name, value in node["inputs"].items() if name in names}
                for name, value in inputs.items():
                    if is_link(value) and (value[0], int(value[1])) not in self._outside:
                        error = RunError(f'input "{name}": found a link from inside the loop, accepted: a value that stays the same')
                        raise error.at(label(self._executor.original, node_id))
                found.append(self._known(node_id, inputs))
        return found

    def surely_called(self, node_class: type) -> list[tuple[str, dict[str, Any]]]:
        """Of the nodes of this class that every iteration calls, whatever lazy inputs ask for: how each is told in words, and its inputs."""
        waiting, called = [*self._outputs, *(link[0] for link in self.body.results.values())], {}
        while waiting:
            node_id = waiting.pop()
            if node_id in self.body.nodes and node_id not in called:
                called[node_id] = spec = self._executor.spec(self.body.nodes, node_id)
                waiting += [source for name, source, _ in links(self.body.nodes[node_id]) if not spec.is_lazy(name)]
        return [(label(self._executor.original, node_id), self.body.nodes[node_id]["inputs"])
                for node_id in self.body.nodes if node_id in called and called[node_id].cls is node_class]

    def from_outside(self, value: Any) -> Any:
        """What an input gets by a link from outside the loop; None for any other, and where it is blocked or not one value."""
        values = self._outside.get((value[0], int(value[1])), ()) if is_link(value) else ()
        return values[0] if len(values) == 1 and not calls.is_blocked(values[0]) else None

    def _known(self, node_id: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of a node that are there before the loop runs, as its function would receive them."""
        as_list = self._executor.spec(self.body.nodes, node_id).input_is_list
        inputs = {}
        for name, value in given.items():
            values = self._outside[value[0], int(value[1])] if is_link(value) else [value]
            inputs[name] = values if as_list else self._single(values, node_id, name)
        return inputs

    def step(self, start_outputs: tuple) -> dict[str, Any]:
        """Executes the body once, its output nodes too, with `start_outputs` as what Loop Start returned.

        Returns the value of each lazy input that Loop End has linked, by name. Raises as `Executor.run` does, and
        RunError when such a value is blocked or more than one.
        """
        returned = calls.Returned.of(start_outputs, self._start.n_outputs)
        preset = {(self.body.start_id, slot): wire for slot, wire in enumerate(calls.wires([returned], self._start, list))}
        preset.update(self._outside)
        wanted = {name: (link[0], link[1]) for name, link in self.body.results.items()}
        values = self._executor.run(self._outputs, wanted.values(), preset)
        return {name: self._single(values[link], link[0], f"output {link[1]}") for name, link in wanted.items()}

    def _single(self, values: list, node_id: str, what: str) -> Any:
        if len(values) != 1:
            raise RunError(f"{label(self._executor.original, node_id)}: {what}: found {len(values)} values, accepted: one")
        if calls.is_blocked(values[0]):
            raise RunError(f"{label(self._executor.original, node_id)}: {what}: its value was blocked, so the loop cannot go on")
        return values[0]
