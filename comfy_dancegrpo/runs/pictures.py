"""Pictures that a run shows: the before/after grid, the curves, contact sheets, animations. Of videos the stills show the middle frame."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..pixels import to_bytes
from . import picture_statistics
from .evaluate import Evaluation

PAPER, INK, FAINT, GOOD, BAD = (255, 255, 255), (30, 30, 30), (120, 120, 120), (20, 130, 60), (190, 40, 40)


def to_image(picture: Tensor) -> Image.Image:
    """[H, W, 3] in 0..1 to 8 bits; of a video [F, H, W, 3] its middle frame."""
    return Image.fromarray(to_bytes(picture if picture.ndim == 3 else picture[len(picture) // 2]))


def save_animation(video: Tensor, path: Path, fps: float, longest: int = 512) -> None:
    """[F, H, W, 3] in 0..1 as a looping WebP, its longer side at most `longest` pixels."""
    frames = [Image.fromarray(frame) for frame in to_bytes(video)]
    for frame in frames:
        frame.thumbnail((longest, longest))
    frames[0].save(path, "WEBP", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, quality=80, method=0)


def to_tensor(image: Image.Image) -> Tensor:
    """ComfyUI's IMAGE: [1, H, W, 3] float32 in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)[None]


def before_after(evaluation: Evaluation, columns: int = 8, rows: int = 2) -> Image.Image:
    """Pairs, before above after, spread evenly over the prompts; under each its prompt, at each its score by the first reward."""
    count = min(columns * rows, len(evaluation.prompts))
    picked = [i * len(evaluation.prompts) // count for i in range(count)]
    columns = min(columns, count)
    height, width = evaluation.before.shape[-3:-1]
    zoom = max(1, round(150 / width))
    cell_w, picture_h = max(width * zoom, 96), height * zoom
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    scores = evaluation.comparisons[0]
    lines = 4
    pair_h, left, gap = 2 * (picture_h + 16) + 14 * lines + 14, 52, 8
    sheet = Image.new("RGB", (left + columns * (cell_w + gap) + gap, -(-count // columns) * pair_h + 34), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, 8), f"the same noise before and after training; scores by {scores.line()}", INK, font)
    for k, i in enumerate(picked):
        x, y = left + (k % columns) * (cell_w + gap), 34 + (k // columns) * pair_h
        for name, pictures, values, dy in (("before", evaluation.before, scores.before, 0),
                                           ("after", evaluation.after, scores.after, picture_h + 16)):
            if k % columns == 0:
                pen.text((gap, y + dy + picture_h // 2 - 7), name, INK, font)
            sheet.paste(to_image(pictures[i]).resize((width * zoom, picture_h), Image.Resampling.NEAREST), (x, y + dy))
            better = values[i] - scores.before[i]
            pen.text((x, y + dy + picture_h + 1), f"{values[i]:.3f}", GOOD if better > 0.005 else BAD if better < -0.005 else FAINT, small)
        wrapped = textwrap.wrap(evaluation.prompts[i], max(12, cell_w // 6))
        for n, line in enumerate(wrapped[:lines]):
            pen.text((x, y + 2 * (picture_h + 16) + 14 * n), line if n < lines - 1 or len(wrapped) <= lines else line + " …", FAINT, small)
    return sheet


def contact_sheet(pictures: list[Tensor]) -> Image.Image:
    """Pictures of one size or several in a near-square grid."""
    images = [to_image(p) for p in pictures]
    columns = int(np.ceil(np.sqrt(len(images) * 1.6)))
    w, h = max(i.width for i in images), max(i.height for i in images)
    sheet = Image.new("RGB", (columns * (w + 2) + 2, -(-len(images) // columns) * (h + 2) + 2), PAPER)
    for k, image in enumerate(images):
        sheet.paste(image, (2 + k % columns * (w + 2), 2 + k // columns * (h + 2)))
    return sheet


def curves(rows: tuple[dict[str, Any], ...], title: str, width: int = 960, height: int = 640, watched: Sequence[dict[str, Any]] = (),
           statistics: bool = False) -> Image.Image:
    """Reward with its spread, the spread within groups, clip fraction, gradient norm, against the iteration.

    Where several rewards train, each of them too. watched: a run's evaluations by Watch, a panel each reward. statistics: those of the pictures.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [{"reward": (title, None)}]
    iterations = np.array([r["iteration"] for r in rows])

    def values(*keys: str) -> np.ndarray:  # of rows from before a column was written it has none
        found = (functools.reduce(lambda value, key: value.get(key, {}), keys, r) for r in rows)
        return np.array([np.nan if value == {} else value for value in found], dtype=float)

    if len(rewards := rows[-1].get("rewards", {})) > 1:
        for some in (list(rewards)[i:i + 4] for i in range(0, len(rewards), 4)):
            panels.append({f"reward {name}": (f"{name}, trained on (weight {rewards[name]['weight']:g})", values("rewards", name, "mean")) for name in some})
    if watched:
        panels.append({f"watch {name}": (f"{name}, watched on held-out prompts", [r["rewards"][name] for r in watched]) for name in watched[0]["rewards"]})
    usual = {"group_std": "spread within groups", "clip_fraction": "share of clipped ratios", "grad_norm": "gradient norm"}
    panels.append({key: (name, values(key)) for key, name in usual.items()})
    if statistics:
        panels.append({f"pictures {key}": (name, values("pictures", key)) for key, name in picture_statistics.NAMES.items()})

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    lines = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=[2, *[1] * (len(panels) - 1)])[:, 0]
    _reward(lines[0].subplots(), iterations, values("reward_mean"), values("reward_std"), title)
    for line, line_panels in zip(lines[1:], panels[1:]):
        for axes, (key, (name, column)) in zip(line.subplots(1, len(line_panels), squeeze=False)[0], line_panels.items()):
            if key.startswith("watch "):
                axes.plot([r["iteration"] for r in watched], column, color="C1", linewidth=1.6, marker=".")
            else:
                axes.plot(iterations, column, linewidth=1.2)
            axes.set_title(name, fontsize=10)
            axes.set_xlim(0, iterations[-1] + 1)
            if line is lines[-1]:
                axes.set_xlabel("iteration", fontsize=9)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _reward(axes, iterations: np.ndarray, mean: np.ndarray, std: np.ndarray, title: str) -> None:
    axes.fill_between(iterations, mean - std, mean + std, alpha=0.15, linewidth=0)
    axes.plot(iterations, mean, alpha=0.45, linewidth=1, label="reward of the iteration's samples (band: their spread)")
    window = max(1, len(mean) // 12)
    if len(mean) >= 2 * window:
        smooth = np.convolve(mean, np.ones(window) / window, mode="valid")
        axes.plot(iterations[window - 1:], smooth, color="C0", linewidth=2.2, label=f"mean of {window} iterations")
    axes.set_title(title)
    axes.legend(loc="lower right", frameon=False)
