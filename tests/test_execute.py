"""The executor against small node classes: what ComfyUI does with the same graph is what is expected here."""

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from comfy_dancegrpo import processes
from comfy_dancegrpo.errors import DanceGRPOError, Interrupted, RunError, WorkflowError
from comfy_dancegrpo.workflow import calls
from comfy_dancegrpo.workflow.execute import Executor, execute
from comfy_dancegrpo.workflow.host import Host, use

REGISTRY = {}


def node(inputs=None, returns=("*",), optional=None, hidden=None, **attributes):
    """Makes a node class of a function and puts it in REGISTRY under the function's name."""

    def make(function):
        types = {"required": {name: ("*", {}) if options is None else options for name, options in (inputs or {}).items()},
                 "optional": {name: ("*", {}) for name in optional or ()}, "hidden": hidden or {}}
        body = {"INPUT_TYPES": classmethod(lambda cls: types), "RETURN_TYPES": returns, "FUNCTION": "run",
                "run": staticmethod(function), **attributes}
        REGISTRY[function.__name__] = type(function.__name__, (), body)
        return function

    return make


class Recorder(Host):
    def __init__(self):
        super().__init__()
        self.started, self.outputs, self.said = [], [], []

    def node_started(self, node_id, class_type, title):
        self.started.append(node_id)

    def node_output(self, node_id, ui):
        self.outputs.append((node_id, ui))

    def say(self, line):
        self.said.append(line)


@pytest.fixture
def host():
    with use(Recorder()) as recorder:
        yield recorder


def prompt(**nodes):
    """`a=("Class", {"x": 1})` -> API format, with the name as id and a title."""
    return {node_id: {"class_type": kind, "inputs": inputs, "_meta": {"title": f"My {node_id}"}} for node_id, (kind, inputs) in nodes.items()}


SHOW = {"OUTPUT_NODE": True}


@node({"x": None})
def Const(x):
    return (x,)


@node({"x": None}, optional=("y",))
def Add(x, y=100):
    return (x + y,)


@node({"x": None}, returns=(), **SHOW)
def Show(x):
    return {"ui": {"shown": [x]}}


@node({"x": None}, returns=("*",), OUTPUT_IS_LIST=(True,))
def Spread(x):
    return (list(x),)


@node({"x": None}, INPUT_IS_LIST=True)
def Gather(x):
    return (tuple(x),)


@node({"x": None})
def Fail(x):
    raise ZeroDivisionError("by zero\nsecond line")


@node({"x": None})
def Block(x):
    return (calls.Blocked(x),)


def shown(recorder):
    return [value for _, ui in recorder.outputs for value in ui["shown"]]


def test_runs_what_the_outputs_need_once_in_order(host):
    graph = prompt(show=("Show", {"x": ["b", 0]}), b=("Add", {"x": ["a", 0], "y": ["a", 0]}), a=("Const", {"x": 3}),
                   unused=("Fail", {"x": 1}))
    execute(graph, REGISTRY)
    assert host.started == ["a", "b", "show"]
    assert host.outputs == [("show", {"shown": [6]})]


def test_wanted_preset_and_absent_optional(host):
    graph = prompt(a=("Fail", {"x": 3}), b=("Add", {"x": ["a", 0]}))
    assert execute(graph, REGISTRY, outputs=[], wanted=[("b", 0)], preset={("a", 0): [1, 2]}) == {("b", 0): [101, 102]}
    assert host.started == ["b"]


def test_lists_are_mapped_and_the_short_one_repeats_its_last(host):
    graph = prompt(a=("Spread", {"x": (1, 2, 3)}), b=("Spread", {"x": (10, 20)}), c=("Add", {"x": ["a", 0], "y": ["b", 0]}),
                   g=("Gather", {"x": ["c", 0]}), s1=("Show", {"x": ["c", 0]}), s2=("Show", {"x": ["g", 0]}))
    execute(graph, REGISTRY)
    assert shown(host) == [11, 22, 23, (11, 22, 23)]


