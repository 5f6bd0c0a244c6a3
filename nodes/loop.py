from __future__ import annotations

import hashlib

from comfy_dancegrpo import processes
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo import optimizers, schedules
from comfy_dancegrpo.lora import ALL_WEIGHTS
from comfy_dancegrpo.runs import trackers
from comfy_dancegrpo.runs.folder import MAY_CHANGE, ON_EXISTING, ON_OUT_OF_MEMORY, name_problem
from comfy_dancegrpo.workflow import loop
from comfy_dancegrpo.workflow.host import host

from . import remote_reward, rewards, watch, wires

LORA_TARGETS = ["attention", "attention and feed-forward", "all linear layers", "modulation"]  # every family has these
NOT_IN_FINGERPRINT = {("DanceGRPOLoadPolicy", "prompt_cache"), *(("DanceGRPOLoopStart", name) for name in MAY_CHANGE),
                      *(("DanceGRPOWatch", name) for name in watch.RULE),
                      *((f"DanceGRPO{kind}Reward", name) for kind in ("Remote", "Judge") for name in remote_reward.MAY_CHANGE)}


class LoopStart:
    TITLE = "Loop Start"
    DESCRIPTION = "Begins the training loop: attaches a fresh LoRA to the policy, and hands out the prompts of each iteration."
    SEARCH_ALIASES = ["train", "iterations", "lora", "grpo"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.LIVE_POLICY, wires.PROMPTS, "INT")
    RETURN_NAMES = ("policy", "prompts", "iteration")
    OUTPUT_TOOLTIPS = ("The policy in training, with its LoRA.", "The prompts of this iteration.", "Counts from 1.")
    FUNCTION = "start"
    LOOP_START = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "policy": wires.socket(wires.POLICY, "The base model."),
            "prompts": wires.socket(wires.PROMPTS, "Prompts to train on."),
            "run_name": ("STRING", {"default": "run", "tooltip": "The run's folder in the output folder."}),
            "iterations": wires.integer(200, 1, 1_000_000, "How many times the body runs."),
            "prompts_per_iteration": wires.integer(4, 1, 4096, "Groups sampled in each iteration."),
            # no control after generate: a seed that moves by itself would make every resume another run
            "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": False,
                             "tooltip": "Of the LoRA's start, the order of prompts, the noise and the choice of transitions."}),
            "learning_rate": wires.number(3e-4, 1e-8, 1.0, "AdamW's step size; a LoRA wants about 30 times what full weights do.", 1e-5),
            "weight_decay": wires.number(1e-4, 0.0, 1.0, "AdamW's.", 1e-4),
            "lora_rank": wires.integer(16, 1, 1024, "Width of the LoRA."),
            "lora_alpha": wires.number(16.0, 0.01, 4096.0, "The LoRA's update is scaled by alpha / rank.", 1.0),
            "lora_targets": wires.choice([*LORA_TARGETS, ALL_WEIGHTS], "Which layers of the denoiser's blocks take a LoRA. modulation: those by which text "
                                         "and time scale and shift; few weights, so they learn from few samples. all weights: full fine-tuning; rank and "
                                         "alpha are then without effect.", LORA_TARGETS[1]),
            "ema_decay": wires.number(0.0, 0.0, 0.99999, "Of the LoRA's moving average, once an optimizer step; it is what is saved and "
                                                         "evaluated. 0 turns it off.", 0.001),
            "micro_batch": wires.integer(4, 0, 4096, "Samples in every denoiser call, in rollout and training. Lower it when memory runs out; "
                                                     "it belongs to the run, since kernels round differently at different sizes. 1, 4 and multiples of 8 "
                                                     "are exact; others may round by the place in the batch. 0: the largest of these that fits, found once by trial."),
            "checkpoint_every": wires.integer(20, 0, 1_000_000, "Iterations between checkpoints; 0 keeps one at the end alone."),
            "on_existing": wires.choice(list(ON_EXISTING), "Where the run's folder exists. new: the next free name, or, finished and "
                                        "unchanged, reopened. resume: goes on. restart: deletes it and starts afresh."),
        }, "optional": {
            "warmup": wires.integer(0, 0, 1_000_000, "Iterations over which the learning rate rises to its full value. AdamW's first steps are "
                                                     "the least certain ones, and as long as any."),
            "schedule": wires.choice(list(schedules.SCHEDULES), "Of the learning rate after its warm-up. inverse_sqrt lets it fall: the LoRA wanders less "
                                                      "once it has learned the most. linear, cosine, cosine_with_restarts and polynomial fall to 0 over "
                                                      "the iterations of this run."),
            "lora": wires.socket(wires.LORA, "Training starts from these weights; lora_rank grows to theirs where it is lower."),
            "optimizer": wires.choice(list(optimizers.OPTIMIZERS), "adamw; 8-bit AdamW (paged: its state moves to the CPU when memory runs out) needs "
                                      "bitsandbytes; adafactor keeps a fraction of the state; prodigy finds its step size, with learning_rate 1."),
            "gradient_checkpointing": ("BOOLEAN", {"default": False, "tooltip": "Keeps few activations and computes the others again: much less memory "
                                                                               "in training, about a third more time. The gradient stays the same."}),
            "checkpoints_kept": wires.integer(2, 0, 1_000_000, "The last checkpoints that are kept; 0 keeps all. Where one is damaged, the one before is used."),
            "on_out_of_memory": wires.choice(list(ON_OUT_OF_MEMORY), "When the GPU's memory does not suffice. stop: the run stops. halve: it is started again "
                                             "from its last whole iteration with half the micro-batch, as often as it takes, and says so."),
            "schedule_cycles": wires.integer(2, 1, 1000, "Of cosine_with_restarts: how often the learning rate falls from its full value to 0."),
            "processes": wires.integer(1, 1, 4096, "How many train together, each on a GPU of its own. More than 1, here in the editor, start the headless "
                                                   "trainer, while this page shows it as ever. Headless it counts like --processes, and 1 takes every GPU."),
            "schedule_power": wires.number(1.0, 0.01, 100.0, "Of polynomial: 1 falls in a straight line, more falls fast at first and then ever more slowly.", 0.1),
            "schedule_rules": ("STRING", {"default": "1:100,0.1", "tooltip": "Of piecewise_constant: shares of the learning rate, each with the last iteration that "
                                                                             "has it, and then the share of all after them."}),
            "curriculum": ("BOOLEAN", {"default": False, "tooltip": "Draws prompts less whose groups had no spread and so trained nothing: after k such groups in a "
                                                                    "row, the next k epochs, at most 8, pass over them."}),
        }}

    @classmethod
    def VALIDATE_INPUTS(cls, run_name, optimizer="adamw", schedule_rules="1"):
        if optimizer is not None and optimizer not in optimizers.OPTIMIZERS:
            return f'input "optimizer": found {optimizer!r}, accepted: {", ".join(map(repr, optimizers.OPTIMIZERS))}'
        return ((run_name is not None and name_problem(run_name, "run_name")) or (optimizer and optimizers.problem(optimizer))
                or (schedule_rules is not None and schedules.problem(schedule_rules)) or trackers.problem_of_settings() or True)

    def start(self, **inputs):
        return loop.blocked(len(self.RETURN_TYPES))


