from __future__ import annotations

from comfy_dancegrpo import processes
from comfy_dancegrpo.workflow.host import host

from . import wires
from .held_out import SAMPLING, held_out, tell_of_seen


class Evaluate:
    TITLE = "Evaluate"
    DESCRIPTION = "Compares the policy with and without its LoRA, on held-out prompts and from the same noise, without noise in the steps."
    SEARCH_ALIASES = ["compare", "before after", "test", "held out"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = ("IMAGE", "FLOAT", "STRING")
    RETURN_NAMES = ("grid", "gain", "report")
    OUTPUT_TOOLTIPS = ("Pictures before and after, side by side.", "Mean gain of the first reward.", "The figures, a line for each reward.")
    FUNCTION = "evaluate"
    OUTPUT_NODE = True
    EVERY_PROCESS = True

    @classmethod
    def INPUT_TYPES(cls):
        reward = "Scored before and after; its figures go into the run's summary.json."
        return {"required": {
            "policy": wires.socket(wires.POLICY, "From Load Policy."),
            "lora": wires.socket(wires.LORA, "From Loop End, or Load Policy LoRA."),
            "prompts": wires.socket(wires.PROMPTS, "Prompts that were not trained on."),
            "reward": wires.socket(wires.REWARD, reward),
            **SAMPLING,
            "grid_columns": wires.integer(8, 1, 64, "Pairs in a row of the grid."),
            "grid_rows": wires.integer(2, 1, 64, "Rows of pairs in the grid."),
        }, "optional": {"reward_2": wires.socket(wires.REWARD, reward), "reward_3": wires.socket(wires.REWARD, reward), "frames": wires.FRAMES},
                "hidden": {"unique_id": "UNIQUE_ID", "prompt": "PROMPT"}}

    def evaluate(self, policy, lora, prompts, reward, steps, shift, guidance_scale, width, height, noise_seed, samples_per_prompt,
                 batch_size, grid_columns, grid_rows, reward_2=None, reward_3=None, frames=1, unique_id="",
                 prompt=None):
        from comfy_dancegrpo.runs import evaluate, history, pictures, report
        from comfy_dancegrpo.runs.folder import RunFolder

        tell_of_seen("Evaluate", prompts, lora.prompts)
        settings = held_out(policy, prompts, (reward, reward_2, reward_3), steps, shift, guidance_scale, width, height, noise_seed,
                            samples_per_prompt, batch_size, frames)
        host().load(policy)
        found = evaluate.evaluate(policy, lora, settings)
        host().say(f"Evaluate: the base, and with the {lora.kind}{' (moving average)' if lora.averaged else ''} after {lora.iterations} iterations")
        for comparison in found.comparisons:
            host().say(comparison.line())
        figures, gain = "\n".join(c.line() for c in found.comparisons), found.comparisons[0].summary()["gain"]
        if not processes.is_first():
            return None, gain, figures
        if lora.folder is not None:  # one that was loaded from a file is of no run here
            RunFolder(lora.folder).add_evaluations(
                str(unique_id), {comparison.reward: comparison.summary() for comparison in found.comparisons}, prompt or {})
            history.keep_pairs(RunFolder(lora.folder), str(unique_id), found)
            report.leave(lora.folder)
        grid = pictures.before_after(found, grid_columns, grid_rows)
        return {"ui": {"text": [figures]}, "result": (pictures.to_tensor(grid), gain, figures)}
