"""What is measured: the settings of the bundled workflows, with what the modes of Group Sample change in them. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_dancegrpo import nodes
from comfy_dancegrpo.grpo.noise_steps import NoiseSteps
from comfy_dancegrpo.workflow.convert import to_prompt
from comfy_dancegrpo.workflow.read import read_workflow
from comfy_dancegrpo.workflow.schema import object_info

if TYPE_CHECKING:
    from comfy_dancegrpo.grpo.learner import OptimizerSettings
    from comfy_dancegrpo.grpo.protocol import Advantages, SamplingPlan, Scores, Size
    from comfy_dancegrpo.grpo.rollout import Request
    from comfy_dancegrpo.grpo.update import UpdateSettings
    from comfy_dancegrpo.lora.adapter import LoraSettings
    from comfy_dancegrpo.lora.full import FullSettings
    from comfy_dancegrpo.policies.base import Policy

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = {  # by policy, with its published settings
    "embedded": "quickstart", "embedded_diffusion": "quickstart", "flux": "flux_dev", "sd15": "sd15", "hunyuan-video": "hunyuan_video"}

_ALL = {
    "prompts_per_iteration": 8, "group_size": 4, "steps": 6, "eta": 1.7, "train_fraction": 1.0, "clip_range": 1e-3, "micro_batch": 32, "optimizer_steps": 5,
    "learning_rate": 4e-3, "lora_targets": "modulation", "lora_rank": 8, "lora_alpha": 8.0, "warmup": 20, "ema_decay": 0.98,
}
MODES: dict[str, dict[str, Any]] = {  # of the embedded policies; tuned on validation captions, but for window
    "all": _ALL,
    "window": _ALL | {"window_size": 2},
    "branch": _ALL | {"prompts_per_iteration": 16, "group_size": 8, "micro_batch": 4, "optimizer_steps": 4, "warmup": 5, "ema_decay": 0.95},
}
EMBEDDED: dict[str, dict[str, Any]] = {  # what the other kind of process changes in that; not tuned
    "embedded": {},
    "embedded_diffusion": {"transition": "ddim", "eta": 1.0, "shift": 0.0, "steps": 10, "lora_targets": "all linear layers"},
}
ITERATIONS = {"all": 60, "window": 90, "branch": 28}  # of --learning
BACKWARD = 3  # calls that one with its backward pass counts as


@dataclass(frozen=True)
class Setting:
    """Fields that a workflow's nodes have too are named as their inputs are."""

    policy: str
    prompts_per_iteration: int
    micro_batch: int
    learning_rate: float
    weight_decay: float
    lora_rank: int
    lora_alpha: float
    lora_targets: str
    ema_decay: float
    warmup: int
    gradient_checkpointing: bool
    group_size: int
    steps: int
    transition: str
    eta: float
    shift: float
    guidance_scale: float
    width: int
    height: int
    frames: int
    initial_noise: str
    noise_steps: str
    window_size: int
    window_interval: int
    noise_share: float
    clip_range: float
    train_fraction: float
    optimizer_steps: int
    max_grad_norm: float
    best_of: int
    clamp: float
    estimator: str
    objective: str
    clip_range_high: float
    kl_weight: float

    @property
    def shared(self) -> bool:
        return self.initial_noise == "shared"

    @property
    def noise(self) -> NoiseSteps:
        return NoiseSteps(self.noise_steps, self.window_size, self.window_interval, self.noise_share)

    @property
    def size(self) -> Size:
        from comfy_dancegrpo.grpo.protocol import Size

        return Size(self.height, self.width, self.frames)

    @property
    def lora(self) -> LoraSettings | FullSettings:
        from comfy_dancegrpo.lora import full

        return full.settings(self.lora_rank, self.lora_alpha, self.lora_targets)

    @property
    def optimizer(self) -> OptimizerSettings:
        from comfy_dancegrpo.grpo.learner import OptimizerSettings

        return OptimizerSettings(self.learning_rate, self.weight_decay, ema_decay=self.ema_decay, warmup=self.warmup)

    @property
    def update(self) -> UpdateSettings:
        from comfy_dancegrpo.grpo.update import UpdateSettings

        return UpdateSettings(self.clip_range, self.train_fraction, self.optimizer_steps, self.max_grad_norm, objective=self.objective,
                              clip_range_high=self.clip_range_high, kl_weight=self.kl_weight)

    def advantages(self, scores: Scores) -> Advantages:
        from comfy_dancegrpo.grpo.advantages import combine

        return combine(scores, self.clamp, best_of=self.best_of, estimator=self.estimator)

    def plan(self, policy: Policy) -> SamplingPlan:
        from comfy_dancegrpo.grpo.protocol import SamplingPlan

        return SamplingPlan(policy.time_grid(self.steps, self.shift, self.size), self.transition, self.eta, self.guidance_scale, self.size)

    def request(self, policy: Policy, prompts: tuple[str, ...], seed: int, iteration: int) -> Request:
        from comfy_dancegrpo.grpo.rollout import Request

        return Request(prompts, self.group_size, policy.latent_shape(self.size), seed, iteration, self.shared, self.micro_batch, self.noise)


def published(policy: str, mode: str = "all", **changes: Any) -> Setting:
    """Of the policy's bundled workflow, in a mode; of one that is not embedded, for one prompt and one optimizer step.

    changes: other fields; those that are None change nothing.
    """
    registry = {**nodes.HOST_CLASS_MAPPINGS, **nodes.NODE_CLASS_MAPPINGS}
    graph = to_prompt(read_workflow(ROOT / "workflows" / f"{WORKFLOWS[policy]}.json"), object_info(registry, nodes.NODE_DISPLAY_NAME_MAPPINGS))
    inputs: dict[str, Any] = {"policy": policy}
    for kind in ("LoopStart", "GroupSample", "Update", "Advantage"):
        inputs |= next(node["inputs"] for node in graph.values() if node["class_type"] == f"DanceGRPO{kind}")
    own = MODES[mode] | EMBEDDED[policy] if policy in EMBEDDED else {"prompts_per_iteration": 1, "optimizer_steps": 1}
    found = inputs | {"policy": policy, "noise_steps": mode} | own
    setting = Setting(**{field.name: found[field.name] for field in fields(Setting)})
    if mode == "branch":
        setting = replace(setting, initial_noise="shared")
    return replace(setting, **{name: value for name, value in changes.items() if value is not None})
