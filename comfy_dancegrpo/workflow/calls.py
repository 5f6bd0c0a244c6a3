"""One node's call as ComfyUI makes it: lists mapped over, blocked values passed on, every form of return value read."""

from __future__ import annotations

import contextvars
import dataclasses
import inspect
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .graph import NodeSpec, is_link, is_v3
from .host import host


class Blocked:
    """A value that keeps its readers from running, headless; silent when `message` is None."""

    def __init__(self, message: str | None = None):
        self.message = message


def is_blocked(value: Any) -> bool:
    """Whether a value is `Blocked` or ComfyUI's ExecutionBlocker, known by name: ComfyUI need not be there."""
    return isinstance(value, Blocked) or type(value).__name__ == "ExecutionBlocker"


Call = "dict[str, Any] | Blocked"  # one call's arguments, or the blocked value that it passes on in place of a result


def split(inputs: dict[str, list], as_lists: bool) -> list[Call]:
    """A node's inputs as its calls: one call of whole lists, or one per element with short lists repeating their last.

    Raises ValueError for an empty list where elements are wanted.
    """
    if as_lists:
        blocked = next((v for values in inputs.values() for v in values if is_blocked(v)), None)
        return [inputs if blocked is None else blocked]
    for name, values in inputs.items():
        if len(values) == 0:
            raise ValueError(f'input "{name}" received an empty list')
    calls: list[Call] = []
    for i in range(max(map(len, inputs.values()), default=1)):
        call = {name: values[min(i, len(values) - 1)] for name, values in inputs.items()}
        calls.append(next((v for v in call.values() if is_blocked(v)), call))
    return calls


def invoke(function: Callable, calls: list[Call], around: Callable[[], AbstractContextManager] = nullcontext) -> list[Any]:
    """What `function` returns for each call, in order; blocked calls give their blocked value. Coroutines run together.

    `around()` is entered in the thread that calls: torch's modes belong to a thread.
    """
    if inspect.iscoroutinefunction(function):
        return _run_coroutine(_gather(function, calls), around)
    results = []
    with around():
        for call in calls:
            host().check_interrupt()
            results.append(call if is_blocked(call) else function(**call))
    return results


async def _gather(function: Callable, calls: list[Call]) -> list[Any]:
    import asyncio  # half of the pack's import time, for nodes that few graphs have

    running = [asyncio.ensure_future(function(**call)) for call in calls if not is_blocked(call)]
    results = iter(await asyncio.gather(*running))
    return [call if is_blocked(call) else next(results) for call in calls]


def _run_coroutine(coroutine: Any, around: Callable[[], AbstractContextManager]) -> Any:
    """Runs a coroutine to its end, from a thread of its own where a loop already runs in this one (inside ComfyUI)."""
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        with around():
            return asyncio.run(coroutine)
    outcome: list[Any] = [None, None]

    def run() -> None:
        try:
            with around():
                outcome[0] = asyncio.run(coroutine)
        except BaseException as error:  # handed to the waiting thread, whatever it is
            outcome[1] = error

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,))
    thread.start()
    thread.join()
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def bind(spec: NodeSpec, instance: Any, name: str, hidden: Callable[[str], Any]) -> Callable:
    """A node's method `name`, ready to be called; `hidden(kind)` gives the hidden values that a V3 clone holds."""
    if is_v3(spec.cls):
        instance = spec.cls.PREPARE_CLASS_CLONE({kind: hidden(kind) for kind in spec.v3_hidden})
    return getattr(instance, name)


def has_lazy_status(spec: NodeSpec) -> bool:
    """Whether the class has a `check_lazy_status` of its own; every V3 class inherits one that must not be called."""
    own = getattr(spec.cls, "check_lazy_status", None)
    if own is None or not is_v3(spec.cls):
        return own is not None
    return own.__func__ is not spec.cls.GET_BASE_CLASS().check_lazy_status.__func__


@dataclasses.dataclass(frozen=True)
class Returned:
    """One call's return value, read: `outputs` in slot order (links to grafted nodes among them when `expand` is given)."""

    outputs: tuple
    ui: dict[str, list]
    expand: dict[str, dict] | None = None

    @classmethod
    def of(cls, value: Any, n_outputs: int) -> Returned:
        """Reads a tuple, a {"ui", "result", "expand"} dict, a V3 NodeOutput, a blocked value, or None of a node without outputs.

        Raises TypeError for anything else.
        """
        ui, expand = {}, None
        if isinstance(value, dict):
            value, ui, expand = value.get("result", ()), value.get("ui") or {}, value.get("expand")
        elif hasattr(value, "block_execution"):
            ui, expand = value.ui or {}, value.expand
            value = Blocked(value.block_execution) if value.block_execution is not None else value.result or ()
        if is_blocked(value):
            value = (value,) * n_outputs
        if value is None and n_outputs == 0:
            value = ()
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"the node returned {type(value).__name__}, where a tuple of {n_outputs} outputs is due")
        return cls(tuple(value), ui.as_dict() if hasattr(ui, "as_dict") else ui, expand)


def wires(returned: list[Returned], spec: NodeSpec, resolve: Callable[[list], list]) -> list[list]:
    """Each output's list over all calls; `resolve(link)` gives the values that a link in an expanded result stands for."""
    outputs: list[list] = [[] for _ in range(min(len(r.outputs) for r in returned))]
    for r in returned:
        for slot, wire in enumerate(outputs):
            value = r.outputs[slot]
            if r.expand is not None and is_link(value):
                wire.extend(resolve(value))
            elif slot < spec.n_outputs and spec.output_is_list[slot] and not is_blocked(value):
                wire.extend(value)
            else:
                wire.append(value)
    return outputs


def merge_ui(returned: list[Returned]) -> dict[str, list]:
    """The calls' `ui` values, each key's lists joined."""
    merged: dict[str, list] = {}
    for r in returned:
        for key, values in r.ui.items():
            merged.setdefault(key, []).extend(values)
    return merged
