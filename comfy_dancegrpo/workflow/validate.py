"""Checks a whole prompt against the classes of its nodes; nothing is loaded, and every problem is reported at once."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping
from typing import Any

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.workflow.problems import at_input, near, node_label, one_of, shown, unknown_type
from comfy_dancegrpo.workflow.schema import ANY, Input, find_input, inputs_of, type_name, types_match

Prompt = dict[str, dict[str, Any]]

_ACCEPTED = {"INT": "a whole number", "FLOAT": "a number", "BOOLEAN": "true or false", "STRING": "text"}


def validate(prompt: Prompt, registry: dict[str, type], check_files: bool = True) -> None:
    """Raises WorkflowError with every problem of the prompt, one line each; every node is checked, whether it will run or not.

    Stricter than ComfyUI where it converts in silence: an INT takes a whole number only (no text, no 3.0, no true), a
    FLOAT any finite number, a BOOLEAN true or false, a STRING text. An input that the class does not have is a problem.
    As in ComfyUI, values are brought to their declared type in place: a whole number given for a FLOAT becomes a float, and
    `{"__value__": [...]}` the list. `check_files=False` leaves out the classes' own VALIDATE_INPUTS, which look for files.
    """
    if not prompt:
        raise WorkflowError("the workflow is empty (it has no nodes)")
    checker = _Checker(prompt, registry, check_files)
    problems = [line for node_id in prompt for line in checker.node(node_id)]
    problems += _cycles(prompt)
    if not any(_is_output(cls) for cls in map(checker.class_of, prompt)):
        outputs = sorted(name for name, cls in registry.items() if _is_output(cls))
        problems.append(f"no output node, so nothing would run; accepted: {one_of(outputs)}")
    if problems:
        raise WorkflowError(*problems)
    checker.bring_to_type()


def malformed(node_id: str, prompt: Prompt) -> str | None:
    """The line about an entry that is not a node at all, or None."""
    node = prompt[node_id]
    if isinstance(node, dict) and "class_type" in node and isinstance(node.get("inputs"), dict):
        return None
    return f"{node_label(node_id, prompt)}: found {shown(node)}, accepted: an object with 'class_type' and 'inputs'"


def _is_output(cls: type | None) -> bool:
    return getattr(cls, "OUTPUT_NODE", False) is True


def _unwrapped(value: Any) -> Any:
    return value["__value__"] if isinstance(value, dict) and "__value__" in value else value


class _Checker:
    """Checks node by node; a class's INPUT_TYPES, which may list folders, is called once."""

    def __init__(self, prompt: Prompt, registry: dict[str, type], check_files: bool):
        self.prompt = prompt
        self.registry = registry
        self.check_files = check_files
        self.declared: dict[str, Mapping[str, Any]] = {}
        # Types that some node gives. A constant in such an input is a mistake; of any other type it may be a pack's own widget.
        self.given = {t for cls in registry.values() for t in getattr(cls, "RETURN_TYPES", ()) if isinstance(t, str)}

    def class_of(self, node_id: str) -> type | None:
        node = self.prompt[node_id]
        return self.registry.get(str(node.get("class_type"))) if isinstance(node, dict) else None

    def input_types(self, node_id: str, cls: type) -> Mapping[str, Any]:
        class_type = self.prompt[node_id]["class_type"]
        if class_type not in self.declared:
            self.declared[class_type] = cls.INPUT_TYPES()  # type: ignore[attr-defined]
        return self.declared[class_type]

    def bring_to_type(self) -> None:
        for node_id, node in self.prompt.items():
            input_types = self.input_types(node_id, self.registry[node["class_type"]])
            for name, value in node["inputs"].items():
                item, value = find_input(input_types, name), _unwrapped(value)
                node["inputs"][name] = float(value) if item and item.type == "FLOAT" and isinstance(value, int) else value

    def node(self, node_id: str) -> list[str]:
        line = malformed(node_id, self.prompt)
        if line is not None:
            return [line]
        node, label = self.prompt[node_id], node_label(node_id, self.prompt)
        cls = self.class_of(node_id)
        if cls is None:
            return [unknown_type(label, node["class_type"], self.registry)]
        input_types = self.input_types(node_id, cls)
        declared = inputs_of(input_types)
        own = _OwnCheck(cls)
        problems = [f'{label}: input "{name}": missing, accepted: {_accepted(item)}'
                    for name, item in declared.items() if item.required and name not in node["inputs"]]
        received: dict[str, Any] = {}
        for name, value in node["inputs"].items():
            item = find_input(input_types, name)
            if item is None:
                # exports of older editors carry the upload button's value
                if not (name == "upload" and any(other.is_upload for other in declared.values())):
                    problems.append(f'{label}: unknown input "{name}"{near(name, declared)}')
            elif isinstance(value, list):
                problems += self._link(label, item, value, received, own.compares_types)
            else:
                problems += self._value(label, item, _unwrapped(value), by_class=own.takes(name))
        if self.check_files and not problems:
            problems += own.problems(label, node_id, node["inputs"], input_types, received)
        return problems

    def _link(self, label: str, item: Input, value: list[Any], received: dict[str, Any], by_class: bool) -> list[str]:
        """Checks one link, and notes the type that it brings in `received`; `by_class`: the class compares types itself."""
        if len(value) != 2 or not isinstance(value[0], str) or type(value[1]) is not int:
            return [at_input(label, item.name, shown(value), "[node id as text, output number]")]
        source_id, slot = value
        if source_id not in self.prompt:
            return [at_input(label, item.name, f"a link to node {source_id}, which is not there", _accepted(item))]
        cls = self.class_of(source_id)
        if cls is None:
            return []  # reported at the unknown node itself
        outputs = list(getattr(cls, "RETURN_TYPES", ()))
        source = node_label(source_id, self.prompt)
        if not 0 <= slot < len(outputs):
            there = f"outputs 0 to {len(outputs) - 1}" if len(outputs) > 1 else "output 0" if outputs else "nothing of it"
            return [at_input(label, item.name, f"a link to output {slot} of {source}", there)]
        received[item.name] = outputs[slot]
        if by_class or types_match(outputs[slot], item.socket_type):
            return []
        return [at_input(label, item.name, f"{type_name(outputs[slot])} from {source}", type_name(item.socket_type))]

    def _value(self, label: str, item: Input, value: Any, by_class: bool) -> list[str]:
        """Checks one constant; range and choice are not checked where the class checks the input itself, as in ComfyUI."""
        fits = self._is_of_type(item, value)
        if fits and not by_class and item.type in ("INT", "FLOAT"):
            fits = item.options.get("min", -math.inf) <= value <= item.options.get("max", math.inf)
        if not by_class and item.choices is not None and not _is_chosen(item, value):
            return [at_input(label, item.name, shown(value), one_of(item.choices, value))]
        return [] if fits else [at_input(label, item.name, shown(value), _accepted(item))]

    def _is_of_type(self, item: Input, value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = {
            "INT": number and isinstance(value, int),
            "FLOAT": number and abs(value) <= sys.float_info.max,  # neither NaN nor infinite
            "BOOLEAN": isinstance(value, bool),
            "STRING": isinstance(value, str),
        }
        kinds = {kind.strip() for kind in item.type.split(",")}
        if kinds & fits.keys():
            return ANY in kinds or any(fits[kind] for kind in kinds & fits.keys())
        return ANY in kinds or item.is_widget or kinds.isdisjoint(self.given)


def _is_chosen(item: Input, value: Any) -> bool:
    chosen = value if item.options.get("multiselect") and isinstance(value, list) else [value]
    # 1 == True in Python, but not in a list of choices
    return all(any(one == choice and isinstance(one, bool) == isinstance(choice, bool) for choice in item.choices or [])
               for one in chosen)


def _accepted(item: Input) -> str:
    """What an input takes, in words."""
    if item.choices is not None:
        return one_of(item.choices)
    if not item.is_widget:
        return f"a link of type {type_name(item.socket_type)}"
    return _ACCEPTED.get(item.type, f"a value of type {item.type}") + _range(item)


def _range(item: Input) -> str:
    low, high = item.options.get("min"), item.options.get("max")
    if item.type not in ("INT", "FLOAT") or (low is None and high is None):
        return ""
    return f" from {low} to {high}" if None not in (low, high) else f" of at least {low}" if high is None else f" up to {high}"


class _OwnCheck:
    """A class's VALIDATE_INPUTS, called as ComfyUI calls it."""

    def __init__(self, cls: type):
        self.cls = cls
        self.check = getattr(cls, "VALIDATE_INPUTS", None)
        signature = inspect.getfullargspec(self.check) if self.check else None
        self.names = set(signature.args) if signature else set()
        self.takes_all = bool(signature and signature.varkw)
        self.compares_types = "input_types" in self.names

    def takes(self, name: str) -> bool:
        return self.takes_all or name in self.names

    def problems(self, label: str, node_id: str, inputs: dict[str, Any], input_types: Mapping[str, Any],
                 received: dict[str, Any]) -> list[str]:
        """Passes the constants that the signature names (**kwargs: all of them), and None for what comes over a link."""
        if self.check is None:
            return []
        values = {name: self._constant(find_input(input_types, name), value) for name, value in inputs.items()}
        for name, kind in (input_types.get("hidden") or {}).items():
            values[name] = {"UNIQUE_ID": node_id, "PROMPT": {}}.get(kind) if isinstance(kind, str) else None
        values = {name: value for name, value in values.items() if self.takes(name)}
        if self.compares_types:
            values["input_types"] = received
        if getattr(self.cls, "INPUT_IS_LIST", False):
            values = {name: [value] for name, value in values.items()}
        try:
            verdict = self.check(**values)
        except Exception as error:  # noqa: BLE001 - a stranger's code: whatever it raises is a problem of this node alone
            return [f"{label}: its own check failed: {type(error).__name__}: {error}"]
        if verdict is True:
            return []
        return [f"{label}: {verdict}" if isinstance(verdict, str) else f"{label}: refused by its own check"]

    @staticmethod
    def _constant(item: Input | None, value: Any) -> Any:
        linked = isinstance(value, list) and not (item and item.options.get("rawLink"))
        return None if linked else _unwrapped(value)


def _cycles(prompt: Prompt) -> list[str]:
    """One line for each circle that a walk along the links meets, its nodes in the order in which data would flow."""
    problems: list[str] = []
    done: set[str] = set()
    for start in prompt:
        path: list[str] = []
        waiting = [] if start in done else [(start, iter(_sources(prompt, start)))]
        while waiting:
            node_id, sources = waiting[-1]
            if len(path) < len(waiting):
                path.append(node_id)
            source = next(sources, None)
            if source is None:
                done.add(path.pop())
                waiting.pop()
            elif source in path:
                circle = [source, *reversed(path[path.index(source):])]
                problems.append("a cycle: " + " -> ".join(node_label(i, prompt) for i in circle))
            elif source not in done:
                waiting.append((source, iter(_sources(prompt, source))))
    return problems


def _sources(prompt: Prompt, node_id: str) -> list[str]:
    if malformed(node_id, prompt):
        return []
    links = [value for value in prompt[node_id]["inputs"].values() if isinstance(value, list) and len(value) == 2]
    return list(dict.fromkeys(link[0] for link in links if isinstance(link[0], str) and link[0] in prompt))
