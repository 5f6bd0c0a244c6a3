from __future__ import annotations

from . import wires


class Advantage:
    TITLE = "Advantage"
    DESCRIPTION = "Turns scores into advantages: how much better a picture is than the rest of its group, in standard deviations."
    SEARCH_ALIASES = ["grpo", "normalise"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.ADVANTAGES,)
    RETURN_NAMES = ("advantages",)
    OUTPUT_TOOLTIPS = ("A number for each picture; groups without spread train nothing.",)
    FUNCTION = "compute"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "scores": wires.socket(wires.SCORES, "Several rewards are each normalised in their group, then weighted and summed."),
            "clamp": wires.number(5.0, 0.01, 1000.0, "Advantages are kept within plus and minus this.", 0.1),
        }}

    def compute(self, scores, clamp: float):
        from comfy_dancegrpo.grpo.advantages import combine

        return (combine(scores, clamp),)
