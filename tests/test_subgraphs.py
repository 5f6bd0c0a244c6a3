"""Subgraphs: inner ids, values that an instance promotes (in each form that editors saved them), nesting, muting."""

import json

import pytest

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.workflow.convert import to_prompt
from comfy_dancegrpo.workflow.read import read_workflow
from comfy_dancegrpo.workflow.schema import object_info

INNER = "11111111-2222-3333-4444-555555555555"
OUTER = "66666666-7777-8888-9999-000000000000"


def node_class(required, returns=()):
    return type("Dummy", (), {"INPUT_TYPES": classmethod(lambda cls: {"required": required}), "RETURN_TYPES": returns})


INFO = object_info({
    "Load": node_class({"name": (["a", "b"],)}, ("MODEL",)),
    "Sample": node_class({"model": ("MODEL",), "seed": ("INT", {}), "text": ("STRING", {})}, ("IMAGE",)),
    "Save": node_class({"image": ("IMAGE",)}),
})


def link(link_id, origin, origin_slot, target, target_slot, kind):
    return {"id": link_id, "origin_id": origin, "origin_slot": origin_slot, "target_id": target, "target_slot": target_slot,
            "type": kind}


def slot(name, kind, link_id, widget=False):
    return {"name": name, "type": kind, "link": link_id, **({"widget": {"name": name}} if widget else {})}


