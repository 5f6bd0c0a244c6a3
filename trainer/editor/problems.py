"""A workflow's problems as ComfyUI answers them to POST /prompt, so that the frontend shows each on its node."""

from __future__ import annotations

import re
from typing import Any

from comfy_dancegrpo.workflow.graph import descendants
from comfy_dancegrpo.workflow.problems import node_label

_AT_INPUT = re.compile(r'input "(?P<name>[^"]*)": (?P<rest>.*)')


def answer(problems: list[str], prompt: dict[str, Any], output_nodes: list[str]) -> dict[str, Any]:
    """{"error", "node_errors"} of lines as `validate` and `check_loops` word them; those that name no node stand in "error" alone."""
    nodes: dict[str, list[dict[str, Any]]] = {}
    for line in problems:
        for node_id in prompt:
            found = re.match(re.escape(node_label(node_id, prompt)) + r"( \([^)]*\))?: ", line)
            if found is not None:
                nodes.setdefault(node_id, []).append(_at_node(line[found.end():]))
                break
    if any("unknown node type" in line for line in problems):
        kind = "missing_node_type"
    else:
        kind = "prompt_outputs_failed_validation" if nodes else "invalid_prompt"
    error = {"type": kind, "message": "The workflow has problems", "details": "\n".join(problems), "extra_info": {}}
    return {"error": error, "node_errors": {
        node_id: {"errors": errors, "class_type": _class_type(prompt[node_id]), "dependent_outputs": _outputs(node_id, prompt, output_nodes)}
        for node_id, errors in nodes.items()}}


def _at_node(rest: str) -> dict[str, Any]:
    found = _AT_INPUT.fullmatch(rest)
    if found is None:
        return {"type": "custom_validation_failed", "message": rest, "details": rest, "extra_info": {}}
    kind = "required_input_missing" if found["rest"].startswith("missing") else "custom_validation_failed"
    return {"type": kind, "message": rest, "details": rest, "extra_info": {"input_name": found["name"]}}


def _class_type(node: Any) -> str:
    return str(node.get("class_type", "")) if isinstance(node, dict) else ""


def _outputs(node_id: str, prompt: dict[str, Any], output_nodes: list[str]) -> list[str]:
    whole = {n: node for n, node in prompt.items() if isinstance(node, dict) and isinstance(node.get("inputs"), dict)}
    below = {node_id, *(descendants(whole, [node_id]) if node_id in whole else ())}
    return [n for n in output_nodes if n in below]
