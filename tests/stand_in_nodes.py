"""Stands in for `comfy_dancegrpo.nodes` in test_cli.py: a loop that counts, and nodes that fail in every way."""

import errno
import os
import signal
import time

from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.workflow import loop
from comfy_dancegrpo.workflow.host import host

LINK = ("INT", {"lazy": True, "rawLink": True})


class Start:
    LOOP_START = True
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "run_name": ("STRING", {"default": "run"}), "iterations": ("INT", {"default": 3, "min": 1, "max": 100}),
            "seed": ("INT", {"default": 0, "min": 0, "max": 99}), "on_existing": (["resume", "new"], {"default": "new"})}}

    def run(self, **inputs):
        return loop.blocked(1)


class Body:
    """Adds one; `fault` says how to fail instead, in the second iteration."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "run", "test"
    FAULTS = ["none", "value", "run", "disk", "wrapped disk", "sigint", "sigterm", "sigint twice", "keyboard"]

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"x": ("INT", {"forceInput": True}), "fault": (cls.FAULTS, {"default": "none"})}}

    def run(self, x, fault):
        if x > 0:
            getattr(self, "fail_" + fault.replace(" ", "_"))()
            host().check_interrupt()
        return (x + 1,)

    def fail_none(self):
        pass

    def fail_value(self):
        raise ValueError("not like this\nand not like that")

    def fail_run(self):
        raise RunError("the reward is nan")

    def fail_disk(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail_wrapped_disk(self):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    def fail_sigint(self):
        os.kill(os.getpid(), signal.SIGINT)

    def fail_sigterm(self):
        os.kill(os.getpid(), signal.SIGTERM)

    def fail_sigint_twice(self):
        self.fail_sigint()
        self.fail_sigint()
        time.sleep(30)

    def fail_keyboard(self):
        raise KeyboardInterrupt


class End:
    LOOP_END = True
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"x": LINK}, "hidden": {"prompt": "PROMPT", "me": "UNIQUE_ID"}}

    def run(self, x, prompt, me):
        return loop.expand(loop.find_body(prompt, me, host().registry), "Runner", 1)


class Runner:
    INPUT_IS_LIST = True
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"body": ("STRING", {})}}

    def run(self, body, **outside):
        runner = loop.BodyRunner(loop.LoopBody.from_json(body[0]), host().registry, outside)
        start = runner.start_inputs()
        folder = host().output_folder / start["run_name"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "workflow.json").write_bytes(host().workflow_source)
        host().run_started(folder, "1")
        value = start["seed"]
        for iteration in range(start["iterations"]):
            value = runner.step((value,))["x"]
            host().progress(iteration + 1, start["iterations"], f"reward {value:.3f}")
        return (value,)


class Result:
    OUTPUT_NODE = True
    RETURN_TYPES, FUNCTION, CATEGORY = (), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"x": ("INT", {"forceInput": True})}}

    def run(self, x):
        host().say(f"result {x}")
        return {"ui": {"images": [{"filename": "a.png", "subfolder": "images", "type": "output"}]}}


NODE_CLASS_MAPPINGS = {"Start": Start, "Body": Body, "End": End, "Runner": Runner}
NODE_DISPLAY_NAME_MAPPINGS = {"Start": "Loop Start"}
HOST_CLASS_MAPPINGS = {"Result": Result}
