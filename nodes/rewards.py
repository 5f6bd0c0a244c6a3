from __future__ import annotations

import time

from comfy_dancegrpo import processes, rewards
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.workflow.graph import is_link

from . import wires

WEIGHT = wires.number(1.0, -1000.0, 1000.0, "Of this reward among several; negative trains against it.", 0.1)
EARLIER = wires.socket(wires.SCORES, "Scores of the same rollout by other rewards, to go along.")


class LoadReward:
    TITLE = "Load Reward"
    DESCRIPTION = "Loads what scores pictures."
    SEARCH_ALIASES = ["clip", "score model", "preference"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.REWARD,)
    RETURN_NAMES = ("reward",)
    OUTPUT_TOOLTIPS = ("One number for each picture; larger is better.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "reward": wires.choice(list(rewards.known()), "What is measured; the node's help page describes each."),
            "model": wires.choice(rewards.available_models(), "A file or folder in reward_models, a hub id in the Hugging Face cache (org/name, or "
                                                              "org/name/file), or the embedded CLIP. Rewards without a model ignore it."),
            "batch_size": wires.integer(32, 1, 4096, "Pictures scored at once."),
        }, "optional": {
            "base": wires.choice(rewards.available_bases(), "For a single file of weights: the folder that has its configuration and tokenizer. "
                                                            "published: the one that its publishers name, from reward_models or the cache."),
            "frames": wires.integer(8, 1, 4096, "Of a video that are scored, evenly spread. Rewards of whole videos ignore it."),
            "frame_score": wires.choice(list(rewards.FRAME_SCORES), "Of the scored frames, what the video gets."),
            "device": ("STRING", {"default": "", "tooltip": "Where it computes: cpu, cuda:1 … Empty: where the policy does."}),
            "fps": wires.number(rewards.FPS, 0.1, 240.0, "Frames a second of videos, for rewards of whole videos: fewer make the video longer.", 1.0),
            "offload": ("BOOLEAN", {"default": False, "tooltip": "Between two scorings its weights lie in main memory: for a GPU that is too small for both "
                                                                "models. ComfyUI does so by itself."}),
        }}

    @classmethod
    def IS_CHANGED(cls, reward, **inputs):
        kind = rewards.known().get(reward)
        return kind.state() if kind else ""  # ComfyUI caches: a file of the user's that has changed since is loaded anew

    @classmethod
    def VALIDATE_INPUTS(cls, reward, model, base=rewards.PUBLISHED, device=""):
        if None in (reward, model, base, device):  # they come over links
            return True
        return rewards.problem(reward, model, base, device) or True

    def load(self, reward: str, model: str, batch_size: int, base=rewards.PUBLISHED, frames=8, frame_score="mean", device="",
             fps=rewards.FPS, offload=False):
        return (rewards.load(reward, model, batch_size, base, fps, frames=frames, frame_score=frame_score, device=device, offload=offload),)


def _with(rollout, name: str, weight: float, values, earlier, seconds: float):
    """Scores of the rollout, after the earlier ones. Raises RunError when those are of another rollout."""
    from comfy_dancegrpo.grpo.protocol import Column, Scores

    if earlier is not None and earlier.rollout is not rollout:
        raise RunError('input "scores": found scores of another rollout, accepted: of the one that is scored here')
    before = earlier.columns if earlier else ()
    columns = (*before, Column(rewards.distinct(name, [column.name for column in before]), float(weight), values))
    return Scores(rollout, columns, seconds + (earlier.seconds if earlier else 0.0))


