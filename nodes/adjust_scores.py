from __future__ import annotations

import dataclasses

from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo import adjustments

from . import wires

OPERATIONS = ["threshold", "rank", "clip", "negate"]


class AdjustScores:
    TITLE = "Adjust Scores"
    DESCRIPTION = "Changes what one reward trains on: passed or not, its rank in the group, its scores within bounds, its sign. Metrics keep the raw scores."
    SEARCH_ALIASES = ["threshold", "binary reward", "rank", "clip", "negate", "reward shaping"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = (wires.SCORES,)
    RETURN_NAMES = ("scores",)
    OUTPUT_TOOLTIPS = ("The same scores, one reward of them adjusted.",)
    FUNCTION = "adjust"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "scores": wires.socket(wires.SCORES, "From Score, Scores From Numbers or another Adjust Scores."),
            "operation": wires.choice(OPERATIONS, "threshold: 1 above a value, 0 elsewhere. rank: within the group, from 0 to 1; ties share theirs. clip: kept "
                                                  "from low to high. negate: trained against."),
            "threshold": wires.number(0.28, -1e9, 1e9, "Of threshold: what must be exceeded. 0.28 is the published value for HPS-v2.1, 0.39 that for CLIP score."),
            "low": wires.number(0.0, -1e9, 1e9, "Of clip: lower scores count as this."),
            "high": wires.number(1.0, -1e9, 1e9, "Of clip: higher scores count as this."),
            "column": ("STRING", {"default": "", "tooltip": "Which reward, by its name in the metrics. Empty: the newest."}),
        }}

    @classmethod
    def VALIDATE_INPUTS(cls, operation, low, high):
        if operation is not None and operation not in OPERATIONS:
            return f'input "operation": found {operation!r}, accepted: one of {", ".join(map(repr, OPERATIONS))}'
        if operation != "clip" or low is None or high is None:
            return True
        return adjustments.bounds_problem(low, high) or True

    def adjust(self, scores, operation: str, threshold: float, low: float, high: float, column: str):
        names = [c.name for c in scores.columns]
        if column and column not in names:
            raise RunError(f'input "column": found {column!r}, accepted: one of {", ".join(map(repr, names))}, or empty (the newest)')
        at = names.index(column) if column else len(names) - 1
        try:
            changed = _adjusted(scores.columns[at], scores.rollout.groups, operation, threshold, low, high)
        except ValueError as error:
            raise RunError(str(error)) from error
        return (dataclasses.replace(scores, columns=(*scores.columns[:at], changed, *scores.columns[at + 1:])),)


def _adjusted(column, groups, operation: str, threshold: float, low: float, high: float):
    if operation == "negate":  # of the weight: the metrics' total then rises as training succeeds, and values keep their units
        return dataclasses.replace(column, weight=-column.weight)
    values = column.used
    if operation == "threshold":
        values = adjustments.threshold(values, threshold)
    elif operation == "rank":
        values = adjustments.rank(values, groups.to(values.device))
    else:
        values = adjustments.clip(values, low, high)
    return dataclasses.replace(column, adjusted=values)
