"""How an iteration's seconds grow with the group, the steps, the prompts and the pixels: a power law for each, beside that of the denoiser's part."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

VALUES = {"group_size": (4, 8, 16, 32), "steps": (4, 8, 16, 32), "prompts_per_iteration": (2, 4, 8, 16), "pixels": (32**2, 48**2, 64**2, 96**2)}
BASE = {"group_size": 8, "prompts_per_iteration": 2, "optimizer_steps": 1, "micro_batch": 8}  # of the embedded policy, where the command line says nothing
WITHIN = 0.1  # by which the exponents may differ


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """k of seconds = a values^k, by least squares of the logarithms."""
    x, y = [math.log(value) for value in values], [math.log(value) for value in seconds]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y)) / sum((a - x_mean) ** 2 for a in x)


def run(options: argparse.Namespace, values: dict[str, Sequence[int]] = VALUES) -> tuple[dict[str, Any], list[str], list[str]]:
    """(what was measured, the table, what is wrong). values: of each quantity, ascending; pixels are those of a square."""
    from . import sides
    from .iteration import machine, setting_of
    from .random_families import Cut

    base = setting_of(options, options.mode)
    if options.policy == "embedded":
        base = replace(base, **{name: value for name, value in BASE.items() if getattr(options, name) is None})
    result: dict[str, Any] = {"machine": machine(options.device), "base": base.__dict__, "repeats": options.repeats, "sweeps": {}}
    text = [f"{base.policy}, {base.noise_steps}: {base.prompts_per_iteration} prompts x {base.group_size}, {base.steps} steps, {base.width}x{base.height}, "
            f"micro-batch {base.micro_batch}; {result['machine']['device']}, load {result['machine']['load']}; median of {options.repeats}"]
    wrong = []
    for name, points in values.items():
        seconds, denoiser = [], []
        for value in points:
            changes = {"width": math.isqrt(value), "height": math.isqrt(value)} if name == "pixels" else {name: value}
            setting = replace(base, **changes)
            with sides.bench(setting, options.device, options.repeats + 1, Cut(options.depth, options.heads, options.tokens), options.dtype) as bench:
                turns = [sides.ours(bench, setting) for _ in range(options.repeats + 1)][1:]
            seconds.append(median(turn.seconds["total"] for turn in turns))
            denoiser.append(median(turn.denoiser for turn in turns))
        found = {"values": list(points), "seconds": seconds, "denoiser_seconds": denoiser,
                 "exponent": exponent(points, seconds), "denoiser_exponent": exponent(points, denoiser)}
        result["sweeps"][name] = found
        text.append(f"{name:24}" + "".join(f"{value:>10}" for value in points) + f"{'exponent':>12}")
        for what, row, power in (("seconds an iteration", seconds, found["exponent"]), ("in the denoiser", denoiser, found["denoiser_exponent"])):
            text.append(f"  {what:22}" + "".join(f"{value:>10.3f}" for value in row) + f"{power:>12.3f}")
        if found["exponent"] - found["denoiser_exponent"] > WITHIN:
            wrong.append(f"{name}: the iteration grows with the exponent {found['exponent']:.2f}, the denoiser with {found['denoiser_exponent']:.2f}")
    return result, text, wrong
