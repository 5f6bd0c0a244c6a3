"""Coloured shapes: the captioned pictures of the embedded policy, and an exact reader of such pictures.

A picture shows one shape; its caption names five attributes: size, colour, shape, place and background. `draw` makes a
picture from a caption's attributes, `measure` reads the attributes back from pixels, with no learned part.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import astuple, dataclass

import numpy as np
from PIL import Image, ImageDraw

PICTURE_SIZE = 64  # pixels
SIZES = {"small": 9.0, "large": 16.0}  # radius, pixels
COLOURS = {
    "red": (220, 30, 35), "green": (35, 160, 55), "blue": (40, 70, 220),
    "yellow": (245, 215, 25), "orange": (245, 135, 15), "purple": (145, 40, 175),
}
BACKGROUNDS = {"black": (12, 12, 12), "white": (245, 245, 245), "gray": (128, 128, 128), "pink": (250, 185, 205)}
PLACES = {
    "at the top left": (20, 20), "at the top right": (44, 20), "in the center": (32, 32),
    "at the bottom left": (20, 44), "at the bottom right": (44, 44),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
VALUES = (tuple(SIZES), tuple(COLOURS), SHAPES, tuple(PLACES), tuple(BACKGROUNDS))


@dataclass(frozen=True)
class Attributes:
    """The five words that a caption is made of, in the order of `VALUES`."""

    size: str
    colour: str
    shape: str
    place: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.place} on a {self.background} background"


def every() -> list[Attributes]:
    """All 1440 combinations, in a fixed order."""
    return [Attributes(*values) for values in itertools.product(*VALUES)]


def parse(caption: str) -> Attributes:
    """The attributes of a caption. Raises `ValueError` when the caption is not of this set."""
    try:
        return _by_caption()[" ".join(caption.lower().split())]
    except KeyError:
        raise ValueError(
            f"caption {caption!r} is not one of the embedded set, such as {every()[0].caption!r}"
        ) from None


@functools.cache
def _by_caption() -> dict[str, Attributes]:
    return {a.caption: a for a in every()}


def splits(seed: int = 2505) -> dict[str, list[str]]:
    """Captions by use: `train` (pretraining and reinforcement), `validation` (choosing settings), `test` (reports only)."""
    captions = [a.caption for a in every()]
    random.Random(seed).shuffle(captions)
    return {"test": captions[:160], "validation": captions[160:320], "train": captions[320:]}


@dataclass(frozen=True)
class Redraw:
    """Replaces each attribute, with its own probability, by a value drawn uniformly: a caption that is followed only partly."""

    size: float
    colour: float
    shape: float
    place: float
    background: float

    def __call__(self, attributes: Attributes, rng: random.Random) -> Attributes:
        return Attributes(*(
            rng.choice(values) if rng.random() < probability else value
            for value, values, probability in zip(astuple(attributes), VALUES, astuple(self))
        ))


def draw(attributes: Attributes, rng: random.Random | None = None, scale: int = 4) -> Image.Image:
    """The picture [64, 64] RGB, antialiased; with `rng` its place and radius vary by up to 1.5 pixels and 6 %."""
    jitter = (lambda span: rng.uniform(-span, span)) if rng else (lambda span: 0.0)
    x, y = (c + jitter(1.5) for c in PLACES[attributes.place])
    radius = SIZES[attributes.size] * (1 + jitter(0.06))
    canvas = Image.new("RGB", (PICTURE_SIZE * scale,) * 2, BACKGROUNDS[attributes.background])
    mask = Image.new("L", canvas.size, 0)
    _draw_mask(ImageDraw.Draw(mask), attributes.shape, x * scale, y * scale, radius * scale)
    canvas.paste(COLOURS[attributes.colour], mask=mask)
    return canvas.resize((PICTURE_SIZE,) * 2, Image.Resampling.BOX)


def _draw_mask(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float) -> None:
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        hole = 0.52 * r
        pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    elif shape == "square":
        side = 0.92 * r
        pen.rectangle((x - side, y - side, x + side, y + side), fill=255)
    elif shape == "cross":
        arm = 0.34 * r
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=255)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=255)
    else:
        lengths = (1.15 * r,) * 3 if shape == "triangle" else (r, 0.42 * r) * 5
        angles = (2 * math.pi * k / len(lengths) - math.pi / 2 for k in range(len(lengths)))
        pen.polygon([(x + n * math.cos(a), y + n * math.sin(a)) for n, a in zip(lengths, angles)], fill=255)


def measure(picture: np.ndarray) -> Attributes | None:
    """Reads the attributes from pixels.

    Args:
        picture: [H, W, 3] float, 0..1; measured at 64x64, other sizes are resized.

    Returns:
        The nearest attributes, or None when nothing stands out from the background.
    """
    if picture.shape[:2] != (PICTURE_SIZE, PICTURE_SIZE):
        image = Image.fromarray((picture * 255).round().clip(0, 255).astype(np.uint8))
        picture = np.asarray(image.resize((PICTURE_SIZE,) * 2, Image.Resampling.BOX), dtype=np.float64) / 255
    border = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3),
                             picture[2:-2, :2].reshape(-1, 3), picture[2:-2, -2:].reshape(-1, 3)])
    background = np.median(border, axis=0)
    mask = np.linalg.norm(picture - background, axis=-1) > 0.3
    if mask.sum() < 20:
        return None
    rows, columns = np.nonzero(mask)
    top, bottom = np.percentile(rows, (1, 99))
    left, right = np.percentile(columns, (1, 99))
    centre = np.array([(left + right) / 2 + 0.5, (top + bottom) / 2 + 0.5])
    extent = max(bottom - top, right - left) / 2
    return Attributes(
        size="large" if extent > 11.0 else "small",
        colour=_nearest(np.median(picture[mask], axis=0), COLOURS, 255),
        shape=_nearest_shape(mask),
        place=_nearest(centre, PLACES, 1),
        background=_nearest(background, BACKGROUNDS, 255),
    )


def agreement(picture: np.ndarray, caption: str) -> float:
    """The share of the caption's five attributes that the pixels show, in 0..1. Raises `ValueError` on another caption."""
    wanted, seen = parse(caption), measure(picture)
    if seen is None:
        return 0.0
    return sum(a == b for a, b in zip(astuple(wanted), astuple(seen))) / len(VALUES)


def _nearest(value: np.ndarray, table: dict[str, tuple], scale: float) -> str:
    return min(table, key=lambda name: float(np.linalg.norm(value - np.array(table[name]) / scale)))


def _crop(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box, resized to 24x24 in 0..1: what is left of a shape without its place and size."""
    rows, columns = np.nonzero(mask)
    box = mask[rows.min(): rows.max() + 1, columns.min(): columns.max() + 1]
    return np.asarray(Image.fromarray((box * 255).astype(np.uint8)).resize((24, 24), Image.Resampling.BOX)) / 255


@functools.cache
def _templates() -> dict[str, list[np.ndarray]]:
    def mask(shape: str, size: str) -> np.ndarray:
        pixels = np.asarray(draw(Attributes(size, "red", shape, "in the center", "black")), dtype=np.float64) / 255
        return np.linalg.norm(pixels - pixels[0, 0], axis=-1) > 0.3
    return {shape: [_crop(mask(shape, size)) for size in SIZES] for shape in SHAPES}


def _nearest_shape(mask: np.ndarray) -> str:
    crop = _crop(mask)
    return min(SHAPES, key=lambda shape: min(float(np.abs(crop - t).mean()) for t in _templates()[shape]))
