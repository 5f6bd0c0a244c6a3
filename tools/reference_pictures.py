"""Draws the reference pictures that ship with the prompts (comfy_dancegrpo/embedded/prompts/pictures): `python tools/reference_pictures.py`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

FOLDER = Path(__file__).resolve().parent.parent / "comfy_dancegrpo" / "embedded" / "prompts" / "pictures"
FINE = 3  # drawn so many times larger, for smooth edges


class Canvas:
    """A drawing in the coordinates of the finished picture."""

    def __init__(self, width: int, height: int, top: tuple[int, ...], bottom: tuple[int, ...]):
        """On a background that goes from one color to the other."""
        rows = [tuple(round(a + (b - a) * y / (height - 1)) for a, b in zip(top, bottom, strict=True)) for y in range(height)]
        column = Image.new("RGB", (1, height))
        column.putdata(rows)
        self.size = width, height
        self.image = column.resize((width * FINE, height * FINE), Image.Resampling.BILINEAR)
        self.draw = ImageDraw.Draw(self.image)

    def polygon(self, *points: tuple[float, float], fill: str) -> None:
        self.draw.polygon([(x * FINE, y * FINE) for x, y in points], fill=fill)

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self.draw.rectangle((x * FINE, y * FINE, (x + width) * FINE - 1, (y + height) * FINE - 1), fill=fill)

    def ellipse(self, x: float, y: float, across: float, high: float, fill: str) -> None:
        """Around its center."""
        self.draw.ellipse(((x - across) * FINE, (y - high) * FINE, (x + across) * FINE, (y + high) * FINE), fill=fill)

    def glow(self, x: float, y: float, radius: float, color: str) -> None:
        light = Image.new("L", self.image.size)
        ImageDraw.Draw(light).ellipse(((x - radius) * FINE, (y - radius) * FINE, (x + radius) * FINE, (y + radius) * FINE), fill=170)
        self.image.paste(Image.new("RGB", self.image.size, color), mask=light.filter(ImageFilter.GaussianBlur(radius * FINE / 2)))

    def save(self, name: str) -> None:
        self.image.resize(self.size, Image.Resampling.LANCZOS).save(FOLDER / f"{name}.jpg", quality=85)


def house() -> Canvas:
    c = Canvas(384, 384, (120, 180, 235), (215, 235, 250))
    c.ellipse(70, 75, 32, 32, "#ffd84d")
    c.ellipse(110, 420, 330, 170, "#6fae4c")
    c.ellipse(330, 430, 260, 150, "#5c9a40")
    c.box(130, 180, 140, 110, "#efe0c2")
    c.polygon((115, 182), (200, 115), (285, 182), fill="#b5482f")
    c.box(232, 118, 18, 40, "#8c3a28")
    c.box(186, 232, 32, 58, "#7a4a2a")
    for x in (146, 230):
        c.box(x, 205, 28, 28, "#8fc3e8")
    c.box(318, 210, 14, 85, "#6e4a2c")
    for x, y, r in ((325, 175, 40), (300, 195, 28), (350, 195, 28)):
        c.ellipse(x, y, r, r, "#3f8a3c")
    return c


def fruit() -> Canvas:
    c = Canvas(384, 384, (225, 205, 180), (205, 180, 150))
    c.box(0, 255, 384, 129, "#9a6a3f")
    c.ellipse(192, 318, 125, 14, "#7d5431")
    c.ellipse(150, 205, 44, 42, "#c9302c")
    c.box(148, 155, 5, 18, "#5b3a1e")
    c.ellipse(235, 208, 42, 42, "#f0932b")
    c.ellipse(193, 180, 30, 34, "#b8c94a")
    c.ellipse(193, 148, 17, 24, "#b8c94a")
    c.polygon((72, 225), (312, 225), (262, 315), (122, 315), fill="#e9edf2")
    c.ellipse(192, 315, 70, 10, "#d5dbe3")
    c.box(72, 219, 240, 10, "#f7f9fb")
    return c


def boat() -> Canvas:
    c = Canvas(640, 400, (140, 190, 235), (250, 225, 190))
    c.ellipse(500, 215, 38, 38, "#ffd27a")
    c.box(0, 235, 640, 165, "#2f6f9f")
    for y, x, length in ((262, 60, 110), (285, 360, 150), (315, 130, 180), (345, 420, 140), (372, 40, 160)):
        c.box(x, y, length, 3, "#6aa5cc")
    c.polygon((210, 262), (400, 262), (365, 305), (245, 305), fill="#8a4b2a")
    c.box(298, 90, 6, 172, "#5b3a1e")
    c.polygon((308, 95), (308, 250), (395, 250), fill="#ffffff")
    c.polygon((292, 110), (292, 250), (225, 250), fill="#d9463b")
    return c


def lamp() -> Canvas:
    c = Canvas(640, 400, (12, 18, 45), (45, 50, 90))
    for x, y in ((60, 50), (150, 95), (250, 40), (420, 70), (530, 35), (600, 110), (350, 120), (210, 140)):
        c.ellipse(x, y, 1.5, 1.5, "#ffffff")
    for x, width, top, color in ((0, 150, 150, "#23233f"), (140, 120, 190, "#2b2a4a"), (430, 130, 165, "#262645"), (550, 90, 205, "#2f2e50")):
        c.box(x, top, width, 330 - top, color)
    for x, y in ((30, 190), (80, 190), (30, 240), (180, 225), (465, 205), (510, 250), (585, 240)):
        c.box(x, y, 22, 28, "#e8b95a" if (x + y) % 4 else "#3a3a5c")
    c.box(0, 330, 640, 70, "#3b3b50")
    c.glow(330, 140, 85, "#ffd98a")
    c.ellipse(330, 352, 95, 12, "#8f7f60")
    c.box(326, 150, 8, 200, "#111118")
    c.polygon((312, 118), (348, 118), (341, 154), (319, 154), fill="#fff3c4")
    c.polygon((306, 118), (354, 118), (330, 100), fill="#111118")
    return c


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for scene in (house, fruit, boat, lamp):
        scene().save(scene.__name__)
