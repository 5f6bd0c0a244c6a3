"""The report's sections; each gives "" where the run has nothing for it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from ..overview import Overview, moving_mean
from . import curves
from .curves import SECOND, Line
from .html import Markup, escaped, figure, joined, picture, section, table, tag
from .style import PHASES

HEALTH = {"group_std": "spread within groups", "clip_fraction": "share of clipped ratios", "approx_kl": "KL divergence from the rollout's policy, estimated",
          "reference_kl": "KL divergence from the policy before training", "grad_norm": "gradient norm", "ratio_deviation": "ratio deviation (replay against rollout, must be 0 in float32)", "learning_rate": "learning rate"}
FAULTS = {"skipped_steps": "optimizer steps skipped (loss or gradient no number)", "flat_groups": "groups without spread, which train nothing"}  # where there were any
STATISTICS = {"sharpness": "sharpness of the pictures", "saturation": "saturation", "grid": "grid artefacts, dB", "near_duplicates": "near-duplicates in groups"}
PHASE_NAMES = {"denoise": "sampling (denoiser)", "decode": "decoding pictures", "reward": "rewards", "update": "training", "encode": "encoding prompts",
               "checkpoint": "waiting for checkpoints", "watch": "evaluations of Watch", "rest": "all else (previews, pictures, metrics)"}


def number(value: Any, sign: bool = False) -> str:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''}.4f}" if 0.001 <= abs(value) < 1e5 or value == 0 else f"{value:{'+' if sign else ''}.3g}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if hours < 1 else f"{hours:.1f} h"


def when(seconds: Any) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if isinstance(seconds, (int, float)) else "–"


def head(run: Overview) -> Markup:
    spent = sum(row["seconds"]["total"] for row in run.rows)
    facts = [("iterations", f"{run.iteration} of {run.iterations}"),
             ("reward, first → last", f"{number(run.first)} → {number(run.last)}"), ("best reward", f"{number(run.best)}" + (f" at {run.best_at}" if run.best_at else "")),
             ("time training", duration(spent)), ("an iteration", duration(run.seconds) if run.seconds is not None else "–"),
             ("last written", when(run.changed))]
    said = [tag("h1", run.seen["name"], tag("span", run.state, cls="state"))]
    if run.seen.get("stopped_by"):
        said.append(tag("p", "stopped by Watch: ", run.seen["stopped_by"], cls="notice"))
    if run.state in ("running", "stopping", "interrupted") or run.state == "stopped" and not run.seen.get("stopped_by"):
        said.append(tag("p", f"this run has not ended: what is told is what it had done after iteration {run.iteration}", cls="notice"))
    said.append(tag("div", *(tag("div", tag("span", name, cls="quiet"), tag("b", value)) for name, value in facts), cls="facts"))
    if run.window > 1:
        said.append(tag("p", f"Rewards here are means of {run.window} iterations: a single one has other prompts than the next.", cls="quiet"))
    return joined(said)


def _column(rows: Sequence[dict[str, Any]], *keys: str) -> list[Any]:
    def value(row: Any) -> Any:
        for key in keys:
            row = row.get(key) if isinstance(row, dict) else None
        return row if isinstance(row, (int, float)) else None

    return [value(row) for row in rows]


def reward(run: Overview, points: Sequence[dict[str, Any]]) -> Markup:
    if not run.rows:
        return Markup(tag("p", "No iteration has been done yet."))
    x, y = _column(run.rows, "iteration"), _column(run.rows, "reward_mean")
    smooth = run.window > 1
    lines = [Line(x, y, width=1 if smooth else 2, alpha=0.5 if smooth else 1, spread=_column(run.rows, "reward_std"))]
    if smooth:
        lines.append(Line(x[run.window - 1:], moving_mean(y, run.window), width=2.4))
    chart = curves.svg("reward", lines, 10, 3.2, end=x[-1], dots=[point["iteration"] for point in points])
    names = " + ".join(run.rows[-1].get("rewards", {}))
    return section("Reward", figure(f"{names}: mean of an iteration's samples against the iteration"
                                    + (f"; thick, of {run.window} iterations" if smooth else "") + "; band, their spread"
                                    + ("; ▲, pictures below" if points else ""), chart, wide=True))


def rewards(run: Overview) -> Markup:
    """Each of several."""
    trained = run.rows[-1].get("rewards", {}) if run.rows else {}
    if len(trained) < 2:
        return Markup()
    x = _column(run.rows, "iteration")
    return section("Rewards trained on", tag("div", *(
        figure(f"{name} (weight {number(told.get('weight'))})", curves.svg(f"each{k}", [Line(x, _column(run.rows, "rewards", name, "mean"))], end=x[-1]))
        for k, (name, told) in enumerate(trained.items())), cls="grid"))


def watched(run: Overview) -> Markup:
    if not run.watched:
        return Markup()
    x, names = _column(run.watched, "iteration"), list(run.watched[0]["rewards"])
    columns = {name: _column(run.watched, "rewards", name) for name in names}
    charts = (figure(f"{name}", curves.svg(f"watch{k}", [Line(x, columns[name], SECOND, marks=True)], end=max(run.iteration, 1)))
              for k, name in enumerate(names))
    rows = []
    for name, values in columns.items():
        best = max((i for i, v in enumerate(values) if v is not None), key=lambda i: values[i], default=None)
        rows.append((name, number(values[0]), "–" if best is None else f"{number(values[best])} in {x[best]}", number(values[-1]), _signed(values[-1], values[0])))
    return section("Watched, never trained on", tag("p", "Scored on held-out prompts while the run trained (Watch).", cls="quiet"), tag("div", *charts, cls="grid"),
                   Markup("<p></p>"), table(("reward", "start", "best", "last", "last less start"), rows, (1, 2, 3, 4)))


def _signed(after: Any, before: Any) -> Markup:
    if after is None or before is None:
        return escaped("–")
    return tag("span", number(after - before, sign=True), cls="good" if after > before else "bad" if after < before else "")


def evaluations(run: Overview) -> Markup:
    found = run.seen.get("evaluations") or {}
    if not found:
        return Markup()
    rows = []
    for name, told in found.items():
        low, high = told.get("ci95") or (None, None)
        sure = low is not None and (low > 0 or high < 0)
        gain = tag("b", number(told.get("gain"), sign=True), cls=("good" if told["gain"] > 0 else "bad") if sure else "")
        interval = "too few prompts" if low is None else f"{number(low, sign=True)} to {number(high, sign=True)}"
        rows.append((name, number(told.get("before")), number(told.get("after")), gain, interval, f"{told['t']:.1f}" if told.get("t") is not None else "–", told.get("n", "–")))
    return section("Evaluation", tag("p", "Held-out prompts, without and with what was trained, from the same noise (Evaluate). The interval is of the paired difference; "
                                          "a gain is coloured where it leaves 0 out.", cls="quiet"),
                   table(("reward", "before", "after", "gain", "95 % interval", "t", "prompts"), rows, (1, 2, 3, 4, 5, 6)))


def before_after(evaluated: Sequence[dict[str, Any]]) -> Markup:
    pairs = []
    for found in evaluated:
        for k, prompt in enumerate(found["prompts"]):
            shots = [picture(found["pictures"][2 * k + side], f"{name} {number(found[name][k])}") for side, name in enumerate(("before", "after"))]
            pairs.append(tag("div", tag("div", *shots, cls="row"), tag("div", prompt, cls="prompt"), cls="pair"))
    if not pairs:
        return Markup()
    names = ", ".join(dict.fromkeys(str(found.get("reward", "")) for found in evaluated))
    return section("Before and after", tag("p", f"Held-out prompts, the same noise; scores by {names}.", cls="quiet"), tag("div", *pairs, cls="pairs"))


def over_time(points: Sequence[dict[str, Any]]) -> Markup:
    if not points:
        return Markup()
    rows = []
    for point in points:
        shots = (picture(data, number(score)) for data, score in zip(point["pictures"], point["scores"]))
        words = tag("div", tag("p", tag("b", f"iteration {point['iteration']}")), tag("p", point.get("prompt", ""), cls="prompt"))
        rows.append(tag("div", words, tag("div", *shots, cls="row"), cls="point"))
    return section("Groups over time", tag("p", "Of an iteration's first group some pictures, best score first. Every iteration has other prompts.", cls="quiet"), *rows)


def health(run: Overview) -> Markup:
    if not run.rows:
        return Markup()
    x = _column(run.rows, "iteration")
    faults = {name: title for name, title in FAULTS.items() if any(_column(run.rows, name))}
    columns = {(name,): title for name, title in (HEALTH | faults).items()} | {("pictures", name): title for name, title in STATISTICS.items()}
    charts = []
    for k, (keys, title) in enumerate(columns.items()):
        values = _column(run.rows, *keys)
        if any(value is not None for value in values):
            charts.append(figure(title, curves.svg(f"health{k}", [Line(x, values, width=1.2)], end=x[-1])))
    return section("Training", tag("div", *charts, cls="grid"))


def timing(run: Overview) -> Markup:
    if not run.rows:
        return Markup()
    names = list(dict.fromkeys(name for row in run.rows for name in row["seconds"] if name != "total"))
    sums: dict[str, float] = {name: sum(row["seconds"].get(name, 0.0) for row in run.rows) for name in names}
    total = sum(row["seconds"]["total"] for row in run.rows)
    if run.watched:
        sums["watch"] = sum(row.get("seconds", 0.0) for row in run.watched)
    sums["rest"] = max(0.0, total - sum(sums.values()))
    colours = {name: PHASES[i % len(PHASES)] for i, name in enumerate(sums)}
    bar = tag("div", *(tag("i", style=f"width:{100 * seconds / max(total, 1e-9):.2f}%;background:{colours[name]}") for name, seconds in sums.items()), cls="bar")
    rows = [(joined([tag("span", cls="key", style=f"background:{colours[name]}"), PHASE_NAMES.get(name, name)]), f"{seconds / len(run.rows):.3f} s", duration(seconds),
             f"{100 * seconds / max(total, 1e-9):.1f} %") for name, seconds in sums.items()]
    rows.append((tag("b", "all"), f"{total / len(run.rows):.3f} s", duration(total), ""))
    return section("Time", bar, table(("phase", "an iteration", "in all", "share"), rows, (1, 2, 3)))


def settings(nodes: Sequence[tuple[str, str, dict[str, Any]]]) -> Markup:
    shown = [tag("details", tag("summary", title, tag("span", "" if title == kind else f"  {kind}", cls="quiet")),
                 table((), [(name, value if value != "" else "–") for name, value in widgets.items()])) for title, kind, widgets in nodes if widgets]
    return section("Settings", tag("p", "The workflow as it was executed, node by node; open one to see its inputs.", cls="quiet"), *shown) if shown else Markup()


def environment(entries: Sequence[dict[str, Any]]) -> Markup:
    if not entries:
        return Markup()
    shown = []
    for entry in entries:
        packages = entry.get("packages") if isinstance(entry.get("packages"), dict) else {}
        rows = [(name, entry[name]) for name in ("comfy_dancegrpo", "python", "system", "device", "processes", "threads", "cpus") if name in entry]
        since = f"from iteration {entry['from_iteration'] + 1} on, {when(entry.get('time'))}"
        shown += [tag("p", since, cls="quiet")] if len(entries) > 1 else []
        shown.append(table((), [*rows, *packages.items()]))
    return section("Environment", *shown)


def checkpoints(found: Sequence[tuple[int, str, int, float]]) -> Markup:
    if not found:
        return Markup()
    rows = [(iteration, kind, f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB", when(at)) for iteration, kind, size, at in found]
    return section("Checkpoints", table(("iteration", "", "size", "written"), rows, (0, 2)))
