from __future__ import annotations

from comfy_dancegrpo import addresses

from . import wires
from .remote_reward import CALLS, check_fits, name_problem, service

QUESTION = "How well does the picture show this: {prompt} Answer with a score from {low} (not at all) to {high} (every detail of it, and without flaws)."


class JudgeReward:
    TITLE = "Judge Reward"
    DESCRIPTION = "A vision-language model that is asked how good each picture is: any behind an OpenAI-compatible address, such as vLLM or llama.cpp."
    SEARCH_ALIASES = ["vlm", "llm", "openai", "vllm", "llama.cpp", "gpt"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.REWARD,)
    RETURN_NAMES = ("reward",)
    OUTPUT_TOOLTIPS = ("One number for each picture; larger is better.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "address": ("STRING", {"default": "http://127.0.0.1:8000/v1", "tooltip": "Of the API. Its host must be allowed by you: in your settings, or by "
                                                                                    "--allow-host on the command line. An API key comes from there too."}),
            "model": ("STRING", {"default": "", "tooltip": "As the server names it; empty where it has one alone."}),
            "question": ("STRING", {"default": QUESTION, "multiline": True, "tooltip": "Asked of each picture. The words prompt, low and high in braces "
                                                                                       "stand for the prompt and the ends of the scale."}),
            "low": wires.number(0.0, -1e6, 1e6, "The worst score; one below it is a fault.", 1.0),
            "high": wires.number(10.0, -1e6, 1e6, "The best score; one above it is a fault.", 1.0),
            **CALLS,
        }, "optional": {
            "frames": wires.integer(8, 1, 256, "Of a video that are shown to it, evenly spread."),
            "reference": ("BOOLEAN", {"default": True, "tooltip": "Shows it the prompt's reference picture too, where the prompt has one."}),
            "name": ("STRING", {"default": "judge", "tooltip": "What metrics and plots call it."}),
        }}

    @classmethod
    def VALIDATE_INPUTS(cls, address, low, high, name="judge"):
        if low is not None and high is not None and not low < high:
            return f'input "low": found {low:g}, accepted: less than "high", which is {high:g}'
        return (name is not None and name_problem(name, "name")) or (address is not None and addresses.problem(address)) or True

    def load(self, address: str, model: str, question: str, low: float, high: float, connections: int, timeout: float, retries: int,
             frames: int = 8, reference: bool = True, name: str = "judge"):
        from comfy_dancegrpo.rewards import judge

        check_fits(self.VALIDATE_INPUTS(address, low, high, name))  # again, for what came over links
        called = judge.completions(service(address, connections, timeout, retries))
        return (judge.load(called, model, judge.Question(question, low, high, frames, reference), name or "judge"),)
