"""Pictures that come from outside, and pictures that a page wants in another form. Everything here runs in a thread of its own."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from .files import Refused

UPLOADED = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP"}  # what may be uploaded


def check(file: BinaryIO, suffix: str) -> None:
    """Decodes an uploaded picture. Raises `Refused` (400) for one that is broken, too large, or not what its name says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=[UPLOADED[suffix]]) as image:
                image.load()
    except Exception as error:  # noqa: BLE001 - decoders raise what they like over a broken file
        raise Refused(400, f"not a {UPLOADED[suffix]} picture that can be read here: {' '.join(str(error).split())[:200]}") from None


def converted(path: Path, preview: str, channel: str) -> tuple[bytes, str]:
    """A picture for `preview` ("webp;90") or a `channel` ("rgb", "a"), and its type. Raises `Refused` for a file that is no picture."""
    form, _, quality = preview.partition(";")
    form = form if form in ("webp", "jpeg") else "webp" if preview else "png"
    try:
        with Image.open(path) as opened:
            if channel == "a":
                image = Image.new("RGBA", opened.size)
                image.putalpha(opened.convert("RGBA").getchannel("A"))
            else:
                image = opened.convert("RGB" if channel == "rgb" or form == "jpeg" else "RGBA")
            out = io.BytesIO()
            image.save(out, form.upper(), quality=min(int(quality), 100) if quality.isdigit() else 90)
    except Exception as error:  # noqa: BLE001 - as above
        raise Refused(400, f"not a picture that can be read here: {' '.join(str(error).split())[:200]}") from None
    return out.getvalue(), f"image/{form}"
