"""The library's own executor: runs an API-format prompt with node classes from a registry, as ComfyUI would.

Only what the output nodes need runs, sources before readers, each node once, and a value is dropped after its last reader.
A `lazy` input's source runs when the node's `check_lazy_status` asks for it; a `rawLink` input receives its link, `[id, slot]`,
and as in ComfyUI its source runs nevertheless unless the input is `lazy` too. Values on wires are lists (see calls.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .. import processes
from ..errors import DanceGRPOError, Interrupted, OutOfMemory, RunError, WorkflowError, is_stop
from . import calls
from .graph import DynamicPrompt, NodeSpec, Prompt, ancestors, is_link, links
from .host import host
from .problems import node_label, title_of, unknown_type

Link = tuple[str, int]
_WANTED = object()  # a reader that never finishes: keeps what the caller asked for


def _here(make: Callable[[], Any], told: bool = True) -> Any:
    """As `processes.on_first`, for what every process does itself."""
    return make()


def execute(prompt: Prompt, registry: Mapping[str, type], outputs: Iterable[str] | None = None, wanted: Iterable[Link] = (),
            preset: Mapping[Link, list] | None = None, extra_pnginfo: Any = None) -> dict[Link, list]:
    """Runs `prompt` once; see `Executor.run`."""
    return Executor(prompt, registry, extra_pnginfo=extra_pnginfo).run(outputs, wanted, preset)


class Executor:
    """Runs one prompt, any number of times; node objects and what their classes declare are kept between runs.

    `original` is the prompt that nodes receive as PROMPT, where it is not the one that runs (a loop's body).
    """

    def __init__(self, prompt: Prompt, registry: Mapping[str, type], original: Prompt | None = None, extra_pnginfo: Any = None):
        self.prompt = prompt
        self.registry = registry
        self.original = prompt if original is None else original
        self.extra_pnginfo = extra_pnginfo
        self._specs: dict[str, NodeSpec] = {}
        self._objects: dict[tuple[str, type], Any] = {}

    def run(self, outputs: Iterable[str] | None = None, wanted: Iterable[Link] = (),
            preset: Mapping[Link, list] | None = None) -> dict[Link, list]:
        """Runs the nodes `outputs` (all output nodes when None) and what they need, and returns the values of `wanted`.

        `preset` gives outputs of nodes that must not run. Raises WorkflowError for a prompt that cannot be executed, RunError
        (chained, one line that names the node) when a node fails; errors of this library keep their class.
        """
        run = _Run(self, preset or {})
        wanted = list(wanted)
        targets = self.output_nodes() if outputs is None else list(outputs)
        return run(targets, wanted)

    def output_nodes(self) -> list[str]:
        """The ids of the prompt's output nodes."""
        return [node_id for node_id in self.prompt if self.spec(self.prompt, node_id).is_output]

    def spec(self, nodes: Prompt, node_id: str) -> NodeSpec:
        class_type = nodes[node_id]["class_type"]
        if class_type not in self._specs:
            if class_type not in self.registry:
                raise WorkflowError(unknown_type(node_label(node_id, nodes), class_type, self.registry))
            self._specs[class_type] = NodeSpec(self.registry[class_type])
        return self._specs[class_type]

    def instance(self, node_id: str, node_class: type) -> Any:
        key = (node_id, node_class)
        if key not in self._objects:
            self._objects[key] = node_class()
        return self._objects[key]


class _Run:
    """The state of one run."""

    def __init__(self, executor: Executor, preset: Mapping[Link, list]):
        self.executor = executor
        self.graph = DynamicPrompt(executor.prompt, executor.original)
        self.values: dict[str, Any] = {}  # id -> its outputs, by slot, until the last reader has finished
        self.readers: dict[str, set] = {}  # id -> who may still read it
        self.reads: dict[str, set[str]] = {}  # planned id -> what it may read
        self.needs: dict[str, list[str]] = {}  # planned id -> what must be done before it is called (again)
        self.grafts: dict[str, list[calls.Returned]] = {}  # id -> its expanded results, until the grafted nodes are done
        for (node_id, slot), values in preset.items():
            self.values.setdefault(node_id, {})[slot] = values
        self.done = set(self.values)

    def __call__(self, outputs: list[str], wanted: list[Link]) -> dict[Link, list]:
        targets = list(dict.fromkeys([*outputs, *(node_id for node_id, _ in wanted)]))
        self._plan(targets)
        for node_id, _ in wanted:
            self.readers.setdefault(node_id, set()).add(_WANTED)
        for node_id in targets:
            self._evaluate(node_id)
        return {link: self._value(link) for link in wanted}

    # -- planning ---------------------------------------------------------------------------------------------------
    def _plan(self, roots: Iterable[str]) -> None:
        """Notes, for `roots` and all that they need, who reads what.

        A node that may come to read more than its plain links say (lazy inputs, expansion) holds all its ancestors' values.
        """
        waiting = list(roots)
        while waiting:
            node_id = waiting.pop()
            if node_id in self.reads or node_id in self.done:
                continue
            node = self.graph.get_node(node_id)
            spec = self._spec(node_id)
            needs = list(dict.fromkeys(source for name, source, _ in links(node) if not spec.is_lazy(name)))
            self.needs[node_id] = needs
            self.reads[node_id] = set()
            self._hold(node_id, ancestors(self.graph.nodes, [node_id]) if spec.may_expand(node) else needs)
            waiting.extend(needs)

    def _hold(self, node_id: str, sources: Iterable[str]) -> None:
        for source in sources:
            self.reads[node_id].add(source)
            self.readers.setdefault(source, set()).add(node_id)

    def _require(self, node_id: str, sources: list[str]) -> None:
        """Puts off `node_id` until `sources` are done, too."""
        self._plan(sources)
        self._hold(node_id, sources)
        self.needs[node_id] = self.needs[node_id] + sources

    # -- running ----------------------------------------------------------------------------------------------------
    def _evaluate(self, root: str) -> None:
        """Depth first with a stack of its own: graphs may be deep, and a node may ask for more when it is called."""
        stack, path = [root], set()
        while stack:
            node_id = stack[-1]
            missing = [] if node_id in self.done else [s for s in self.needs[node_id] if s not in self.done]
            if missing:
                path.add(node_id)
                if not path.isdisjoint(missing):
                    raise WorkflowError(f"{self.graph.label(node_id)}: its inputs form a cycle")
                stack.extend(reversed(missing))
            elif node_id in self.done or self._advance(node_id):
                stack.pop()

    def _advance(self, node_id: str) -> bool:
        """Calls the node, or settles what it expanded into; False when it asked for more first."""
        try:
            returned = self.grafts.pop(node_id, None)
            if returned is None:
                processes.check_interrupt()
                returned = self._call(node_id)
                if returned is None:
                    return False
            self._finish(node_id, calls.wires(returned, self._spec(node_id), lambda link: self._value((link[0], int(link[1])))))
            return True
        except Interrupted:
            raise
        except DanceGRPOError as error:
            error.at(self.graph.label(node_id))
            raise
        except Exception as error:
            if is_stop(error):  # ComfyUI's own stop button, pressed inside a lent node
                raise
            kind = OutOfMemory if _out_of_memory(error) else RunError
            raise kind(_cause(error)).at(self.graph.label(node_id)) from error

    def _call(self, node_id: str) -> list[calls.Returned] | None:
        """The node's results, one per call; None when it needs lazy inputs or grafted nodes done first."""
        spec = self._spec(node_id)
        inputs, unevaluated = self._inputs(node_id, spec)
        instance = self.executor.instance(node_id, spec.cls)
        hidden = self._hidden(node_id)
        run = _here if spec.everywhere else processes.on_first
        if calls.has_lazy_status(spec):
            asked = run(lambda: self._asked(calls.bind(spec, instance, "check_lazy_status", hidden), inputs, unevaluated, spec))
            if asked:
                self._require(node_id, [unevaluated[name] for name in asked])
                return None
        returned = run(lambda: self._invoke(node_id, spec, calls.bind(spec, instance, spec.cls.FUNCTION, hidden), inputs),
                       told=spec.may_expand(self.graph.get_node(node_id)) or self._read_everywhere(node_id))
        if returned is None:  # a process that has no use for it
            returned = [calls.Returned(tuple([None] if is_list else None for is_list in spec.output_is_list), {})]
        if any(r.expand is not None for r in returned):
            self._graft(node_id, returned)
            return None
        return returned

    def _read_everywhere(self, node_id: str) -> bool:
        """Whether the node's values are wanted in every process: large pictures need not travel from a node to a viewer beside it."""
        return any(reader is _WANTED or self._spec(reader).everywhere for reader in self.readers.get(node_id, ()) if reader != node_id)

    def _invoke(self, node_id: str, spec: NodeSpec, function: Callable, inputs: dict[str, list]) -> list[calls.Returned]:
        shown = self.graph.get_display_node_id(node_id)
        todo = [self._silenced(node_id, call) for call in calls.split(inputs, spec.input_is_list)]
        if not all(map(calls.is_blocked, todo)):
            host().node_started(shown, self.graph.get_node(shown)["class_type"], title_of(self.graph.get_node(shown)))
        called = calls.invoke(function, todo, lambda: host().around(spec.cls))
        returned = [calls.Returned.of(value, spec.n_outputs) for value in called]
        ui = calls.merge_ui(returned)
        if ui:
            host().node_output(shown, ui)
        return returned

    def _silenced(self, node_id: str, call: calls.Call) -> calls.Call:
        """Tells a blocked call's message once, at the first node that it reaches."""
        if calls.is_blocked(call) and call.message is not None:
            host().say(f"{self.graph.label(node_id)}: did not run: {call.message}")
            return type(call)(None)
        return call

    def _graft(self, node_id: str, returned: list[calls.Returned]) -> None:
        """Adds the expanded nodes to the graph, and puts the node off until its results and their output nodes are done."""
        wanted = []
        for r in returned:
            for new_id, node in (r.expand or {}).items():
                self.graph.add_ephemeral_node(new_id, node, node_id, node.get("override_display_id", node_id))
                if self._spec(new_id).is_output:
                    wanted.append(new_id)
            if r.expand is not None:
                wanted.extend(value[0] for value in r.outputs if is_link(value))
        self.grafts[node_id] = returned
        self._require(node_id, list(dict.fromkeys(wanted)))

    def _finish(self, node_id: str, outputs: list[list]) -> None:
        self.done.add(node_id)
        self.values[node_id] = outputs
        for source in (*self.reads[node_id], node_id):
            readers = self.readers.get(source, set())
            readers.discard(node_id)
            if not readers:
                self.values.pop(source, None)

    # -- a node's inputs --------------------------------------------------------------------------------------------
    def _inputs(self, node_id: str, spec: NodeSpec) -> tuple[dict[str, list], dict[str, str]]:
        """The node's arguments as lists, and the lazy inputs not evaluated yet (None among the arguments) with their sources.

        Constants that the class does not declare are left out, links are not: a grafted node may take any number of them.
        """
        inputs: dict[str, list] = {}
        unevaluated: dict[str, str] = {}
        for name, value in self.graph.get_node(node_id)["inputs"].items():
            if not is_link(value) or spec.is_raw(name):
                if spec.input(name) is not None:
                    inputs[name] = [value]
            elif value[0] in self.done:
                inputs[name] = self._value((value[0], int(value[1])))
            else:
                inputs[name] = [None]
                unevaluated[name] = value[0]
        hidden = self._hidden(node_id)
        inputs.update((name, [hidden(kind)]) for name, kind in spec.hidden.items())
        return inputs, unevaluated

    def _hidden(self, node_id: str) -> Callable[[str], Any]:
        known = {"UNIQUE_ID": node_id, "PROMPT": self.executor.original, "EXTRA_PNGINFO": self.executor.extra_pnginfo,
                 "DYNPROMPT": self.graph}
        return lambda kind: known.get(getattr(kind, "value", kind))  # V3 classes name them by an enum of these strings

    def _asked(self, check: Callable, inputs: dict[str, list], unevaluated: dict[str, str], spec: NodeSpec) -> list[str]:
        """The unevaluated inputs that `check_lazy_status` asks for."""
        answers = calls.invoke(check, calls.split(inputs, spec.input_is_list))
        names = dict.fromkeys(name for answer in answers if isinstance(answer, list) for name in answer)
        unknown = [name for name in names if name not in inputs]
        if unknown:
            raise ValueError(f'check_lazy_status asks for input "{unknown[0]}", which is not linked')
        return [name for name in names if name in unevaluated]

    def _value(self, link: Link) -> list:
        source, slot = link
        if source not in self.values:
            raise RunError(f"reads {self.graph.label(source)} through a link that was not in the workflow, after its value was released")
        try:
            return self.values[source][slot]
        except (IndexError, KeyError):
            raise RunError(f"output {slot} of {self.graph.label(source)} is linked, but the node did not give it") from None

    def _spec(self, node_id: str) -> NodeSpec:
        return self.executor.spec(self.graph.nodes, node_id)


def _out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # torch's, which this file does not import


def _cause(error: Exception) -> str:
    """An exception in one line: its class and the first line of what it says, or, out of memory, what to lower."""
    if _out_of_memory(error):
        return 'out of memory; lower Loop Start\'s "micro_batch" first (it changes what fits, not what is learned), then the pictures\' size'
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