def test_a_list_that_another_process_has_made_and_no_one_here_reads(host, monkeypatch):
    monkeypatch.setattr(processes, "on_first", lambda make, told=True: make() if told else None)  # as in all processes but the first
    execute(prompt(a=("Spread", {"x": (1, 2, 3)}), c=("Add", {"x": ["a", 0]}), s=("Show", {"x": ["c", 0]})), REGISTRY)
    assert host.started == []


def test_an_empty_list_is_named(host):
    graph = prompt(a=("Spread", {"x": ()}), s=("Show", {"x": ["a", 0]}))
    with pytest.raises(RunError, match='node s "My s" .Show.: .*input "x" received an empty list'):
        execute(graph, REGISTRY)


def test_values_are_released_after_their_last_reader():
    class Big:
        pass

    alive = []

    @node()
    def MakeBig():
        big = Big()
        alive.append(weakref.ref(big))
        return (big,)

    @node({"x": None})
    def Measure(x):
        return (1,)

    @node({"x": None}, returns=(), **SHOW)
    def Look(x):
        gc.collect()
        seen.append(alive[0]() is not None)
        return ()

    seen = []
    graph = prompt(big=("MakeBig", {}), m=("Measure", {"x": ["big", 0]}), m2=("Measure", {"x": ["big", 0]}),
                   look=("Look", {"x": ["m", 0]}), look2=("Look", {"x": ["m2", 0]}))
    execute(graph, REGISTRY)
    assert seen == [True, False]


def test_hidden_inputs(host):
    @node(hidden={"me": "UNIQUE_ID", "all": "PROMPT", "png": "EXTRA_PNGINFO", "dyn": "DYNPROMPT"})
    def Hidden(me, all, png, dyn):
        return ((me, all, png, dyn.get_node(me)["class_type"]),)

    graph = prompt(h=("Hidden", {}))
    [value] = execute(graph, REGISTRY, [], [("h", 0)], extra_pnginfo={"workflow": 1})[("h", 0)]
    assert value == ("h", graph, {"workflow": 1}, "Hidden")


def test_raw_and_lazy_links_leave_their_source_alone(host):
    @node({"x": ("*", {"rawLink": True, "lazy": True})})
    def Raw(x):
        return (x,)

    graph = prompt(bad=("Fail", {"x": 1}), r=("Raw", {"x": ["bad", 0]}))
    assert execute(graph, REGISTRY, [], [("r", 0)]) == {("r", 0): [["bad", 0]]}


def test_lazy_inputs_run_when_asked_and_share_values_that_others_read_before(host):
    @node({"pick": None, "a": ("*", {"lazy": True}), "b": ("*", {"lazy": True})})
    def Switch(pick, a=None, b=None):
        return (a if pick == "a" else b,)

    REGISTRY["Switch"].check_lazy_status = lambda self, pick, a=None, b=None: [pick]
    graph = prompt(k=("Const", {"x": 1}), s=("Show", {"x": ["k", 0]}), use_k=("Add", {"x": ["k", 0]}), bad=("Fail", {"x": 1}),
                   sw=("Switch", {"pick": "a", "a": ["use_k", 0], "b": ["bad", 0]}), s2=("Show", {"x": ["sw", 0]}))
    execute(graph, REGISTRY)
    assert shown(host) == [1, 101]
    assert host.started.count("k") == 1 and "bad" not in host.started


