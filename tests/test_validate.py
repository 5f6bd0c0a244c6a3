"""Validation: each kind of mistake gives its exact line, and a correct prompt gives none."""

import copy

import pytest

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.workflow.schema import object_info
from comfy_dancegrpo.workflow.validate import validate


def node_class(required=None, optional=None, returns=(), hidden=None, **more):
    types = {"required": required or {}, "optional": optional or {}, "hidden": hidden or {}}
    return type("Dummy", (), {"INPUT_TYPES": classmethod(lambda cls: types), "RETURN_TYPES": returns, **more})


REGISTRY = {
    "Load": node_class({"policy": (["embedded", "other"],)}, returns=("POLICY", "INT")),
    "Train": node_class(
        {"policy": ("POLICY", {"rawLink": True, "lazy": True}), "steps": ("INT", {"default": 4, "min": 1, "max": 100}),
         "rate": ("FLOAT", {"default": 1e-4, "min": 0.0}), "on": ("BOOLEAN", {"default": True}), "text": ("STRING", {})},
        {"any": ("*",), "either": ("IMAGE,POLICY",), "pick": ("COMBO", {"options": [1, 2]}), "cap": ("INT", {"max": 9}),
         "forced": ("FLOAT", {"forceInput": True}), "odd": ("ODD_WIDGET",), "number": ("INT,FLOAT",)},
        ("POLICY", "IMAGE")),
    "Save": node_class({"policy": ("POLICY",)}, OUTPUT_NODE=True),
    "Loose": node_class(returns=("IMAGE,LATENT",)),
}
GOOD = {
    "1": {"class_type": "Load", "inputs": {"policy": "embedded"}, "_meta": {"title": "Load Policy"}},
    "2": {"class_type": "Train", "inputs": {"policy": ["1", 0], "steps": 4, "rate": 0.5, "on": True, "text": "x"}},
    "3": {"class_type": "Save", "inputs": {"policy": ["2", 0]}, "_meta": {"title": "Save"}},
}


def prompt(**changes):
    """The good prompt with inputs of node 2 changed; None takes one away."""
    changed = copy.deepcopy(GOOD)
    for name, value in changes.items():
        changed["2"]["inputs"][name] = value
        if value is None:
            del changed["2"]["inputs"][name]
    return changed


def problems(bad, registry=REGISTRY, **how):
    with pytest.raises(WorkflowError) as caught:
        validate(bad, registry, **how)
    return caught.value.problems


def test_a_good_prompt():
    good = prompt()
    assert validate(good, REGISTRY) is None
    assert good == GOOD


TRAIN = 'node 2 "Train": '


