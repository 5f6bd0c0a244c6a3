"""`dancegrpo validate --memory`: what a checked workflow's loops will need."""

from __future__ import annotations

from typing import Any

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.workflow.problems import node_label
from comfy_dancegrpo.workflow.schema import inputs_of

from .console import ConsoleHost


def report(host: ConsoleHost) -> list[str]:
    """The lines about every loop, in the active host's folders. Raises WorkflowError for values that only a run will know."""
    from comfy_dancegrpo import memory
    from comfy_dancegrpo.grpo.protocol import Size
    from comfy_dancegrpo.lora import full
    from comfy_dancegrpo.nodes.load_policy import parts_of
    from comfy_dancegrpo.quiet import quiet_loading

    lines: list[str] = []
    for start_id, start in _of_class(host, "DanceGRPOLoopStart"):
        loop = _values(host, start_id)
        source = start["inputs"]["policy"][0]
        if host.prompt[source]["class_type"] != "DanceGRPOLoadPolicy":
            raise WorkflowError(f"{node_label(source, host.prompt)}: --memory knows the policies of Load Policy alone")
        base = _values(host, source)
        for sample_id, node in _of_class(host, "DanceGRPOGroupSample"):
            if node["inputs"]["policy"][0] != start_id:
                continue
            sample = _values(host, sample_id)
            if not loop["micro_batch"]:
                lines.append(f'{node_label(start_id, host.prompt)}: input "micro_batch": 0 is found by trial; the activations are those of one sample')
            try:
                with quiet_loading():
                    lines += memory.report(memory.Wanted(
                        policy=base["policy"], parts=parts_of(base), dtype=base["dtype"], quantized=base["quantization"],
                        prompt_cache=base["prompt_cache"], optimizer=loop["optimizer"], ema=loop["ema_decay"] > 0,
                        lora=full.settings(loop["lora_rank"], loop["lora_alpha"], loop["lora_targets"]),
                        gradient_checkpointing=loop["gradient_checkpointing"], micro_batch=loop["micro_batch"] or 1, steps=sample["steps"],
                        samples=loop["prompts_per_iteration"] * sample["group_size"], size=Size(sample["height"], sample["width"], sample["frames"])))
            except ValueError as error:
                raise WorkflowError(f"{node_label(sample_id, host.prompt)}: {error}") from None
    return lines or ["the workflow has no training loop, so there is nothing to estimate"]


def _of_class(host: ConsoleHost, class_type: str) -> list[tuple[str, dict]]:
    return [(node_id, node) for node_id, node in host.prompt.items() if node["class_type"] == class_type]


def _values(host: ConsoleHost, node_id: str) -> dict[str, Any]:
    """A node's widget values; those left out by their defaults."""
    node = host.prompt[node_id]
    declared = inputs_of(host.registry[node["class_type"]].INPUT_TYPES())
    found = {name: item.options["default"] for name, item in declared.items() if item.is_widget} | node["inputs"]
    for name, item in declared.items():
        if item.is_widget and isinstance(found[name], list):
            raise WorkflowError(f'{node_label(node_id, host.prompt)}: input "{name}": found a link; --memory knows the values of widgets alone')
    return found
