"""`--set "Node.input=value"`: which node it means, what the text becomes, and each way to be wrong."""

import copy

import pytest

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.workflow.overrides import apply_overrides


class Train:
    RETURN_TYPES = ("POLICY",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"policy": ("POLICY",), "steps": ("INT", {}), "rate": ("FLOAT", {}), "on": ("BOOLEAN", {}),
                             "pick": (["a", 2],), "text": ("STRING", {})}}


INPUTS = {"policy": ["7", 0], "steps": 1, "rate": 0.5, "on": True, "pick": "a", "text": ""}
PROMPT = {
    "5": {"class_type": "Train", "inputs": {**INPUTS}, "_meta": {"title": "Update v1.5"}},
    "6": {"class_type": "Train", "inputs": {**INPUTS}, "_meta": {"title": "Twin"}},
    "7": {"class_type": "Train", "inputs": {**INPUTS, "steps": ["6", 0]}, "_meta": {"title": "Twin"}},
    "8": {"class_type": "Gone", "inputs": {}},
}
REGISTRY = {"Train": Train}


def problems(*overrides, prompt=PROMPT):
    with pytest.raises(WorkflowError) as caught:
        apply_overrides(prompt, REGISTRY, list(overrides))
    return caught.value.problems


@pytest.mark.parametrize("override, name, value", [
    ("5.steps=12", "steps", 12),
    ("Update v1.5.steps=12", "steps", 12),
    ("Update v1.5 . steps = 12", "steps", 12),
    ("5.rate=1e-4", "rate", 1e-4),
    ("5.rate=2", "rate", 2.0),
    ("5.on=False", "on", False),
    ("5.on=true", "on", True),
    ("5.pick=2", "pick", 2),
    ("5.pick=elsewhere", "pick", "elsewhere"),
    ("5.text=a = b.c", "text", "a = b.c"),
    ("5.text=", "text", ""),
])
def test_a_value_of_the_widgets_type(override, name, value):
    before = copy.deepcopy(PROMPT)
    changed = apply_overrides(PROMPT, REGISTRY, [override])["5"]["inputs"]
    assert changed == {**INPUTS, name: value} and type(changed[name]) is type(value)
    assert PROMPT == before


def test_the_last_of_two_wins():
    assert apply_overrides(PROMPT, REGISTRY, ["5.steps=1", "5.steps=2"])["5"]["inputs"]["steps"] == 2


def test_an_id_comes_before_a_title():
    prompt = {**PROMPT, "9": {"class_type": "Train", "inputs": {**INPUTS}, "_meta": {"title": "5"}}}
    changed = apply_overrides(prompt, REGISTRY, ["5.steps=3"])
    assert (changed["5"]["inputs"]["steps"], changed["9"]["inputs"]["steps"]) == (3, 1)


LABEL = '--set: node 5 "Update v1.5": '


@pytest.mark.parametrize("override, line", [
    ("steps=3", "--set: found 'steps=3', accepted: 'node title or id.input=value'"),
    ("5.steps", "--set: found '5.steps', accepted: 'node title or id.input=value'"),
    (".steps=3", "--set: found '.steps=3', accepted: 'node title or id.input=value'"),
    ("Updte v1.5.steps=3", "--set: no node has the id or title \"Updte v1.5\" (did you mean 'Update v1.5'?)"),
    ("Twin.steps=3", '--set: "Twin" is the title of nodes 6, 7, accepted: one of these ids'),
    ("5.step=3", LABEL + "unknown input \"step\" (did you mean 'steps'?)"),
    ("7.steps=3", '--set: node 7 "Twin": input "steps" comes over a link from node 6 "Twin"; set the value there'),
    ("5.steps=3.5", LABEL + "input \"steps\": found '3.5', accepted: a whole number"),
    ("5.rate=fast", LABEL + "input \"rate\": found 'fast', accepted: a number"),
    ("5.on=1", LABEL + "input \"on\": found '1', accepted: true or false"),
    ("8.steps=3", "node 8 \"Gone\": unknown node type 'Gone'"),
])
def test_one_line_for_each_mistake(override, line):
    assert problems(override) == [line]


def test_a_socket_takes_no_text():
    prompt = {"5": {"class_type": "Train", "inputs": {}}}
    assert problems("5.policy=x", prompt=prompt) == [
        '--set: node 5 "Train": input "policy": found \'x\', accepted: a link of type POLICY only']


def test_all_mistakes_at_once():
    assert len(problems("5.steps=x", "nope.steps=3", "5.rate=1")) == 2


def test_an_entry_that_is_no_node():
    lines = problems("1.a=2", prompt={"1": {"class_type": "Train"}})
    assert len(lines) == 1 and lines[0].endswith("accepted: an object with 'class_type' and 'inputs'")