def test_expansion_is_grafted_and_its_nodes_count_as_the_saved_one(host):
    @node({"n": None, "x": ("*", {"rawLink": True, "lazy": True})}, returns=("*", "*"))
    def Repeat(n, x):
        grafted, last = {}, x
        for i in range(n):
            grafted[f"r.{i}"] = {"class_type": "Add", "inputs": {"x": last, "y": 1}}
            last = [f"r.{i}", 0]
        grafted["r.show"] = {"class_type": "Show", "inputs": {"x": last}}
        return {"result": (last, "plain"), "expand": grafted}

    graph = prompt(k=("Const", {"x": 5}), r=("Repeat", {"n": 3, "x": ["k", 0]}), s=("Show", {"x": ["r", 0]}), s2=("Show", {"x": ["r", 1]}))
    execute(graph, REGISTRY)
    assert host.outputs == [("r", {"shown": [8]}), ("s", {"shown": [8]}), ("s2", {"shown": ["plain"]})]
    assert set(host.started) == {"k", "r", "s", "s2"} and host.started.count("k") == 1


def test_an_expansion_that_fails_names_the_saved_node(host):
    @node()
    def Expand():
        return {"result": (["e.0", 0],), "expand": {"e.0": {"class_type": "Fail", "inputs": {"x": 1}}}}

    with pytest.raises(RunError, match='^node e "My e" .Expand.: ZeroDivisionError: by zero$'):
        execute(prompt(e=("Expand", {})), REGISTRY, [], [("e", 0)])


def test_result_links_keep_lists_on_their_output(host):
    @node(returns=("*", "*"))
    def ExpandList():
        return {"result": (["l", 0], 7), "expand": {"l": {"class_type": "Spread", "inputs": {"x": (1, 2)}}}}

    assert execute(prompt(e=("ExpandList", {})), REGISTRY, [], [("e", 0), ("e", 1)]) == {("e", 0): [1, 2], ("e", 1): [7]}


async def _double(x):
    await asyncio.sleep(0.001 * (5 - x))  # the first to start is the last to end: order must not depend on it
    return (2 * x,)


def test_async_nodes_also_where_a_loop_is_running(host):
    node({"x": None})(_double)
    graph = prompt(l=("Spread", {"x": (1, 2, 3)}), d=("_double", {"x": ["l", 0]}))

    async def inside():
        return execute(graph, REGISTRY, [], [("d", 0)])

    assert execute(graph, REGISTRY, [], [("d", 0)]) == {("d", 0): [2, 4, 6]}
    assert asyncio.run(inside()) == {("d", 0): [2, 4, 6]}


class _Mode(threading.local):
    """Like torch's modes: it holds in the thread that entered it, and in no other."""

    entered = False


_mode = _Mode()


@contextlib.contextmanager
def _entered(node_class):
    _mode.entered = True
    yield
    _mode.entered = False


async def _async_where(x):
    return (_mode.entered,)


def _where(x):
    return (_mode.entered,)


@pytest.mark.parametrize("function", [_where, _async_where])
def test_a_node_is_called_around_in_its_own_thread(host, monkeypatch, function):
    node({"x": None})(function)
    monkeypatch.setattr(host, "around", _entered)
    graph = prompt(w=(function.__name__, {"x": 1}))

    async def inside():
        return execute(graph, REGISTRY, [], [("w", 0)])

    assert execute(graph, REGISTRY, [], [("w", 0)]) == asyncio.run(inside()) == {("w", 0): [True]}
    assert not _mode.entered


def test_out_of_memory_says_what_to_lower(host):
    @node()
    def Allocate():
        import torch

        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.\nMany lines follow.")

    with pytest.raises(RunError, match='^node a "My a" .Allocate.: out of memory; lower Loop Start.s "micro_batch" first .+$'):
        execute(prompt(a=("Allocate", {})), REGISTRY, [], [("a", 0)])


def test_blocked_values_pass_on_silently_or_say_once(host):
    graph = prompt(b=("Block", {"x": None}), a=("Add", {"x": ["b", 0]}), s=("Show", {"x": ["a", 0]}))
    execute(graph, REGISTRY)
    assert host.started == ["b"] and host.outputs == [] and host.said == []
    graph["b"]["inputs"]["x"] = "no pictures"
    execute(graph, REGISTRY)
    assert host.outputs == [] and host.said == ['node a "My a" (Add): did not run: no pictures']


