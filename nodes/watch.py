from __future__ import annotations

from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.workflow.host import host

from . import wires
from .held_out import SAMPLING, held_out, tell_of_seen

REFERENCES = ("best", "start")
MAX_DROPS = ("max_drop", "max_drop_2", "max_drop_3")
RULE = (*MAX_DROPS, "patience", "below")  # may change without it being another run: one that was stopped may go on


class Watch:
    TITLE = "Watch"
    DESCRIPTION = "Scores held-out prompts while the loop runs, by rewards that are not trained on, and stops the run when one of them falls."
    SEARCH_ALIASES = ["reward hacking", "early stopping", "validation", "guard"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = ()
    FUNCTION = "watch"
    OUTPUT_NODE = True
    LOOP_WATCH = True
    EVERY_PROCESS = True

    @classmethod
    def INPUT_TYPES(cls):
        reward, limit = "Scored and plotted, never trained on.", "The run stops when the reward's mean falls by more than this. 0: it is only watched."
        return {"required": {
            "policy": wires.socket(wires.LIVE_POLICY, "From Loop Start."),
            "update": wires.socket(wires.UPDATE, "From Update: the policy is watched after it."),
            "prompts": wires.socket(wires.PROMPTS, "Prompts that are not trained on, the same in every iteration."),
            "reward": wires.socket(wires.REWARD, f"{reward} The best checkpoint is the best by this one."),
            "every": wires.integer(10, 1, 1_000_000, "Iterations between evaluations; the first is from before training."),
            "max_drop": wires.number(0.05, 0.0, 1e6, limit),
            "patience": wires.integer(2, 1, 1000, "Evaluations in a row that must have fallen so far."),
            "below": wires.choice(list(REFERENCES), "What the fall is measured from. best: the reward's best mean so far. start: that from before training."),
            **SAMPLING,
        }, "optional": {
            "reward_2": wires.socket(wires.REWARD, reward), "max_drop_2": wires.number(0.0, 0.0, 1e6, limit),
            "reward_3": wires.socket(wires.REWARD, reward), "max_drop_3": wires.number(0.0, 0.0, 1e6, limit),
            "frames": wires.FRAMES,
        }}

    def __init__(self):
        self._watch = None  # of one run: the node lives as long as its loop runs

    def watch(self, policy, update, prompts, reward, every, max_drop, patience, below, steps, shift, guidance_scale, width, height, noise_seed,
              samples_per_prompt, batch_size, reward_2=None, max_drop_2=0.0, reward_3=None, max_drop_3=0.0, frames=1):
        from comfy_dancegrpo.runs import watch

        if self._watch is None:
            tell_of_seen("Watch", prompts, policy.prompts)
            settings = held_out(policy.policy, prompts, (reward, reward_2, reward_3), steps, shift, guidance_scale, width, height, noise_seed,
                                samples_per_prompt, batch_size, frames)
            self._watch = watch.Watch(settings, every)
        host().load(policy.policy)
        row = self._watch(policy)
        return {"ui": {"text": [f"{name} {value:.4f}" for name, value in row["rewards"].items()]}} if row else {}


def rule_of(runner):
    """The stop rule of a loop's body (`loop.BodyRunner`), None where nothing watches it; and the prompts that are watched, as a tuple of a tuple.

    Raises RunError for two Watch nodes in one loop.
    """
    from comfy_dancegrpo.runs.watch import Rule

    found = runner.watches((*RULE, "prompts", "reward_2", "reward_3"))
    if not found:
        return None, ()
    if len(found) > 1:
        raise RunError(f"found {len(found)} Watch nodes in the loop's body, accepted: one, with up to three rewards")
    given = found[0]
    drops = [given.get(name, 0.0) for name, reward in zip(MAX_DROPS, ("reward", "reward_2", "reward_3")) if reward == "reward" or given.get(reward) is not None]
    return Rule(tuple(drops), given["patience"], given["below"]), (tuple(given["prompts"].prompts),)
