"""Another pack, as third parties write them: V1 and V3, lists, async, and one that empties the GPU. And counts of what ours does."""

import asyncio
import json
import os

import comfy.model_management
import torch
from comfy_api.latest import io

from . import flux

COUNTS = os.environ["DANCEGRPO_TEST_COUNTS"]


def count(what):
    counts = json.loads(open(COUNTS).read()) if os.path.exists(COUNTS) else {}
    counts[what] = counts.get(what, 0) + 1
    with open(COUNTS, "w") as file:
        file.write(json.dumps(counts))


class Redness:
    """V1, a list out: how red each picture is."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_IS_LIST = ("FLOAT",), "measure", "test", (True,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",)}}

    def measure(self, images):
        count("redness under inference mode" if torch.is_inference_mode_enabled() else "redness outside inference mode")
        return ([float(i[..., 0].mean() - i[..., 1:].mean()) for i in images],)


class Sum:
    """V1, lists in: takes all numbers at once, and gives them back."""

    RETURN_TYPES, FUNCTION, CATEGORY, INPUT_IS_LIST, OUTPUT_IS_LIST = ("FLOAT",), "add", "test", True, (True,)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"numbers": ("FLOAT", {"forceInput": True}), "plus": ("FLOAT", {"default": 0.0})}}

    def add(self, numbers, plus):
        return ([n + plus[0] for n in numbers],)


class Slow(io.ComfyNode):
    """V3 and async: doubles a number."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="TestSlowDouble", category="test", inputs=[io.Float.Input("x", force_input=True)], outputs=[io.Float.Output()])

    @classmethod
    async def execute(cls, x):
        await asyncio.sleep(0)
        count("slow under inference mode" if torch.is_inference_mode_enabled() else "slow outside inference mode")
        return io.NodeOutput(2 * x)


class Evict:
    """V1: unloads every model that ComfyUI knows of, in the middle of an iteration."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("DANCEGRPO_ROLLOUT",), "evict", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"rollout": ("DANCEGRPO_ROLLOUT",)}}

    def evict(self, rollout):
        for ours in (m.model for m in comfy.model_management.current_loaded_models if type(m.model).__name__ == "WholePatcher"):
            names = {type(module).__name__ for module in ours.model}
            count(f"evicted {'the reward' if names == {'Clip'} else 'the policy' if 'AutoencoderKL' in names else names}")
        comfy.model_management.unload_all_models()
        return (rollout,)


class Away:
    """V1: whether a reward leaves its device when ComfyUI makes room; on the CPU alone there is no other, so it is sent to "meta".

    Its tensors are parameters, buffers as in docs/your_own_reward.md, or it has none, and ComfyUI has nothing to move; nor has it where
    the reward has a device of its own.
    """

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "look", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"tensors": (["parameters", "buffers", "none"],), "device": ("STRING", {})}}

    def look(self, tensors, device):
        from comfy_dancegrpo.rewards import Reward

        with torch.inference_mode(False):
            weights = torch.nn.Linear(3, 1) if tensors == "parameters" else torch.nn.Module()
            if tensors == "buffers":
                weights.register_buffer("weight", torch.zeros(3))
        weights.forward = lambda pictures, prompts: pictures[:, 0, 0, 0]
        reward = Reward("weights", weights, device=device)
        reward(torch.zeros(2, 1, 1, 3), ["a", "b"])
        known = comfy.model_management.current_loaded_models
        found = [m.model for m in known if type(m.model).__name__ == "WholePatcher" and weights in m.model.model.modules()]
        devices = [str(weights.weight.device)] if tensors != "none" else []
        for patcher in found:
            patcher.offload_device = torch.device("meta")
        comfy.model_management.unload_all_models()
        return {"ui": {"devices": [*devices, *(str(weights.weight.device) for _ in found)], "left": [len(known)]}}


def watch():
    from comfy_dancegrpo import policies, rewards

    for module in (policies, rewards):
        def load(*arguments, _load=module.load, _name=module.__name__, **options):
            count(f"{_name}.load")
            return _load(*arguments, **options)

        module.load = load


watch()
NODE_CLASS_MAPPINGS = {"TestRedness": Redness, "TestSum": Sum, "TestSlowDouble": Slow, "TestEvict": Evict, "TestAway": Away,
                       **flux.NODE_CLASS_MAPPINGS}
