from __future__ import annotations

from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.groups import COMBINATIONS, ESTIMATORS, GROUP, NORMALISE_FIRST

from . import wires


class Advantage:
    TITLE = "Advantage"
    DESCRIPTION = "Turns scores into advantages: how much better a picture is than the rest of its group, in standard deviations."
    SEARCH_ALIASES = ["grpo", "normalise", "best of n"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.ADVANTAGES,)
    RETURN_NAMES = ("advantages",)
    OUTPUT_TOOLTIPS = ("A number for each picture; groups without spread train nothing.",)
    FUNCTION = "compute"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "scores": wires.socket(wires.SCORES, "Of one reward or several; combine says how they become one number."),
            "clamp": wires.number(5.0, 0.01, 1000.0, "Advantages are kept within plus and minus this.", 0.1),
        }, "optional": {
            "combine": wires.choice(list(COMBINATIONS), "Of several rewards. Normalised each in its group first, weights compare importance; summed first, units count."),
            "best_of": wires.integer(0, 0, 4096, "Trains only so many of each group, the best and the worst halves of them; all are compared with. "
                                                 "An even number; 0 trains all.", 2),
            "estimator": wires.choice(list(ESTIMATORS), "What a score is compared with. group: the rest of its group. The others change that, or what the "
                                      "difference is divided by; in groups without spread all train nothing."),
            "min_advantage": wires.number(0.0, 0.0, 1000.0, "Pictures whose advantage is nearer to 0 than this are not trained, which spares their replay; 0 trains all.", 0.05),
            "best_of_end": wires.integer(-1, -1, 4096, "best_of in the run's last iteration: it moves there in equal steps, to even numbers. 0: all of the group. "
                                                       "-1: it stays as it is."),
        }}

    @classmethod
    def VALIDATE_INPUTS(cls, best_of=0, best_of_end=-1):
        if best_of is not None and (best_of < 0 or best_of % 2):
            return f'input "best_of": found {best_of}, accepted: 0 (all), or an even number up to the size of a group'
        if best_of_end not in (None, -1) and (best_of_end < 0 or best_of_end % 2):
            return f'input "best_of_end": found {best_of_end}, accepted: -1 (best_of stays), 0 (all), or an even number up to the size of a group'
        return True

    def compute(self, scores, clamp: float, combine: str = NORMALISE_FIRST, best_of: int = 0, estimator: str = GROUP,
                min_advantage: float = 0.0, best_of_end: int = -1):
        from comfy_dancegrpo.grpo import advantages

        try:
            if best_of_end != -1:
                best_of = advantages.best_of_now(scores.rollout, best_of, best_of_end)
            return (advantages.combine(scores, clamp, combine, best_of, estimator, min_advantage),)
        except ValueError as error:
            raise RunError(str(error)) from error
