"""The editor's graph -> the API prompt: links, widgets, muting, bypassing, primitives, and every way to be wrong."""

import json

import pytest

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.workflow.convert import to_prompt
from comfy_dancegrpo.workflow.read import read_workflow
from comfy_dancegrpo.workflow.schema import object_info


def node_class(required=None, optional=None, returns=(), **more):
    types = {"required": required or {}, **({"optional": optional} if optional else {})}
    return type("Dummy", (), {"INPUT_TYPES": classmethod(lambda cls: types), "RETURN_TYPES": returns, **more})


REGISTRY = {
    "Load": node_class({"name": (["a", "b"],)}, returns=("MODEL", "CLIP")),
    "Blank": node_class({"width": ("INT", {"default": 64}), "size": ("INT", {"default": 1})}, returns=("LATENT",)),
    "Sample": node_class({"model": ("MODEL",), "seed": ("INT", {"default": 0}), "steps": ("INT", {"default": 20}),
                          "latent": ("LATENT",), "mode": (["fixed", "free"], {"default": "free"})},
                         {"strength": ("FLOAT", {"default": 1.0})}, ("LATENT",)),
    "Patch": node_class({"clip": ("CLIP",), "model": ("MODEL",), "scale": ("FLOAT", {"default": 1.0})},
                        returns=("MODEL", "CLIP")),
    "Picture": node_class({"image": (["x.png"], {"image_upload": True})}, {"note": ("STRING", {"default": ""})}, ("IMAGE",)),
    "Numbers": node_class({"values": ("STRING", {"forceInput": True}), "text": ("STRING", {"multiline": True}),
                           "pick": ("COMBO", {"options": ["p", "q"], "control_after_generate": True})},
                          {"extra": ("STRING", {})}, ("STRING",)),
    "Save": node_class({"latent": ("LATENT",)}, {"label": ("STRING", {"default": "out"})}, OUTPUT_NODE=True),
}
INFO = object_info(REGISTRY, {"Sample": "The Sampler"})


def node(node_id, kind, values=None, inputs=(), outputs=(), **more):
    """A saved node; `inputs` are (name, type, link id[, widget name])."""
    slots = [{"name": i[0], "type": i[1], "link": i[2], **({"widget": {"name": i[3]}} if len(i) > 3 else {})} for i in inputs]
    saved = {"id": node_id, "type": kind, "inputs": slots, "outputs": [{"name": o, "type": o} for o in outputs], **more}
    return saved if values is None else {**saved, "widgets_values": values}


def graph(nodes, links, version=0.4, **more):
    """A saved workflow; version 1 saves the links as objects."""
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    saved = [dict(zip(keys, link)) for link in links] if version == 1 else [list(link) for link in links]
    return {"version": version, "nodes": nodes, "links": saved, **more}


def convert(data):
    return to_prompt(read_workflow(json.dumps(data).encode()), INFO)


def problems(data):
    with pytest.raises(WorkflowError) as caught:
        convert(data)
    return caught.value.problems


LOAD = node(1, "Load", ["a"], outputs=["MODEL", "CLIP"])
BLANK = node(2, "Blank", [64, 4], outputs=["LATENT"])
SAMPLE = node(3, "Sample", [7, "randomize", 30, "fixed", 0.5],
              [("model", "MODEL", 1), ("latent", "LATENT", 2)], ["LATENT"], title="My sampler")
SAVE = node(4, "Save", ["cat"], [("latent", "LATENT", 3)])
LINKS = [(1, 1, 0, 3, 0, "MODEL"), (2, 2, 0, 3, 1, "LATENT"), (3, 3, 0, 4, 0, "LATENT")]
SAMPLED = {"model": ["1", 0], "seed": 7, "steps": 30, "latent": ["2", 0], "mode": "fixed", "strength": 0.5}
PROMPT = {
    "1": {"class_type": "Load", "inputs": {"name": "a"}, "_meta": {"title": "Load"}},
    "2": {"class_type": "Blank", "inputs": {"width": 64, "size": 4}, "_meta": {"title": "Blank"}},
    "3": {"class_type": "Sample", "inputs": SAMPLED, "_meta": {"title": "My sampler"}},
    "4": {"class_type": "Save", "inputs": {"latent": ["3", 0], "label": "cat"}, "_meta": {"title": "Save"}},
}


def workflow(*replaced, links=LINKS, version=0.4, **more):
    """The plain workflow, with nodes of the same id replaced and others added."""
    nodes = {n["id"]: n for n in (LOAD, BLANK, SAMPLE, SAVE, *replaced)}
    return graph(list(nodes.values()), links, version, **more)