@pytest.mark.parametrize("changes, line", [
    ({"steps": None}, 'input "steps": missing, accepted: a whole number from 1 to 100'),
    ({"policy": None}, 'input "policy": missing, accepted: a link of type POLICY'),
    ({"stepps": 3}, "unknown input \"stepps\" (did you mean 'steps'?)"),
    ({"steps": 0}, 'input "steps": found 0, accepted: a whole number from 1 to 100'),
    ({"steps": 101}, 'input "steps": found 101, accepted: a whole number from 1 to 100'),
    ({"steps": True}, 'input "steps": found True, accepted: a whole number from 1 to 100'),
    ({"steps": "4"}, 'input "steps": found \'4\', accepted: a whole number from 1 to 100'),
    ({"steps": 4.0}, 'input "steps": found 4.0, accepted: a whole number from 1 to 100'),
    ({"cap": 10}, 'input "cap": found 10, accepted: a whole number up to 9'),
    ({"rate": -1}, 'input "rate": found -1, accepted: a number of at least 0.0'),
    ({"rate": "fast"}, 'input "rate": found \'fast\', accepted: a number of at least 0.0'),
    ({"rate": float("nan")}, 'input "rate": found nan, accepted: a number of at least 0.0'),
    ({"rate": float("inf")}, 'input "rate": found inf, accepted: a number of at least 0.0'),
    ({"rate": 10 ** 400}, f'input "rate": found 1{"0" * 58}…, accepted: a number of at least 0.0'),
    ({"on": 1}, 'input "on": found 1, accepted: true or false'),
    ({"text": 5}, 'input "text": found 5, accepted: text'),
    ({"text": {"__value__": ["a"]}}, "input \"text\": found ['a'], accepted: text"),
    ({"pick": 3}, 'input "pick": found 3, accepted: one of 1, 2'),
    ({"pick": True}, 'input "pick": found True, accepted: one of 1, 2'),
    ({"policy": "embedded"}, 'input "policy": found \'embedded\', accepted: a link of type POLICY'),
    ({"number": "5"}, 'input "number": found \'5\', accepted: a link of type INT,FLOAT'),
    ({"policy": ["9", 0]}, 'input "policy": found a link to node 9, which is not there, accepted: a link of type POLICY'),
    ({"policy": ["1", 2]}, 'input "policy": found a link to output 2 of node 1 "Load Policy", accepted: outputs 0 to 1'),
    ({"policy": ["3", 0]}, 'input "policy": found a link to output 0 of node 3 "Save", accepted: nothing of it'),
    ({"policy": ["1", 1]}, 'input "policy": found INT from node 1 "Load Policy", accepted: POLICY'),
    ({"rate": ["1", 1]}, 'input "rate": found INT from node 1 "Load Policy", accepted: FLOAT'),
    ({"pick": ["1", 1]}, 'input "pick": found INT from node 1 "Load Policy", accepted: COMBO'),
    ({"policy": [1, 0]}, 'input "policy": found [1, 0], accepted: [node id as text, output number]'),
    ({"policy": ["1"]}, "input \"policy\": found ['1'], accepted: [node id as text, output number]"),
])
def test_one_mistake_one_line(changes, line):
    # a link back from node 3, which node 2 feeds, is a cycle as well
    assert [p for p in problems(prompt(**changes)) if not p.startswith("a cycle")] == [TRAIN + line]


@pytest.mark.parametrize("changes", [
    {"any": ["1", 1]}, {"any": 5}, {"either": ["1", 0]}, {"pick": 2}, {"steps": ["1", 1]}, {"forced": 1.5}, {"number": 5},
    {"odd": {"of": "a pack's own widget"}},
])
def test_what_is_accepted(changes):
    validate(prompt(**changes), REGISTRY)


def test_unions_need_one_type_in_common():
    bad = prompt(either=["4", 0])
    bad["4"] = {"class_type": "Loose", "inputs": {}}
    validate(bad, REGISTRY)
    bad["2"]["inputs"]["policy"] = ["4", 0]
    assert problems(bad) == [TRAIN + 'input "policy": found IMAGE,LATENT from node 4 "Loose", accepted: POLICY']


def test_a_wildcard_class_of_a_custom_node():
    class Any(str):
        def __ne__(self, other):
            return False

    registry = {**REGISTRY, "Any": node_class({"x": (Any("ANYTHING"),)}, OUTPUT_NODE=True)}
    validate({**prompt(), "4": {"class_type": "Any", "inputs": {"x": ["1", 0]}}}, registry)


def test_an_unknown_node_names_its_neighbours_and_hides_no_other_problem():
    bad = prompt(steps=0)
    bad["1"]["class_type"] = "load"
    assert problems(bad) == ['node 1 "Load Policy": unknown node type \'load\' (did you mean \'Load\'?)',
                             TRAIN + 'input "steps": found 0, accepted: a whole number from 1 to 100']


def test_a_choice_that_is_not_in_the_list():
    bad = prompt()
    bad["1"]["inputs"]["policy"] = "foo"
    assert problems(bad) == ['node 1 "Load Policy": input "policy": found \'foo\', accepted: one of \'embedded\', \'other\'']