class LoopEnd:
    TITLE = "Loop End"
    DESCRIPTION = "Ends the training loop, and runs it: everything between Loop Start and here, iteration after iteration."
    SEARCH_ALIASES = ["train", "run"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.LORA, wires.RUN)
    RETURN_NAMES = ("lora", "run")
    OUTPUT_TOOLTIPS = ("The LoRA as it stands at the end: its moving average where that is on.", "The run's folder and metrics.")
    FUNCTION = "end"
    OUTPUT_NODE = True
    LOOP_END = True

    @classmethod
    def IS_CHANGED(cls, unique_id, **inputs):
        """ComfyUI would skip an unchanged Loop End in silence: only one whose run is finished, and then it is said."""
        return float("nan") if host().must_run(unique_id) else ""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"update": wires.socket(wires.UPDATE, "From Update, in the loop's body.", lazy=True, rawLink=True)},
                "hidden": {"prompt": "PROMPT", "unique_id": "UNIQUE_ID"}}

    def end(self, update, prompt, unique_id):
        body = loop.find_body(prompt, unique_id, host().registry)
        return loop.expand(body, "DanceGRPOLoopRunner", len(self.RETURN_TYPES))


class LoopRunner:
    TITLE = "Loop Runner (made by Loop End)"
    DESCRIPTION = "Loop End expands into this; it is of no use by itself."
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = LoopEnd.RETURN_TYPES
    RETURN_NAMES = LoopEnd.RETURN_NAMES
    FUNCTION = "run"
    INPUT_IS_LIST = True
    DEPRECATED = True  # the editor leaves it out of its menus

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return float("nan")  # Loop End decides; its expansion is never taken from a cache of its own

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {loop.BODY: ("STRING", {"default": "", "tooltip": "The loop's body, written by Loop End."})},
                "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}}

    def run(self, body, prompt=(None,), extra_pnginfo=(None,), **outside):
        from comfy_dancegrpo.runs import child
        from comfy_dancegrpo.runs.session import Session

        host().workflow_started(prompt[0], extra_pnginfo[0])
        body = loop.LoopBody.from_json(body[0])
        runner = loop.BodyRunner(body, host().registry, outside, prompt[0], extra_pnginfo[0])
        policy, prompts, settings = self._settings(**runner.start_inputs())
        told = loop.fingerprint(prompt[0], body, NOT_IN_FINGERPRINT, host().registry), prompts.prompts  # a prompt file may change in place
        if pictures := [p.picture.digest() for p in prompts.prompts if getattr(p, "picture", None)]:  # and so may its pictures
            told += (pictures,)
        rule, watched = watch.rule_of(runner)
        told += watched  # prompts of another file
        if settings.start_from is not None:  # and so may a LoRA's
            told += (settings.start_from.digest(),)
        fingerprint = hashlib.sha256(repr(told).encode()).hexdigest()
        count = runner.start_inputs().get("processes", 1)
        words = host().trainer(runner.classes()) if count > 1 else None
        try:
            # ComfyUI runs nodes under inference mode; in the body only those that are not ours return to it (host.around)
            with processes.outside_inference_mode():
                if words is not None:
                    self._make_room(outside)
                    folder = child.train(body, count, words, extra_pnginfo[0])
                    return self._results(folder, *child.outcome(policy, prompts, settings, folder, rule))
                while True:
                    with Session(policy, prompts, settings, fingerprint, body.end_id, rule) as session:
                        session.live.scoring.link(rewards.linked(runner))
                        while not session.ended:
                            session.end(runner.step(session.begin())["update"])
                        return self._results(session.folder, session.snapshot(), session.record())
                    settings = session.again()
        except ValueError as error:
            raise RunError(str(error)) from error

    @staticmethod
    def _make_room(outside):
        """What this process has loaded leaves the device to those that will train."""
        for model in (value for values in outside.values() for value in values if hasattr(value, "leave")):
            host().unload(model)
        host().make_room()

    @staticmethod
    def _results(folder, snapshot, record):
        return {"ui": {"dancegrpo_run": [folder.name]}, "result": (snapshot, record)}

    @staticmethod
    def _settings(policy, prompts, iterations, learning_rate, weight_decay, ema_decay, lora_rank, lora_alpha, lora_targets, warmup=0,
                  schedule="constant", lora=None, optimizer="adamw", schedule_cycles=2, processes=1, schedule_power=1.0, schedule_rules="1", **rest):
        from comfy_dancegrpo.grpo.learner import OptimizerSettings
        from comfy_dancegrpo.lora import full
        from comfy_dancegrpo.runs.session import LoopSettings

        wanted = OptimizerSettings(learning_rate=learning_rate, weight_decay=weight_decay, ema_decay=ema_decay, warmup=warmup,
                                      schedule=schedule, name=optimizer, length=iterations, cycles=schedule_cycles, power=schedule_power, rules=schedule_rules)
        return policy, prompts, LoopSettings(iterations=iterations, lora=full.settings(lora_rank, lora_alpha, lora_targets), optimizer=wanted, start_from=lora, **rest)