def test_comfyui_blocker_is_known_by_name_and_blocks_only_its_element(host):
    blocker = type("ExecutionBlocker", (), {"message": None})()
    graph = prompt(a=("Spread", {"x": (1, blocker, 3)}), s=("Show", {"x": ["a", 0]}), g=("Gather", {"x": ["a", 0]}), s2=("Show", {"x": ["g", 0]}))
    execute(graph, REGISTRY)
    assert host.outputs == [("s", {"shown": [1, 3]})]


def test_a_fault_is_one_line_that_names_the_node_and_is_chained():
    graph = prompt(f=("Fail", {"x": 1}))
    with pytest.raises(RunError) as caught:
        execute(graph, REGISTRY, ["f"])
    assert str(caught.value) == 'node f "My f" (Fail): ZeroDivisionError: by zero'
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("error", [WorkflowError("no such file", "nor that"), RunError("nan")])
def test_errors_of_the_library_keep_their_class_and_get_the_label_once(error):
    @node()
    def Inner():
        raise error

    @node()
    def Outer():
        return execute(prompt(i=("Inner", {})), REGISTRY, [], [("i", 0)])

    lines = str(error).splitlines()
    with pytest.raises(DanceGRPOError) as caught:
        execute(prompt(o=("Outer", {})), REGISTRY, ["o"])
    assert caught.value is error
    assert str(error).splitlines() == [f'node i "My i" (Inner): {line}' for line in lines]


@pytest.mark.parametrize("error", [Interrupted("stop"), type("InterruptProcessingException", (Exception,), {})("comfy")])
def test_interrupts_pass_through(error):
    @node()
    def Stops():
        raise error

    with pytest.raises(type(error)) as caught:
        execute(prompt(s=("Stops", {})), REGISTRY, ["s"])
    assert caught.value is error and "node" not in str(error)


def test_the_host_may_stop_the_run_before_any_node():
    class Stopped(Recorder):
        def check_interrupt(self):
            raise Interrupted("stopped")

    with use(Stopped()) as stopped, pytest.raises(Interrupted):
        execute(prompt(c=("Const", {"x": 1})), REGISTRY, ["c"])
    assert stopped.started == []


@pytest.mark.parametrize("graph, message", [
    (prompt(a=("Add", {"x": ["b", 0]}), b=("Add", {"x": ["a", 0]})), "cycle"),
    (prompt(a=("Add", {"x": ["a", 0]})), "cycle"),
    (prompt(a=("Add", {"x": ["gone", 0]})), "gone"),
    (prompt(a=("Ad", {"x": 1})), "unknown node type 'Ad'.*'Add'"),
    (prompt(a=("Add", {"x": ["s", 4]}), s=("Const", {"x": 1})), "output 4 of node s"),
])
def test_what_cannot_be_executed_is_one_line(graph, message):
    with pytest.raises(DanceGRPOError, match=message) as caught:
        execute(graph, REGISTRY, ["a"])
    assert len(str(caught.value).splitlines()) == 1


def test_a_return_value_that_is_no_tuple_is_named():
    @node()
    def Bare():
        return 3

    with pytest.raises(RunError, match="returned int, where a tuple of 1 outputs is due"):
        execute(prompt(b=("Bare", {})), REGISTRY, ["b"])


def test_objects_live_as_long_as_the_executor_and_runs_do_not_leak():
    class Count:
        RETURN_TYPES, FUNCTION, n = ("INT",), "run", 0
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def run(self):
            self.n += 1
            return (self.n,)

    executor = Executor(prompt(c=("Count", {})), {"Count": Count})
    assert [executor.run([], [("c", 0)])[("c", 0)] for _ in range(3)] == [[1], [2], [3]]


def test_the_engine_imports_no_torch():
    code = "import sys, comfy_dancegrpo.workflow.loop; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parent.parent).returncode == 0