# -- links and formats ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", [0.4, 1])
def test_both_versions_of_the_saved_graph(version):
    assert convert(workflow(version=version)) == PROMPT


def test_an_untitled_node_takes_its_display_name():
    untitled = {k: v for k, v in SAMPLE.items() if k != "title"}
    assert convert(workflow(untitled))["3"]["_meta"] == {"title": "The Sampler"}


def test_the_api_format_passes_and_gains_titles():
    bare = {k: {"class_type": v["class_type"], "inputs": v["inputs"]} for k, v in PROMPT.items()}
    bare["3"]["_meta"] = {"title": "My sampler"}
    assert convert(bare) == PROMPT


def test_notes_and_groups_are_ignored():
    data = workflow(node(8, "Note", ["hello"]), node(9, "MarkdownNote", ["# hi"]), groups=[{"title": "g"}])
    assert convert(data) == PROMPT


@pytest.mark.parametrize("bad, expected", [
    ((9, 77, 0, 3, 0, "MODEL"), "link 9 (node 77 to node 3): comes from a node that is not there"),
    ((9, 1, 0, 77, 0, "MODEL"), "link 9 (node 1 to node 77): leads to a node that is not there"),
    ((9, 1, 0, 4, 0, "MODEL"), "link 9 (node 1 to node 4): leads to an input that does not name it"),
    ((9, "x"), ("found [9, 'x'] among the links, accepted: "
                "[id, from node, from slot, to node, to slot, type], or an object with the same")),
])
def test_a_link_that_leads_nowhere(bad, expected):
    assert expected in problems(graph([LOAD, BLANK, SAMPLE, SAVE], [*LINKS, bad]))


def test_an_input_whose_link_is_not_there():
    assert problems(workflow(links=LINKS[1:])) == [
        'node 3 "My sampler": input "model": found link 1, which the workflow does not have']


def test_a_link_to_an_input_that_the_class_lacks():
    save = node(4, "Save", ["cat"], [("latents", "LATENT", 3)])
    assert problems(workflow(save)) == ['node 4 "Save": found a link to input "latents", which the node does not have']


def test_all_problems_at_once():
    data = workflow(node(5, "Blanc"), node(2, "Blank", [1, 2, 3], outputs=["LATENT"]))
    assert problems(data) == [
        'node 2 "Blank": found 3 widget values, accepted: 2; left over: [3]',
        'node 5 "Blanc": unknown node type \'Blanc\' (did you mean \'Blank\'?)',
    ]


def test_two_nodes_of_one_id():
    data = workflow()
    data["nodes"] += [LOAD]
    assert problems(data) == ['node 1 "Load": two nodes have this id']


@pytest.mark.parametrize("broken, line", [
    ({"nodes": [{"id": 6}]}, "found {'id': 6} among the nodes, accepted: an object with 'id' and 'type'"),
    ({"nodes": [3]}, "found 3 among the nodes, accepted: an object with 'id' and 'type'"),
    ({"links": 3}, "the workflow: links: found 3, accepted: a list"),
    ({"nodes": [{**LOAD, "widgets_values": 3}]}, 'node 1 "Load": widgets_values: found 3, accepted: a list or an object'),
    ({"nodes": [{**LOAD, "inputs": [3]}]}, 'node 1 "Load": found 3 among the inputs, accepted: an object with \'name\''),
    ({"nodes": [{**LOAD, "inputs": [{"link": []}]}]}, 'node 1 "Load": link: found [], accepted: a number or text'),
    ({"definitions": {"subgraphs": [3]}}, "found 3 among the subgraphs, accepted: an object with 'id'"),
])
def test_a_part_of_another_shape(broken, line):
    assert problems({**workflow(), **broken}) == [line]


# -- widgets ----------------------------------------------------------------------------------------------------------
def sampled(values, **more):
    return convert(workflow({**SAMPLE, "widgets_values": values, **more}))["3"]["inputs"]


def test_the_control_beside_a_seed_is_no_input():
    assert sampled([7, "increment", 30, "fixed", 0.5]) == SAMPLED


def test_without_the_control_the_next_combo_keeps_its_value():
    info = object_info({**REGISTRY, "S": node_class({"seed": ("INT", {}), "mode": (["fixed", "free"],)})})
    for values in ([7, "fixed"], [7, "randomize", "fixed"]):
        saved = read_workflow(json.dumps(graph([node(1, "S", values)], [])).encode())
        assert to_prompt(saved, info)["1"]["inputs"] == {"seed": 7, "mode": "fixed"}


