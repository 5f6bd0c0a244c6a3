"""The loop: which nodes are its body, how Loop End expands, and that stepping the body equals running the graph."""

import gc
import json
import time
import weakref
from types import SimpleNamespace

import pytest

from comfy_dancegrpo.errors import RunError, WorkflowError
from comfy_dancegrpo.workflow import loop
from comfy_dancegrpo.workflow.execute import execute
from comfy_dancegrpo.workflow.host import Host, use

LINK = ("*", {"lazy": True, "rawLink": True})
RAN = []


class Node:
    RETURN_TYPES = ("*",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"x": ("*", {})}, "optional": {"y": ("*", {})}}


class Load(Node):
    def run(self, x):
        RAN.append(f"Load {x}")
        return (x,)


class LoadMany(Node):
    OUTPUT_IS_LIST = (True,)

    def run(self, x):
        return ([x, x + 1],)


class Start(Node):
    LOOP_START = True
    RETURN_TYPES = ("*", "INT")

    def run(self, x, y=0):
        return loop.blocked(2)


class Add(Node):
    def run(self, x, y=1):
        RAN.append("Add")
        return (x + y,)


class Total(Node):
    INPUT_IS_LIST = True

    def run(self, x):
        return (sum(x),)


class Show(Node):
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    def run(self, x):
        return {"ui": {"shown": [x]}}


class End(Node):
    LOOP_END = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"x": LINK}, "optional": {"y": LINK}, "hidden": {"prompt": "PROMPT", "me": "UNIQUE_ID"}}

    def run(self, prompt, me, x, y=None):
        return loop.expand(loop.find_body(prompt, me, REGISTRY), "Runner", 1)


class Runner(Node):
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"body": ("STRING", {})}, "hidden": {"prompt": "PROMPT"}}

    def run(self, body, prompt, **outside):
        runner = loop.BodyRunner(loop.LoopBody.from_json(body[0]), REGISTRY, outside, prompt[0])
        start = runner.start_inputs()
        value = start["x"]
        for iteration in range(start.get("y", 3)):
            value = runner.step((value, iteration))["x"]
        return (value,)


class Boom(Node):
    def run(self, x):
        raise ValueError("boom")


REGISTRY = {cls.__name__: cls for cls in (Load, LoadMany, Start, Add, Total, Show, End, Runner, Boom)}


class Recorder(Host):
    def __init__(self):
        super().__init__()
        self.started, self.shown = [], []

    def node_started(self, node_id, class_type, title):
        self.started.append(node_id)

    def node_output(self, node_id, ui):
        self.shown.append((node_id, ui["shown"][0]))


@pytest.fixture
def host():
    RAN.clear()
    with use(Recorder()) as recorder:
        yield recorder


def prompt(**nodes):
    return {node_id: {"class_type": kind, "inputs": inputs, "_meta": {"title": f"My {node_id}"}} for node_id, (kind, inputs) in nodes.items()}


def training():
    """loader -> start -> add (+ delta) -> end, with a preview in the body and one after the loop."""
    return prompt(
        loader=("Load", {"x": 10}), delta=("Load", {"x": 5}), start=("Start", {"x": ["loader", 0], "y": 3}),
        add=("Add", {"x": ["start", 0], "y": ["delta", 0]}), preview=("Show", {"x": ["add", 0]}),
        dead=("Add", {"x": ["add", 0]}), end=("End", {"x": ["add", 0]}), final=("Show", {"x": ["end", 0]}),
        also=("Show", {"x": ["delta", 0]}))


def test_the_body_and_what_it_takes_from_outside():
    body = loop.find_body(training(), "end", REGISTRY)
    assert (body.start_id, body.end_id) == ("start", "end")
    assert set(body.nodes) == {"start", "add", "preview", "dead"}
    assert body.outside == [["delta", 0], ["loader", 0]]
    assert body.results == {"x": ["add", 0]}
    assert loop.LoopBody.from_json(body.to_json()) == body
    assert loop.find_body(dict(reversed(training().items())), "end", REGISTRY).to_json() == body.to_json()



def test_the_loop_runs_and_everything_outside_runs_once(host):
    execute(training(), REGISTRY)
    assert [value for node_id, value in host.shown if node_id == "preview"] == [15, 20, 25]
    assert [value for node_id, value in host.shown if node_id == "final"] == [25]
    assert sorted(RAN) == ["Add"] * 3 + ["Load 10", "Load 5"]
    assert host.started.count("add") == 3 and "dead" not in host.started