def test_a_long_list_is_shortened_with_the_likely_first():
    registry = {"L": node_class({"f": ([f"file{i:03}" for i in range(500)],)}, OUTPUT_NODE=True)}
    line = problems({"1": {"class_type": "L", "inputs": {"f": "file49O"}}}, registry)[0]
    choices, rest = line.split("accepted: one of ")[1].split(" and ")
    assert rest == "492 more" and len(choices.split(", ")) == 8
    assert all("49" in choice for choice in choices.split(", "))


def test_an_empty_list_says_so():
    registry = {"L": node_class({"f": ([],)}, OUTPUT_NODE=True)}
    assert problems({"1": {"class_type": "L", "inputs": {"f": "x"}}}, registry) == [
        'node 1 "L": input "f": found \'x\', accepted: nothing (the list is empty)']


def test_a_cycle_names_its_nodes_in_order():
    ring = {i: {"class_type": "Train", "inputs": {**GOOD["2"]["inputs"], "policy": [source, 0]}, "_meta": {"title": f"T{i}"}}
            for i, source in (("5", "7"), ("6", "5"), ("7", "6"))}
    assert problems({**prompt(), **ring}) == ['a cycle: node 5 "T5" -> node 6 "T6" -> node 7 "T7" -> node 5 "T5"']


def test_a_node_that_feeds_itself():
    assert problems(prompt(policy=["2", 0])) == ['a cycle: node 2 "Train" -> node 2 "Train"']


def test_a_diamond_is_no_cycle():
    validate(prompt(any=["1", 0], either=["1", 0]), REGISTRY)


def test_a_long_chain_does_not_exhaust_the_stack():
    chain = prompt()
    for i in range(10, 5000):
        chain[str(i)] = {"class_type": "Train", "inputs": {**GOOD["2"]["inputs"], "policy": [str(i + 1), 0]}}
    chain["5000"] = copy.deepcopy(GOOD["2"])
    validate(chain, REGISTRY)


def test_no_output_node():
    bad = prompt()
    del bad["3"]
    assert problems(bad) == ["no output node, so nothing would run; accepted: one of 'Save'"]


def test_an_empty_prompt():
    assert problems({}) == ["the workflow is empty (it has no nodes)"]


@pytest.mark.parametrize("entry", [5, {"inputs": {}}, {"class_type": "Load"}, {"class_type": "Load", "inputs": []}])
def test_an_entry_that_is_no_node(entry):
    lines = problems({**prompt(), "9": entry})
    assert len(lines) == 1 and lines[0].endswith("accepted: an object with 'class_type' and 'inputs'")
    assert lines[0].startswith("node 9 ")


def test_values_are_brought_to_their_type_in_place():
    good = prompt(rate=1, any={"__value__": [1, 2, 3]})
    validate(good, REGISTRY)
    assert type(good["2"]["inputs"]["rate"]) is float and good["2"]["inputs"]["any"] == [1, 2, 3]
    assert type(good["2"]["inputs"]["steps"]) is int


def test_a_refused_prompt_is_left_as_it_was():
    bad = prompt(rate=1, steps=0)
    before = copy.deepcopy(bad)
    problems(bad)
    assert bad == before and type(bad["2"]["inputs"]["rate"]) is int


# -- VALIDATE_INPUTS --------------------------------------------------------------------------------------------------
def own_check(check, **more):
    registry = {**REGISTRY, "Own": node_class({"file": (["a.png"],), "policy": ("POLICY",)}, {"size": ("INT", {"max": 9})},
                                              hidden={"me": "UNIQUE_ID"}, VALIDATE_INPUTS=classmethod(check), **more)}
    return registry


def own_prompt(**inputs):
    return {**prompt(), "5": {"class_type": "Own", "inputs": {"file": "a.png", "policy": ["1", 0], **inputs},
                              "_meta": {"title": "My own"}}}