def test_a_seed_may_refuse_its_control():
    info = object_info({"S": node_class({"seed": ("INT", {"control_after_generate": False}), "text": ("STRING", {})})})
    saved = read_workflow(json.dumps(graph([node(1, "S", [7, "fixed"])], [])).encode())
    assert to_prompt(saved, info)["1"]["inputs"] == {"seed": 7, "text": "fixed"}


def test_values_by_name():
    named = {"seed": 7, "control_after_generate": "fixed", "steps": 30, "mode": "fixed", "strength": 0.5}
    assert sampled(named) == SAMPLED


def test_a_name_that_is_no_widget():
    data = workflow({**SAMPLE, "widgets_values": {"seed": 7, "stepz": 30}})
    assert problems(data) == [('node 3 "My sampler": found a value for widget "stepz", which the node does not have '
                               "(did you mean 'steps'?)")]


def test_missing_trailing_values_take_the_declared_default():
    assert sampled([7, "fixed", 30]) == {**SAMPLED, "mode": "free", "strength": 1.0}


def test_a_missing_value_without_a_default():
    assert problems(workflow(node(1, "Load", [], outputs=["MODEL", "CLIP"]))) == [
        ('node 1 "Load": input "name": found no saved value, accepted: a value (the class declares no default; '
         "save the workflow again in the editor)")]


def test_an_optional_widget_without_value_or_default_is_left_out():
    text = node(5, "Numbers", ["t", "p", "fixed", ""], [("values", "STRING", None)], ["STRING"])
    assert convert(workflow(text))["5"]["inputs"] == {"text": "t", "pick": "p"}


def test_a_combo_may_have_a_control_and_a_filter():
    text = node(5, "Numbers", ["t", "p", "increment-wrap", "", "more"], outputs=["STRING"])
    assert convert(workflow(text))["5"]["inputs"] == {"text": "t", "pick": "p", "extra": "more"}


@pytest.mark.parametrize("values", [["x.png", "image", "hello"], ["x.png", "hello"]])
def test_the_upload_button_is_no_input(values):
    assert convert(workflow(node(5, "Picture", values)))["5"]["inputs"] == {"image": "x.png", "note": "hello"}


def test_an_upload_value_at_the_end():
    assert convert(workflow(node(5, "Picture", ["x.png", "image"])))["5"]["inputs"]["image"] == "x.png"


def test_a_link_wins_over_the_value_of_a_widget():
    save = node(4, "Save", ["cat"], [("latent", "LATENT", 3), ("label", "STRING", 9, "label")])
    text = node(5, "Numbers", ["t", "p", "fixed", ""], [("values", "STRING", None)], ["STRING"])
    data = workflow(save, text, links=[*LINKS, (9, 5, 0, 4, 1, "STRING")])
    assert convert(data)["4"]["inputs"] == {"latent": ["3", 0], "label": ["5", 0]}


def test_a_converted_widget_keeps_its_place_among_the_values():
    inputs = [("model", "MODEL", 1), ("latent", "LATENT", 2), ("seed", "INT", 9, "seed"), ("steps", "INT", None, "steps")]
    sample = node(3, "Sample", [7, "fixed", 30, "fixed", 0.5], inputs, ["LATENT"])
    data = workflow(sample, node(5, "Blank", [1, 1], outputs=["INT"]), links=[*LINKS, (9, 5, 0, 3, 2, "INT")])
    assert convert(data)["3"]["inputs"] == {**SAMPLED, "seed": ["5", 0]}


def test_a_list_in_a_widget_is_told_from_a_link():
    assert sampled([7, "fixed", ["1", 0], "fixed", 0.5])["steps"] == {"__value__": ["1", 0]}


# -- nodes of the editor alone ----------------------------------------------------------------------------------------
def through(*middle, last, first=(1, 0)):
    """The plain workflow with the model passing through other nodes before it reaches the sampler."""
    return workflow(*middle, links=[(1, *last, 3, 0, "MODEL"), (11, *first, 10, 0, "*"), *LINKS[1:]])


def test_a_reroute_passes_its_link_on_also_in_a_chain():
    one = node(10, "Reroute", inputs=[("", "*", 11)], outputs=["MODEL"])
    two = node(12, "Reroute", inputs=[("", "*", 13)], outputs=["MODEL"])
    assert convert(through(one, last=(10, 0))) == PROMPT
    data = through(one, two, last=(12, 0))
    data["links"].append([13, 10, 0, 12, 0, "*"])
    assert convert(data) == PROMPT


def test_a_reroute_that_nothing_feeds():
    data = workflow(node(10, "Reroute", inputs=[("", "*", None)]), links=[(1, 10, 0, 3, 0, "MODEL"), *LINKS[1:]])
    assert "model" not in convert(data)["3"]["inputs"]


