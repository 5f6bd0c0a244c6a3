"""Apply Policy LoRA, of a LoRA and of all weights, on a real MODEL of ComfyUI: its own Flux, with the embedded policy's weights, against diffusers and our adapter."""

import pytest


@pytest.fixture(params=["TestRandomLora", "TestRandomWeights"])
def flux(request):
    """Load Policy, its transformer as a MODEL, a LORA for it, and Apply Policy LoRA; compared by output nodes 8 (patched) and 9 (as it was)."""
    return {
        "1": {"class_type": "DanceGRPOLoadPolicy", "inputs": {"policy": "embedded", "dtype": "float32"}},
        "2": {"class_type": "TestFluxModel", "inputs": {"policy": ["1", 0]}},
        "3": {"class_type": request.param, "inputs": {"policy": ["1", 0], "of": "this policy"}},
        "4": {"class_type": "DanceGRPOApplyPolicyLora", "inputs": {"model": ["2", 0], "lora": ["3", 0], "strength": 1.0}},
        "8": {"class_type": "TestCompare", "inputs": {"policy": ["1", 0], "model": ["4", 0], "lora": ["3", 0]}},
        "9": {"class_type": "TestCompare", "inputs": {"policy": ["1", 0], "model": ["2", 0]}},
    }


def compared(messages) -> dict[str, dict]:
    """What the output nodes found, by their ids."""
    assert messages[-1]["type"] == "execution_success", messages[-1]["data"].get("exception_message")
    return {m["data"]["node"]: m["data"]["output"] for m in messages if m["type"] == "executed"}


def furthest(one, other) -> float:
    return max(abs(a - b) for a, b in zip(one["drawn"], other["drawn"], strict=True))


@pytest.mark.parametrize("first", ["8", "9"])
def test_the_patched_model_draws_as_the_policy_with_its_lora(comfyui, flux, first):
    """In both orders: unpatched and patched share their weights, and ComfyUI changes them from the one to the other."""
    others = {"8": "9", "9": "8"}
    flux[others[first]]["inputs"]["after"] = [first, 0]
    found = compared(comfyui.run(flux))
    assert found["8"]["difference"][0] < 1e-5 and found["9"]["difference"][0] < 1e-5
    assert furthest(found["8"], found["9"]) > 0.1  # the LoRA is no small one
    print(found["8"]["difference"], found["9"]["difference"], furthest(found["8"], found["9"]))
    assert "ERROR lora" not in comfyui.said  # what ComfyUI says of a patch that it leaves out


def test_strength_zero_is_the_base_and_half_is_between(comfyui, flux):
    for node, strength in (("5", 0.0), ("6", 0.5)):
        flux[node] = {"class_type": "DanceGRPOApplyPolicyLora", "inputs": {**flux["4"]["inputs"], "strength": strength}}
        flux[f"1{node}"] = {"class_type": "TestCompare", "inputs": {"policy": ["1", 0], "model": [node, 0]}}
    found = compared(comfyui.run(flux))
    assert found["15"]["drawn"] == found["9"]["drawn"]
    assert 0.05 < furthest(found["16"], found["9"]) < furthest(found["8"], found["9"])


@pytest.mark.parametrize("of, said", [("another family", "find no place"), ("another size", "of another size")])
def test_a_lora_that_does_not_fit_is_one_line(comfyui, flux, of, said):
    flux["3"]["inputs"]["of"] = of
    last = comfyui.run(flux)[-1]
    assert last["type"] == "execution_error" and last["data"]["node_id"] == "4"
    line, = last["data"]["exception_message"].strip().splitlines()
    if flux["3"]["class_type"] == "TestRandomWeights":
        said = said.replace("find no place", "names differ")
    assert "not fit this model" in line and said in line
