"""Small pieces of HTML. Text is escaped here and nowhere else: a `str` is text, only a `Markup` is HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

from .style import STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # whatever a run's text were, a browser would run and fetch nothing


class Markup(str):
    """HTML that is whole already."""


def escaped(value: Any) -> Markup:
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def tag(name: str, *content: Any, cls: str = "", style: str = "") -> Markup:
    given = (f' class="{html.escape(cls)}"' if cls else "") + (f' style="{html.escape(style)}"' if style else "")
    return Markup(f"<{name}{given}>{''.join(map(escaped, content))}</{name}>")


def joined(parts: Iterable[Any], between: str = "") -> Markup:
    return Markup(between.join(map(escaped, parts)))


def section(title: str, *content: Any) -> Markup:
    return tag("section", tag("h2", title), *content)


def figure(caption: Any, chart: str, wide: bool = False) -> Markup:
    """chart: SVG of our own; a wide one is not made small with its page."""
    return tag("figure", tag("figcaption", caption), Markup(chart), cls="wide" if wide else "")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = ()) -> Markup:
    """numbers: the columns that are set to the right."""
    def cells(name: str, row: Sequence[Any]) -> Markup:
        return tag("tr", *(tag(name, value, cls="n" if i in numbers else "") for i, value in enumerate(row)))

    return tag("div", tag("table", *([cells("th", head)] if head else []), *(cells("td", row) for row in rows)), cls="table")


def picture(jpeg: bytes, words: str) -> Markup:
    """words: shown below, and read out."""
    data = base64.b64encode(jpeg).decode("ascii")
    return tag("div", Markup(f'<img alt="{html.escape(words)}" src="data:image/jpeg;base64,{data}">'), tag("span", words), cls="shot")


def page(title: str, parts: Iterable[Markup]) -> str:
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">'
            f"{tag('title', title, ' – DanceGRPO')}<style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n")