def test_reroutes_in_a_circle():
    one = node(10, "Reroute", inputs=[("", "*", 11)])
    two = node(12, "Reroute", inputs=[("", "*", 13)])
    data = workflow(one, two, links=[(1, 10, 0, 3, 0, "M"), (11, 12, 0, 10, 0, "*"), (13, 10, 0, 12, 0, "*"), *LINKS[1:]])
    assert problems(data) == ['node 10 "Reroute": links that pass through it run in a circle']


def primitive(values):
    inputs = [("model", "MODEL", 1), ("latent", "LATENT", 2), ("steps", "INT", 9, "steps")]
    sample = node(3, "Sample", [7, "fixed", 30, "fixed", 0.5], inputs, ["LATENT"], title="My sampler")
    return workflow(sample, node(5, "PrimitiveNode", values, outputs=["INT"]), links=[*LINKS, (9, 5, 0, 3, 2, "INT")])


def test_a_primitive_sets_the_widget_that_it_feeds():
    assert convert(primitive([99, "fixed"]))["3"]["inputs"] == {**SAMPLED, "steps": 99}


def test_a_primitive_without_a_value():
    assert problems(primitive([])) == [
        'node 5 "PrimitiveNode": found no value in it, accepted: the value for the widget that it feeds']


# -- muted and bypassed -----------------------------------------------------------------------------------------------
def test_a_muted_node_goes_with_its_links():
    prompt = convert(workflow({**LOAD, "mode": 2}))
    assert "1" not in prompt and "model" not in prompt["3"]["inputs"]


def test_a_muted_node_takes_the_widget_that_it_fed_with_it():
    save = node(4, "Save", ["cat"], [("latent", "LATENT", 3), ("label", "STRING", 9, "label")])
    data = workflow(save, node(5, "Numbers", ["t", "p"], outputs=["STRING"], mode=2), links=[*LINKS, (9, 5, 0, 4, 1, "STRING")])
    assert convert(data)["4"]["inputs"] == {"latent": ["3", 0]}


def test_a_muted_or_bypassed_node_may_be_unknown():
    assert convert(workflow(node(5, "Elsewhere", mode=2), node(6, "Elsewhere", mode=4))) == PROMPT


def test_nothing_left_active():
    assert problems(graph([{**LOAD, "mode": 2}], [])) == ["workflow: the workflow is empty (no node of it is active)"]


def patched(mode, inputs, slot=0):
    patch = node(10, "Patch", [1.0], inputs, ["MODEL", "CLIP"], mode=mode)
    links = [(1, 10, slot, 3, 0, "MODEL"), (11, 1, 0, 10, 1, "MODEL"), (12, 1, 1, 10, 0, "CLIP"), *LINKS[1:]]
    return workflow(patch, links=links)


def test_a_bypassed_node_passes_on_the_input_of_the_wanted_type():
    both = [("clip", "CLIP", 12), ("model", "MODEL", 11)]
    assert convert(patched(0, both))["3"]["inputs"]["model"] == ["10", 0]
    assert convert(patched(4, both))["3"]["inputs"]["model"] == ["1", 0]


def test_a_bypassed_node_prefers_the_input_beside_the_output():
    two = node(5, "Load", ["b"], outputs=["MODEL", "CLIP"])
    patch = node(10, "Merge", [], [("model1", "MODEL", 11), ("model2", "MODEL", 12)], ["MODEL", "MODEL"], mode=4)
    links = [(1, 10, 1, 3, 0, "MODEL"), (11, 1, 0, 10, 0, "MODEL"), (12, 5, 0, 10, 1, "MODEL"), *LINKS[1:]]
    assert convert(workflow(two, patch, links=links))["3"]["inputs"]["model"] == ["5", 0]


def test_a_bypassed_node_without_a_fitting_input_gives_nothing():
    patch = node(10, "Patch", [1.0], [("clip", "CLIP", 12)], ["MODEL", "CLIP"], mode=4)
    data = workflow(patch, links=[(1, 10, 0, 3, 0, "MODEL"), (12, 1, 1, 10, 0, "CLIP"), *LINKS[1:]])
    assert "model" not in convert(data)["3"]["inputs"]


def test_a_chain_of_bypassed_nodes():
    one = node(10, "Patch", [1.0], [("clip", "CLIP", None), ("model", "MODEL", 11)], ["MODEL", "CLIP"], mode=4)
    two = node(12, "Patch", [1.0], [("clip", "CLIP", None), ("model", "MODEL", 13)], ["MODEL", "CLIP"], mode=4)
    data = through(one, two, last=(12, 0))
    data["links"].append([13, 10, 0, 12, 1, "MODEL"])
    assert convert(data) == PROMPT
