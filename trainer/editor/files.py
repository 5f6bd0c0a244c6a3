"""The one way from a name in a request to a file: within its folder, and sent so that a browser cannot take it for a program."""

from __future__ import annotations

import json
import mimetypes
import re
import unicodedata
from pathlib import Path
from typing import Any

from aiohttp import web

from comfy_dancegrpo.runs.folder import DEVICES
from comfy_dancegrpo.workflow.host import inside

MOST_JSON = 32 * 1024**2  # bytes of a request's body
_LONGEST = 200  # characters of a file's name
# what a page may show; anything else of the user's folders is downloaded
MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif", ".bmp": "image/bmp",
         ".mp4": "video/mp4", ".webm": "video/webm", ".wav": "audio/wav", ".mp3": "audio/mpeg", ".flac": "audio/flac", ".ogg": "audio/ogg"}
# of our own and the frontend's files; the system's table may lack or misname these
_PROGRAM = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".html": "text/html", ".json": "application/json",
            ".md": "text/markdown", ".svg": "image/svg+xml", ".wasm": "application/wasm", ".map": "application/json", ".woff2": "font/woff2"}


class Refused(Exception):
    """A request that is answered by a 4xx and one line."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


def path_in(folder: Path, name: str) -> Path:
    """`folder / name`, of which every link leads to a place in the folder too. Raises `Refused` (403) for a name that leaves it."""
    path = None if "\0" in name else inside(folder, name)
    try:
        if path is not None and path.resolve().is_relative_to(folder.resolve()):
            return path
    except (OSError, RuntimeError):  # a name too long for the system, a circle of links
        pass
    raise Refused(403, f"found {name!r}, accepted: a name within its folder")


def file_in(folder: Path, name: str) -> Path:
    """As `path_in`, of a file that is there. Raises `Refused`, 404 where none is."""
    path = path_in(folder, name)
    if not path.is_file():
        raise Refused(404, f"no file {name!r}")
    return path


def new_file_in(folder: Path, name: str) -> Path:
    """As `path_in`, of a file that may be written: each part of its name is one that every system takes."""
    for part in name.split("/"):
        odd = re.search(r'[<>:"\\|?*]|%[0-9A-Fa-f]{2}', part) or any(unicodedata.category(letter).startswith("C") for letter in part)
        if odd or not part or part in (".", "..") or part.endswith((".", " ")) or len(part) > _LONGEST or DEVICES.match(part):
            raise Refused(400, f"found {name!r}, accepted: a plain file name")
    path = path_in(folder, name)
    if path.is_dir():
        raise Refused(400, f"{name!r} is a folder")
    return path


def send_program(folder: Path, name: str) -> web.FileResponse:
    """A file of ours or the frontend's. What has its hash in its name may be kept by the browser."""
    path = file_in(folder, name)
    kind = _PROGRAM.get(path.suffix.lower()) or MEDIA.get(path.suffix.lower()) or mimetypes.guess_type(path.name)[0]
    kept = name.startswith("assets/") and path.suffix in (".js", ".css", ".woff2")
    kind = f"{kind}; charset=utf-8" if kind and kind.startswith("text/") else kind
    return web.FileResponse(path, headers={"Content-Type": kind or "application/octet-stream",
                                           "Cache-Control": "max-age=31536000, immutable" if kept else "no-cache"})


def send_media(path: Path) -> web.FileResponse:
    """A file of the user's folders: pictures, video and sound are shown; text, pages and drawings with scripts are downloaded."""
    kind = MEDIA.get(path.suffix.lower())
    headers = {"Content-Type": kind or "application/octet-stream", "Cache-Control": "no-cache"}
    return web.FileResponse(path, headers=headers if kind else {**headers, "Content-Disposition": "attachment"})


async def read_json(request: web.Request) -> Any:
    """The body. Raises `Refused`: 413 when it is too large, 400 when it is not JSON."""
    if (request.content_length or 0) > MOST_JSON:
        raise Refused(413, f"found a body of {request.content_length} bytes, accepted: at most {MOST_JSON}")
    try:
        return json.loads(await request.read())  # aiohttp stops at MOST_JSON where no length was given
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None


async def read_object(request: web.Request) -> dict[str, Any]:
    """The body, which must be an object."""
    body = await read_json(request)
    if not isinstance(body, dict):
        raise Refused(400, "the body is not a JSON object")
    return body