def definition(linked_text=True):
    """model, and with `linked_text` text, come from outside; the sampler's picture goes out."""
    inputs = [{"name": "model", "type": "MODEL", "linkIds": [1]}]
    links = [link(1, -10, 0, 3, 0, "MODEL"), link(3, 3, 0, -20, 0, "IMAGE")]
    if linked_text:
        inputs.append({"name": "text", "type": "STRING", "linkIds": [2]})
        links.append(link(2, -10, 1, 3, 1, "STRING"))
    sample = {"id": 3, "type": "Sample", "widgets_values": [7, "fixed", "within"],
              "inputs": [slot("model", "MODEL", 1), slot("text", "STRING", 2 if linked_text else None, widget=True)],
              "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [3]}]}
    return {"id": INNER, "name": "Draw", "inputs": inputs, "outputs": [{"name": "IMAGE", "type": "IMAGE", "linkIds": [3]}],
            "nodes": [sample], "links": links}


def workflow(values=None, subgraph=None, text_link=None, proxies=None, mode=0, kind=INNER, more=(), links=(), others=()):
    """Load -> the instance 5 -> Save."""
    instance = {"id": 5, "type": kind, "mode": mode, "title": "Draw it", "properties": {},
                "inputs": [slot("model", "MODEL", 1), slot("text", "STRING", text_link, widget=True)],
                "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [2]}]}
    if values is not None:
        instance["widgets_values"] = values
    if proxies is not None:
        instance["properties"]["proxyWidgets"] = proxies
    nodes = [{"id": 1, "type": "Load", "widgets_values": ["a"], "inputs": [], "outputs": [{"name": "MODEL", "type": "MODEL"}]},
             instance, {"id": 6, "type": "Save", "inputs": [slot("image", "IMAGE", 2)], "outputs": []}, *more]
    return {"version": 0.4, "nodes": nodes, "links": [[1, 1, 0, 5, 0, "MODEL"], [2, 5, 0, 6, 0, "IMAGE"], *links],
            "definitions": {"subgraphs": [subgraph or definition(), *others]}}


def convert(data):
    return to_prompt(read_workflow(json.dumps(data).encode()), INFO)


def problems(data):
    with pytest.raises(WorkflowError) as caught:
        convert(data)
    return caught.value.problems


def sampled(data):
    return convert(data)["5:3"]["inputs"]


def test_an_instance_becomes_its_inner_nodes():
    assert convert(workflow()) == {
        "1": {"class_type": "Load", "inputs": {"name": "a"}, "_meta": {"title": "Load"}},
        "5:3": {"class_type": "Sample", "inputs": {"model": ["1", 0], "seed": 7, "text": "within"},
                "_meta": {"title": "Sample"}},
        "6": {"class_type": "Save", "inputs": {"image": ["5:3", 0]}, "_meta": {"title": "Save"}},
    }


def test_two_instances_are_two_sets_of_nodes():
    second = {"id": 8, "type": INNER, "inputs": [slot("model", "MODEL", 9)], "outputs": [], "widgets_values": ["other"]}
    prompt = convert(workflow(["mine"], more=[second], links=[[9, 1, 0, 8, 0, "MODEL"]]))
    assert (prompt["5:3"]["inputs"]["text"], prompt["8:3"]["inputs"]["text"]) == ("mine", "other")


@pytest.mark.parametrize("values, proxies", [
    (["mine"], None),                                                  # one value for each input that ends in a widget
    ({"text": "mine"}, None),
    (["mine"], [["-1", "text"]]),                                      # the instance's own input among the proxies
    ([None, "mine"], [["3", "seed"], ["-1", "text"]]),
    ([None, None, "mine"], [["3", "seed"], ["3", "control_after_generate"], ["3", "text"]]),
    (["mine"], [["3", "seed"]]),                                       # inputs that are not listed come first
    (["mine"], json.dumps([["3", "seed"], ["3", "$$canvas-image-preview"]])),
])
def test_the_instance_sets_a_promoted_input(values, proxies):
    assert sampled(workflow(values, proxies=proxies)) == {"model": ["1", 0], "seed": 7, "text": "mine"}


@pytest.mark.parametrize("values, expected", [([], "within"), ([None, None], "within"), ([None, "mine"], "mine")])
def test_a_proxy_shows_the_inner_widget_unless_the_instance_holds_a_value(values, expected):
    proxies = [["3", "seed"], ["3", "text"]]
    data = workflow(values, definition(linked_text=False), proxies=proxies)
    assert sampled(data) == {"model": ["1", 0], "seed": 7, "text": expected}


def test_the_control_of_a_promoted_seed_is_no_value():
    data = workflow([8, "randomize", "mine"], definition(linked_text=False), proxies=[["3", "seed"], ["3", "text"]])
    assert sampled(data) == {"model": ["1", 0], "seed": 8, "text": "mine"}


def test_a_link_to_the_instance_wins():
    data = workflow(["mine"], text_link=4, links=[[4, 7, 0, 5, 1, "STRING"]],
                    more=[{"id": 7, "type": "PrimitiveNode", "widgets_values": ["linked"], "outputs": [{"type": "STRING"}]}])
    assert sampled(data)["text"] == "linked"


def nested():
    """A subgraph that holds the inner one, and hands its own model and text to it."""
    held = {"id": 4, "type": INNER, "widgets_values": ["in between"], "outputs": [{"name": "IMAGE", "type": "IMAGE"}],
            "inputs": [slot("model", "MODEL", 1), slot("text", "STRING", 2, widget=True)]}
    inputs = [{"name": "model", "type": "MODEL", "linkIds": [1]}, {"name": "text", "type": "STRING", "linkIds": [2]}]
    return {"id": OUTER, "name": "Outer", "inputs": inputs, "nodes": [held],
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "linkIds": [3]}],
            "links": [link(1, -10, 0, 4, 0, "MODEL"), link(2, -10, 1, 4, 1, "STRING"), link(3, 4, 0, -20, 0, "IMAGE")]}


def test_a_nested_instance():
    prompt = convert(workflow(["mine"], kind=OUTER, others=[nested()]))
    assert prompt["5:4:3"]["inputs"] == {"model": ["1", 0], "seed": 7, "text": "mine"}
    assert prompt["6"]["inputs"] == {"image": ["5:4:3", 0]}


def test_an_older_name_reaches_a_widget_two_levels_down():
    data = workflow([None, 9], kind=OUTER, others=[nested()], proxies=[["-1", "text"], ["4", "3: seed"]])
    assert convert(data)["5:4:3"]["inputs"]["seed"] == 9


