"""What a node class declares: ComfyUI's /object_info table, and the one reading of it that conversion and validation share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ANY = "*"

# Types that the editor draws as a widget; any other type is a socket, and saves no widget value.
_WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "MARKDOWN", "COLOR"})
# The editor adds a "control after generate" widget to these INT inputs unless the class says otherwise.
_SEED_NAMES = frozenset({"seed", "noise_seed"})
_UPLOADS = ("image_upload", "animated_image_upload", "video_upload", "audio_upload")


@dataclass(frozen=True)
class Input:
    """One declared input: `type` is a string ("COMBO" for a list of choices), `options` its declared options.

    `choices` is the list of a combo, else None; `socket_type` is the type as declared, which links are compared with.
    """

    name: str
    category: str
    type: str
    options: Mapping[str, Any]
    choices: list[Any] | None
    socket_type: Any

    @property
    def required(self) -> bool:
        return self.category == "required"

    @property
    def is_widget(self) -> bool:
        """Whether the editor draws a widget, and so saves a value, for this input."""
        if self.options.get("forceInput") or self.options.get("defaultInput"):
            return False
        return self.type in _WIDGET_TYPES or bool(self.options.get("widgetType") or self.options.get("socketless"))

    @property
    def controls(self) -> int:
        """How many values the editor may save after this widget's own: 1 beside a seed, 2 (with a filter) beside a combo."""
        declared = self.options.get("control_after_generate")
        if declared is None:
            declared = self.type == "INT" and self.name in _SEED_NAMES
        return 0 if not declared else 2 if self.type == "COMBO" else 1

    @property
    def is_upload(self) -> bool:
        """Whether the editor puts an upload button, which saves a value of its own, on the node."""
        return any(self.options.get(option) for option in _UPLOADS)


def parse_input(name: str, category: str, spec: Any) -> Input:
    """Reads `("INT", {...})`, `(["a", "b"], {...})` or `("COMBO", {"options": [...]})`; `spec` may come from JSON."""
    declared, options = (spec[0], spec[1] if len(spec) > 1 else {}) if isinstance(spec, (list, tuple)) else (spec, {})
    options = options if isinstance(options, Mapping) else {}
    if isinstance(declared, (list, tuple)):
        return Input(name, category, "COMBO", options, list(declared), list(declared))
    listed = options.get("options") if declared == "COMBO" else None
    return Input(name, category, str(declared), options, list(listed) if isinstance(listed, (list, tuple)) else None, declared)


def inputs_of(input_types: Mapping[str, Any], order: Mapping[str, list[str]] | None = None) -> dict[str, Input]:
    """The required and then the optional inputs of INPUT_TYPES(), by name, in the editor's order.

    `order` is /object_info's `input_order`, for a table that lost its order on the way.
    """
    return {name: parse_input(name, category, spec) for name, category, spec in _declared(input_types, order or {})}


def _declared(input_types: Mapping[str, Any], order: Mapping[str, list[str]]) -> Iterator[tuple[str, str, Any]]:
    for category in ("required", "optional"):
        specs = input_types.get(category) or {}
        ordered = [name for name in order.get(category) or [] if name in specs]
        for name in dict.fromkeys([*ordered, *specs]):
            yield name, category, specs[name]


def find_input(input_types: Mapping[str, Any], name: str) -> Input | None:
    """One input by name, or None. Asks the class's own mapping: some packs declare `optional` as one that has every name."""
    for category in ("required", "optional"):
        specs = input_types.get(category)
        if specs is not None and name in specs:
            return parse_input(name, category, specs[name])
    return None


def types_match(received: Any, wanted: Any) -> bool:
    """Whether an output type may feed an input type: equal, either is "*", or the comma-separated unions share one."""
    if not received != wanted:  # noqa: SIM202 - wildcard types of custom nodes override only __ne__
        return True
    if not isinstance(received, str) or not isinstance(wanted, str):
        return ANY in (received, wanted)
    a, b = ({part.strip() for part in side.split(",")} for side in (received, wanted))
    return ANY in a | b or not a.isdisjoint(b)


def type_name(declared: Any) -> str:
    """A type as a line shows it."""
    return declared if isinstance(declared, str) else "COMBO"


def object_info(registry: dict[str, type], display_names: Mapping[str, str] = {}) -> dict[str, dict[str, Any]]:
    """ComfyUI's /object_info: class type -> what the editor needs to draw the node. Raises what an INPUT_TYPES raises."""
    return {name: _node_info(name, cls, display_names.get(name, name)) for name, cls in registry.items()}


def _python_module(cls: type) -> str:
    """By it the editor finds a pack's help pages; ComfyUI itself notes it on the classes of packs that it loads."""
    package = cls.__module__.partition(".")[0]
    return package if package == "nodes" else f"custom_nodes.{package}"


def _node_info(name: str, cls: type, display_name: str) -> dict[str, Any]:
    if hasattr(cls, "GET_NODE_INFO_V1"):  # ComfyUI's newer node API writes its own entry
        return cls.GET_NODE_INFO_V1()
    input_types = cls.INPUT_TYPES()
    outputs = list(getattr(cls, "RETURN_TYPES", ()))
    info = {
        "input": input_types,
        "input_order": {category: list(specs) for category, specs in input_types.items()},
        "is_input_list": getattr(cls, "INPUT_IS_LIST", False),
        "output": outputs,
        "output_is_list": list(getattr(cls, "OUTPUT_IS_LIST", [False] * len(outputs))),
        "output_name": list(getattr(cls, "RETURN_NAMES", outputs)),
        "name": name,
        "display_name": display_name,
        "description": getattr(cls, "DESCRIPTION", ""),
        "python_module": getattr(cls, "RELATIVE_PYTHON_MODULE", _python_module(cls)),
        "category": getattr(cls, "CATEGORY", "sd"),
        "output_node": getattr(cls, "OUTPUT_NODE", False) is True,
        "search_aliases": list(getattr(cls, "SEARCH_ALIASES", [])),
    }
    for key in ("OUTPUT_TOOLTIPS", "DEPRECATED", "EXPERIMENTAL", "API_NODE"):
        value = getattr(cls, key, None)
        if value:
            info[key.lower()] = list(value) if isinstance(value, tuple) else value
    return info