def test_lists_from_outside_reach_the_body_as_in_the_graph(host):
    graph = training()
    graph["delta"] = {"class_type": "LoadMany", "inputs": {"x": 1}}
    graph["total"] = {"class_type": "Total", "inputs": {"x": ["add", 0]}}  # add is mapped over [1, 2]
    graph["end"]["inputs"]["x"] = ["total", 0]
    execute(graph, REGISTRY)
    assert [value for node_id, value in host.shown if node_id == "final"] == [10 * 8 + 3 * (1 + 2 + 4)]


def test_two_loops_in_a_row(host):
    graph = training()
    graph |= prompt(start2=("Start", {"x": ["end", 0], "y": 2}), add2=("Add", {"x": ["start2", 0], "y": ["delta", 0]}), end2=("End", {"x": ["add2", 0]}),
                    final2=("Show", {"x": ["end2", 0]}))
    assert set(loop.find_body(graph, "end2", REGISTRY).nodes) == {"start2", "add2"}
    execute(graph, REGISTRY)
    assert ("final2", 35) in host.shown and RAN.count("Load 10") == 1


def test_loop_end_may_name_a_value_from_outside_and_start_outputs(host):
    graph = training()
    graph["end"]["inputs"]["y"] = ["loader", 0]
    body = loop.find_body(graph, "end", REGISTRY)
    outside = {name: [{"loader": 10, "delta": 5}[link[0]]] for name, link in body.outside_inputs().items()}
    assert loop.BodyRunner(body, REGISTRY, outside).step((1, 0)) == {"x": 6, "y": 10}


@pytest.mark.parametrize("change, message", [
    ({"end": ("End", {"x": ["loader", 0]})}, 'node end "My end" (End): no Loop Start above it'),
    ({"s2": ("Start", {"x": 1}), "mix": ("Add", {"x": ["s2", 0], "y": ["add", 0]}), "end": ("End", {"x": ["mix", 0]})},
     'found node start "My start" (Start) and node s2 "My s2" (Start) above it, accepted: one Loop Start'),
    ({"s2": ("Start", {"x": ["add", 0]}), "mix": ("Add", {"x": ["s2", 0]}), "end": ("End", {"x": ["mix", 0]})}, "loops do not nest"),
    ({"s2": ("Start", {"x": ["add", 0]}), "e2": ("End", {"x": ["s2", 0]}), "mix": ("Add", {"x": ["e2", 0], "y": ["add", 0]}),
      "end": ("End", {"x": ["mix", 0]})}, "loops do not nest"),
    ({"s2": ("Start", {"x": ["add", 0]}), "e2": ("End", {"x": ["s2", 0]}), "end": ("End", {"x": ["e2", 0]})}, "loops do not nest"),
    ({"e2": ("End", {"x": ["add", 0]})}, 'node e2 "My e2" (End): closes the same loop as node end "My end" (End)'),
])
def test_what_is_not_one_plain_loop_is_one_line(change, message):
    with pytest.raises(WorkflowError) as caught:
        loop.find_body(training() | prompt(**change), "end", REGISTRY)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_all_loops_are_checked_before_anything_runs():
    loop.check_loops(training(), REGISTRY)
    loop.check_loops(prompt(a=("Load", {"x": 1})), REGISTRY)
    with pytest.raises(WorkflowError, match="node start .*no Loop End closes this loop"):
        loop.check_loops({k: v for k, v in training().items() if k not in ("end", "final")}, REGISTRY)
    with pytest.raises(WorkflowError) as caught:
        loop.check_loops(training() | prompt(e2=("End", {"x": ["add", 0]}), e3=("End", {"x": ["loader", 0]})), REGISTRY)
    assert len(caught.value.problems) == 3


def test_faults_in_the_body_name_its_node():
    graph = training() | prompt(add=("Boom", {"x": ["start", 0]}))
    with pytest.raises(RunError) as caught:
        execute(graph, REGISTRY)
    assert str(caught.value) == 'node add "My add" (Boom): ValueError: boom'