@pytest.mark.parametrize("mode", [2, 4])
def test_a_muted_or_bypassed_instance_takes_its_nodes_with_it(mode):
    prompt = convert(workflow(mode=mode))
    assert set(prompt) == {"1", "6"} and prompt["6"]["inputs"] == {}


def test_a_bypassed_instance_passes_on_what_fits():
    data = workflow(mode=4)
    data["nodes"][2]["inputs"][0]["type"] = "*"
    assert convert(data)["6"]["inputs"] == {"image": ["1", 0]}


def test_a_muted_node_within():
    subgraph = definition()
    subgraph["nodes"][0]["mode"] = 2
    assert convert(workflow(subgraph=subgraph))["6"]["inputs"] == {}


def test_an_input_that_leads_straight_to_an_output():
    subgraph = definition()
    subgraph["links"][1] = link(3, -10, 0, -20, 0, "MODEL")
    assert convert(workflow(subgraph=subgraph))["6"]["inputs"] == {"image": ["1", 0]}


# -- wrong ------------------------------------------------------------------------------------------------------------
def test_a_subgraph_that_holds_itself():
    subgraph = definition()
    subgraph["nodes"].append({"id": 9, "type": INNER, "inputs": [], "outputs": []})
    assert problems(workflow(subgraph=subgraph)) == [f'node 5:9 "{INNER}": a subgraph that holds itself']


def test_subgraphs_that_double_at_every_level_are_refused():
    ids = [f"{level:08}-2222-3333-4444-555555555555" for level in range(40)]
    levels = [{"id": own, "nodes": [{"id": i, "type": held} for i in (1, 2)]} for own, held in zip(ids, ids[1:])]
    assert problems(workflow(kind=ids[0], others=levels)) == ["the workflow holds more than 10000 subgraphs within subgraphs"]


def test_a_definition_that_is_not_there():
    assert problems(workflow(kind=OUTER)) == [f'node 5 "Draw it": unknown node type \'{OUTER}\'']


def test_an_unknown_node_within_is_named_by_its_whole_id():
    subgraph = definition()
    subgraph["nodes"].append({"id": 9, "type": "Nope"})
    assert problems(workflow(subgraph=subgraph)) == ['node 5:9 "Nope": unknown node type \'Nope\'']


def test_values_left_over():
    assert problems(workflow(["mine", "more"])) == ["node 5 \"Draw it\": found widget values left over: ['more']"]


def test_a_value_for_an_inner_node_that_is_not_there():
    assert problems(workflow([None, 1], proxies=[["-1", "text"], ["33", "seed"]])) == [
        'node 5 "Draw it": sets widget "seed" of inner node 33, which is not there']


def test_a_value_for_an_inner_widget_that_is_not_there():
    assert problems(workflow([None, 1], proxies=[["-1", "text"], ["3", "sed"]])) == [
        'node 5:3 "Sample": its subgraph sets widget "sed", which the node does not have']


def test_a_value_for_an_input_that_is_not_there():
    assert problems(workflow({"txt": "mine"})) == ['node 5 "Draw it": sets "txt", which the subgraph does not have']


def test_malformed_proxies():
    assert problems(workflow(proxies=[3])) == [
        'node 5 "Draw it": found proxyWidgets [3], accepted: a list of [node id, widget name]']


def test_a_link_from_an_output_that_the_subgraph_lacks():
    data = workflow()
    data["links"][1] = [2, 5, 7, 6, 0, "IMAGE"]
    assert problems(data) == ['node 5 "Draw it": a link comes from its output 7, but it has 1']


def test_a_link_within_that_leads_nowhere():
    subgraph = definition()
    subgraph["links"].append(link(9, 3, 0, 44, 0, "IMAGE"))
    assert problems(workflow(subgraph=subgraph)) == ["link 9 (node 5:3 to node 5:44): leads to a node that is not there"]
