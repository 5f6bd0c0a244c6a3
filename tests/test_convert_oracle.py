"""The same graphs through comfy-cli's converter, another reading of the editor's rules.

Left out, for comfy-cli does otherwise on purpose: links saved as objects at the top level (it drops them), unknown nodes and
left-over values (it passes them through), a bypassed node without a fitting input (it takes any linked input; the editor
takes none), and a primitive whose value is not the widget's own (it keeps the widget's; the editor copies the primitive's).
"""

import json

import pytest

from comfy_dancegrpo.workflow.convert import to_prompt
from comfy_dancegrpo.workflow.read import read_workflow
from comfy_dancegrpo.workflow.schema import object_info

oracle = pytest.importorskip("comfy_cli.workflow_to_api").convert_ui_to_api
SUBGRAPH = "11111111-2222-3333-4444-555555555555"


def node_class(required, optional=None, returns=()):
    types = {"required": required, "optional": optional or {}}
    return type("Dummy", (), {"INPUT_TYPES": classmethod(lambda cls: types), "RETURN_TYPES": returns})


INFO = json.loads(json.dumps(object_info({
    "Load": node_class({"name": (["a", "b"],)}, None, ("MODEL", "CLIP")),
    "Sample": node_class({"model": ("MODEL",), "seed": ("INT", {"default": 0}), "steps": ("INT", {"default": 20}),
                          "mode": (["fixed", "free"], {"default": "free"})}, {"strength": ("FLOAT", {"default": 1.0})},
                         ("IMAGE",)),
    "Patch": node_class({"clip": ("CLIP",), "model": ("MODEL",), "scale": ("FLOAT", {"default": 1.0})}, None,
                        ("MODEL", "CLIP")),
    "Save": node_class({"image": ("IMAGE",), "label": ("STRING", {"default": "out"})}),
})))


def slot(name, kind, link, widget=False):
    return {"name": name, "type": kind, "link": link, **({"widget": {"name": name}} if widget else {})}


def node(node_id, kind, values, inputs=(), outputs=(), **more):
    return {"id": node_id, "type": kind, "widgets_values": values, "inputs": list(inputs),
            "outputs": [{"name": o, "type": o} for o in outputs], **more}


def sampler(values=(7, "randomize", 30, "fixed", 0.5), extra=()):
    return node(3, "Sample", list(values), [slot("model", "MODEL", 1), *extra], ["IMAGE"], title="Mine")


def flow(*middle, links=((1, 1, 0, 3, 0, "MODEL"),), sample=None, load=None, **more):
    """Load (1) -> ... -> Sample (3) -> Save (4)."""
    nodes = [load or node(1, "Load", ["b"], (), ["MODEL", "CLIP"]), *middle, sample or sampler(),
             node(4, "Save", ["cat"], [slot("image", "IMAGE", 2)])]
    return {"version": 0.4, "nodes": nodes, "links": [[2, 3, 0, 4, 0, "IMAGE"], *map(list, links)], **more}


def patch(mode):
    return node(10, "Patch", [1.5], [slot("clip", "CLIP", 12), slot("model", "MODEL", 11)], ["MODEL", "CLIP"], mode=mode)


AROUND = ((1, 10, 0, 3, 0, "MODEL"), (11, 1, 0, 10, 1, "MODEL"), (12, 1, 1, 10, 0, "CLIP"))
REROUTES = (node(10, "Reroute", None, [slot("", "*", 11)], ["*"]), node(12, "Reroute", None, [slot("", "*", 13)], ["*"]))
STEPS = (slot("steps", "INT", 9, widget=True),)


def subgraph_flow(values, mode=0):
    inner = node(8, "Sample", [7, "fixed", 30, "fixed", 0.5], [slot("model", "MODEL", 1), slot("steps", "INT", 2, True)],
                 ["IMAGE"])
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(keys, row)) for row in
             [(1, -10, 0, 8, 0, "MODEL"), (2, -10, 1, 8, 1, "INT"), (3, 8, 0, -20, 0, "IMAGE")]]
    definition = {"id": SUBGRAPH, "name": "S", "nodes": [inner], "links": links,
                  "inputs": [{"id": "a", "name": "model", "type": "MODEL", "linkIds": [1]},
                             {"id": "b", "name": "steps", "type": "INT", "linkIds": [2]}],
                  "outputs": [{"id": "c", "name": "IMAGE", "type": "IMAGE", "linkIds": [3]}]}
    instance = node(3, SUBGRAPH, values, [slot("model", "MODEL", 1), slot("steps", "INT", None, True)], ["IMAGE"], mode=mode)
    return flow(sample=instance, definitions={"subgraphs": [definition]})


@pytest.mark.parametrize("data", [
    pytest.param(flow(), id="plain"),
    pytest.param(flow(sample=sampler([7, 30, "fixed", 0.5])), id="no control beside the seed"),
    pytest.param(flow(sample=sampler([7, "fixed", 30])), id="defaults for missing trailing values"),
    pytest.param(flow(sample=sampler(), groups=[{"title": "g"}]), id="groups"),
    pytest.param(flow(node(9, "Note", ["x"]), node(10, "MarkdownNote", ["x"])), id="notes"),
    pytest.param(flow(patch(0), links=AROUND), id="a node between"),
    pytest.param(flow(patch(2), links=AROUND), id="muted"),
    pytest.param(flow(patch(4), links=AROUND), id="bypassed"),
    pytest.param(flow(*REROUTES, links=((1, 12, 0, 3, 0, "*"), (13, 10, 0, 12, 0, "*"), (11, 1, 0, 10, 0, "*"))),
                 id="reroutes"),
    pytest.param(flow(node(9, "PrimitiveNode", [30, "fixed"], (), ["INT"]), sample=sampler(extra=STEPS),
                      links=((1, 1, 0, 3, 0, "MODEL"), (9, 9, 0, 3, 1, "INT"))), id="primitive"),
    pytest.param(flow(node(9, "Load", ["a"], (), ["INT"]), sample=sampler(extra=STEPS),
                      links=((1, 1, 0, 3, 0, "MODEL"), (9, 9, 0, 3, 1, "INT"))), id="a widget that is linked"),
    pytest.param(subgraph_flow([55]), id="subgraph that sets a widget"),
    pytest.param(subgraph_flow(None), id="subgraph that sets none"),
    pytest.param(subgraph_flow([55], mode=2), id="muted subgraph"),
    pytest.param(flow(load=node(1, "Load", {"name": "a"}, (), ["MODEL", "CLIP"])), id="values by name"),
])
def test_both_give_the_same_prompt(data):
    ours = to_prompt(read_workflow(json.dumps(data).encode()), INFO)
    assert ours == oracle(data, INFO)
    assert ours["4"]["class_type"] == "Save"