def test_a_result_that_is_not_one_value_is_refused(host):
    graph = training() | prompt(delta=("LoadMany", {"x": 1}))
    with pytest.raises(RunError, match='node add "My add" .Add.: output 0: found 2 values, accepted: one'):
        execute(graph, REGISTRY)


def test_the_runner_by_itself_is_refused():
    for text in ("", "{}", "[]", "null", '{"start_id": 1}'):
        with pytest.raises(WorkflowError, match="made by Loop End"):
            loop.LoopBody.from_json(text)


def fingerprint(graph, **options):
    return loop.fingerprint(graph, loop.find_body(graph, "end" if "end" in graph else "_end", REGISTRY), **options)


def test_fingerprint_sees_inputs_and_links_only():
    same = training()
    renamed = json.loads(json.dumps(same).replace('"add"', '"_add"').replace('"end"', '"_end"').replace("My ", "Your "))
    assert fingerprint(dict(reversed(renamed.items()))) == fingerprint(same)
    same["also"]["inputs"]["x"] = 3  # neither above Loop End nor in the body
    same["delta"]["inputs"]["x"] = 5.0
    same["preview"]["inputs"]["x"] = ["start", 0]  # a side branch of the body
    assert fingerprint(same) == fingerprint(training())
    changes = [("delta", "x", 6), ("start", "y", 4), ("add", "y", ["loader", 0]), ("start", "x", ["delta", 0])]
    changed = []
    for node_id, name, value in changes:
        graph = training()
        graph[node_id]["inputs"][name] = value
        changed.append(fingerprint(graph))
    assert len({fingerprint(training()), *changed}) == len(changes) + 1


def test_fingerprint_leaves_out_what_may_change():
    longer = training()
    longer["start"]["inputs"]["y"] = 4
    leave_out = {("Start", "y")}
    assert fingerprint(longer, leave_out=leave_out) == fingerprint(training(), leave_out=leave_out)
    longer["add"]["inputs"]["y"] = 4  # the same name on another class counts
    assert fingerprint(longer, leave_out=leave_out) != fingerprint(training(), leave_out=leave_out)


def test_fingerprint_of_a_graph_that_lacks_what_a_node_has_learned_since(monkeypatch):
    old, new = training(), training()
    new["add"]["inputs"]["learned"] = 7
    asked = REGISTRY[new["add"]["class_type"]].INPUT_TYPES()
    monkeypatch.setattr(REGISTRY[new["add"]["class_type"]], "INPUT_TYPES",
                        lambda: {**asked, "optional": {**asked.get("optional", {}), "learned": ("INT", {"default": 7})}})
    assert fingerprint(new, registry=REGISTRY) == fingerprint(old, registry=REGISTRY) != fingerprint(new)
    new["add"]["inputs"]["learned"] = 8
    assert fingerprint(new, registry=REGISTRY) != fingerprint(old, registry=REGISTRY)
    old["add"]["inputs"].pop("y", None)  # a required input counts whatever its value
    assert fingerprint(old, registry=REGISTRY) != fingerprint(training(), registry=REGISTRY)


def test_blocked_is_comfyuis_where_comfyui_is(monkeypatch):
    class ExecutionBlocker:
        def __init__(self, message):
            self.message = message

    assert [type(b).__name__ for b in loop.blocked(2)] == ["Blocked"] * 2
    monkeypatch.setitem(loop.sys.modules, "comfy_execution.graph_utils", SimpleNamespace(ExecutionBlocker=ExecutionBlocker))
    assert isinstance(loop.blocked(1)[0], ExecutionBlocker) and loop.blocked(1)[0].message is None


def test_a_step_is_quick_and_keeps_nothing(host):
    body = loop.find_body(training(), "end", REGISTRY)
    runner = loop.BodyRunner(body, REGISTRY, {name: [5] for name in body.outside_inputs()})

    class Number(float):
        """Something that can be referred to weakly."""

        def __add__(self, other):
            return Number(float(self) + other)

    kept = []
    before = time.perf_counter()
    for iteration in range(200):
        host.shown.clear()  # the recorder would keep them
        kept.append(weakref.ref(runner.step((Number(1), iteration))["x"]))
    assert time.perf_counter() - before < 2  # 0.3 ms a step measured; a busy machine is allowed ten times that
    host.shown.clear()
    gc.collect()
    assert [ref() for ref in kept] == [None] * 200