def test_the_string_that_it_returns_is_the_line():
    registry = own_check(lambda cls, file: f"no such file '{file}'; searched: input/")
    assert problems(own_prompt(file="b.png"), registry) == ["node 5 \"My own\": no such file 'b.png'; searched: input/"]


def test_check_files_off_leaves_it_out():
    validate(own_prompt(), own_check(lambda cls, file: "missing"), check_files=False)


def test_a_named_input_is_not_checked_again():
    validate(own_prompt(file="b.png", size=99), own_check(lambda cls, file, size: True))
    assert len(problems(own_prompt(file="b.png", size=99), own_check(lambda cls, size: True))) == 1
    validate(own_prompt(file="b.png", size=99), own_check(lambda cls, **inputs: True))


def test_it_gets_constants_and_none_for_links():
    seen = {}

    def check(cls, **inputs):
        seen.update(inputs)
        return True

    validate(own_prompt(size=3), own_check(check))
    assert seen == {"file": "a.png", "policy": None, "size": 3, "me": "5"}


def test_it_may_compare_types_itself():
    seen = {}

    def check(cls, input_types):
        seen.update(input_types)
        return True if input_types["policy"] == "INT" else "wants INT"

    validate(own_prompt(policy=["1", 1]), own_check(check))
    assert seen == {"policy": "INT"}
    assert problems(own_prompt(), own_check(check)) == ['node 5 "My own": wants INT']


def test_a_class_that_takes_lists_is_checked_with_lists():
    registry = own_check(lambda cls, file: file == ["a.png"], INPUT_IS_LIST=True)
    validate(own_prompt(), registry)


def test_a_check_that_fails_is_a_problem_of_its_node():
    def check(cls, file):
        raise KeyError("oops")

    assert problems(own_prompt(), own_check(check)) == ["node 5 \"My own\": its own check failed: KeyError: 'oops'"]


def test_a_check_that_refuses_without_a_word():
    assert problems(own_prompt(), own_check(lambda cls, file: False)) == ['node 5 "My own": refused by its own check']


def test_optional_inputs_that_have_every_name():
    class Every(dict):
        def __contains__(self, name):
            return True

        def __getitem__(self, name):
            return ("*",)

    registry = {**REGISTRY, "Every": node_class(optional=Every(), OUTPUT_NODE=True)}
    registry["Every"].INPUT_TYPES = classmethod(lambda cls: {"required": {}, "optional": Every()})
    validate({**prompt(), "4": {"class_type": "Every", "inputs": {"lora_1": {"on": True}, "x": ["1", 0]}}}, registry)


# -- the table of the classes -----------------------------------------------------------------------------------------
def test_object_info_of_a_class():
    full = node_class({"a": ("INT", {"default": 1})}, {"b": ("IMAGE",)}, ("X", "Y"), RETURN_NAMES=("x", "y"), CATEGORY="c",
                      OUTPUT_IS_LIST=(True, False), DESCRIPTION="d", OUTPUT_TOOLTIPS=("t", "u"), OUTPUT_NODE=True,
                      SEARCH_ALIASES=["z"], DEPRECATED=True)
    info = object_info({"Full": full}, {"Full": "A full one"})["Full"]
    assert info["input"]["required"] == {"a": ("INT", {"default": 1})}
    assert info["input_order"]["required"] == ["a"] and info["input_order"]["optional"] == ["b"]
    expected = {"output": ["X", "Y"], "output_name": ["x", "y"], "output_is_list": [True, False], "name": "Full",
                "display_name": "A full one", "category": "c", "description": "d", "output_tooltips": ["t", "u"],
                "output_node": True, "search_aliases": ["z"], "deprecated": True}
    assert {key: info[key] for key in expected} == expected


def test_object_info_of_a_bare_class():
    info = object_info({"Load": REGISTRY["Load"]})["Load"]
    assert (info["display_name"], info["output_name"], info["output_is_list"]) == ("Load", ["POLICY", "INT"], [False, False])
    assert info["output_node"] is False and "output_tooltips" not in info and "deprecated" not in info