class Score:
    TITLE = "Score"
    DESCRIPTION = "Scores every picture of a rollout with a reward."
    SEARCH_ALIASES = ["reward", "judge"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.SCORES,)
    RETURN_NAMES = ("scores",)
    OUTPUT_TOOLTIPS = ("A number for each picture.",)
    FUNCTION = "score"
    INPUT_IS_LIST = True  # videos come as a list, one IMAGE a sample

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "rollout": wires.socket(wires.ROLLOUT, "From Group Sample."),
            "reward": wires.socket(wires.REWARD, "From Load Reward."),
            "weight": WEIGHT,
        }, "optional": {
            "images": wires.socket("IMAGE", "Scored in place of the rollout's own pictures (upscaled, cropped …), one for each, in order."),
            "scores": EARLIER,
        }}

    def score(self, rollout, reward, weight, images=None, scores=(None,)):
        start, rollout, reward = time.perf_counter(), rollout[0], reward[0]
        if images is not None and processes.any_of(any(batch is None for batch in images)):  # Group Sample's: the first process alone has them all
            images = processes.broadcast(images)
        values = reward.of(rollout, None if images is None else _own(_samples(images, rollout), rollout))
        return (_with(rollout, reward.name, weight[0], values, scores[0], time.perf_counter() - start),)


def linked(runner):
    """By Group Sample's id, the rewards (`rewards.early.Linked`) by which Score nodes of a loop's body (`loop.BodyRunner`) will score what it draws."""
    from comfy_dancegrpo.rewards.early import Linked

    found = {}
    for node_label, inputs in runner.surely_called(Score):
        rollout, reward = inputs.get("rollout"), runner.from_outside(inputs.get("reward"))
        if is_link(rollout) and reward is not None and not is_link(inputs.get("images")):
            found.setdefault(rollout[0], []).append(Linked(reward, node_label))
    return found


def _own(samples, rollout):
    """Of all samples those that this process drew."""
    return samples[rollout.places] if hasattr(samples, "shape") else [samples[n] for n in rollout.places.tolist()]


def _samples(images: list, rollout):
    """The samples that a list of IMAGEs holds: of a rollout of videos one each, however many frames one has; of pictures those of all batches in order."""
    videos = rollout.plan.size.frames > 1
    if not videos and len(images) == 1 and len(images[0]) == rollout.size:
        return images[0]
    samples = list(images) if videos else [picture for batch in images for picture in batch]
    if len(samples) != rollout.size:
        raise RunError(f'input "images": found {len(samples)} {"videos" if videos else "pictures"}, accepted: {rollout.size}, one for each sample')
    return samples


class ScoresFromNumbers:
    TITLE = "Scores From Numbers"
    DESCRIPTION = "Takes the numbers that any node made of the pictures as a reward, one for each, in order."
    SEARCH_ALIASES = ["reward", "custom reward", "float", "third party"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.SCORES,)
    RETURN_NAMES = ("scores",)
    OUTPUT_TOOLTIPS = ("A number for each picture.",)
    FUNCTION = "score"
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "rollout": wires.socket(wires.ROLLOUT, "From Group Sample."),
            "numbers": wires.socket(wires.ANY, "Numbers: one by one, as a list, or as a tensor."),
            "name": ("STRING", {"default": "numbers", "tooltip": "What metrics and plots call it."}),
            "weight": WEIGHT,
        }, "optional": {"scores": EARLIER}}

    def score(self, rollout, numbers, name, weight, scores=(None,)):
        import torch

        rollout, values = rollout[0], torch.tensor(list(_flat(numbers)), dtype=torch.float32)
        if len(values) != rollout.size:
            raise RunError(f'input "numbers": found {len(values)} numbers, accepted: {rollout.size}, one for each sample')
        if not bool(values.isfinite().all()):
            bad = int((~values.isfinite()).nonzero()[0])
            raise RunError(f'input "numbers": found {values[bad].item()} for the prompt {rollout.prompts[bad]!r}, accepted: finite numbers')
        return (_with(rollout, name[0], weight[0], values, scores[0], 0.0),)


def _flat(values):
    """Every number of nested lists, tensors and arrays, in order. Raises RunError on anything else."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        elif hasattr(value, "tolist"):
            found = value.tolist()
            yield from _flat(found if isinstance(found, list) else [found])
        elif isinstance(value, (int, float)):
            yield float(value)
        else:
            raise RunError(f'input "numbers": found {type(value).__name__}, accepted: numbers')
