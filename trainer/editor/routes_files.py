"""Files: what runs made (/view), pictures from the user (/upload/image), our extension, help pages, templates, and the frontend itself."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from aiohttp import web

from comfy_dancegrpo import resource
from comfy_dancegrpo.atomic import replacing

from . import pictures
from .editor import MOST_UPLOAD, PACK, Editor
from .files import MEDIA, Refused, file_in, new_file_in, path_in, send_media, send_program

_ANNOTATED = re.compile(r"(.+) \[(output|input|temp)\]")
_CHUNK = 2**20  # bytes
_LONGEST_FIELD = 1000


def add(routes: web.RouteTableDef, editor: Editor) -> None:
    webs = _web_folders(editor)

    @routes.get("/view")
    async def view(request: web.Request) -> web.StreamResponse:
        name, kind = request.query.get("filename", ""), request.query.get("type", "output")
        if annotated := _ANNOTATED.fullmatch(name):
            name, kind = annotated.groups()
        if kind not in editor.folders or not name:
            raise Refused(400, "accepted: a filename, and a type of output, input or temp")
        subfolder = request.query.get("subfolder", "")
        path = file_in(editor.folders[kind], f"{subfolder}/{name}" if subfolder else name)
        preview, channel = request.query.get("preview", ""), request.query.get("channel", "")
        if (preview or channel in ("rgb", "a")) and MEDIA.get(path.suffix.lower(), "").startswith("image/"):
            body, content_type = await asyncio.to_thread(pictures.converted, path, preview, channel)
            return web.Response(body=body, content_type=content_type)
        return send_media(path)

    @routes.post("/upload/image")
    async def upload(request: web.Request) -> web.Response:
        if not request.content_type.startswith("multipart/"):
            raise Refused(400, "the body is not multipart/form-data")
        if (request.content_length or 0) > MOST_UPLOAD + _CHUNK:
            raise Refused(413, f"found {request.content_length} bytes, accepted: at most {MOST_UPLOAD}")
        with tempfile.TemporaryFile() as file:
            fields = await _receive(request, file)
            kind, name, subfolder = fields.get("type") or "input", fields.get("filename", ""), fields.get("subfolder", "")
            if kind not in ("input", "temp"):
                raise Refused(400, f"type: found {kind!r}, accepted: input or temp")
            if "/" in name or Path(name).suffix.lower() not in pictures.UPLOADED:
                raise Refused(400, f"found the file {name!r}, accepted: a picture ({', '.join(pictures.UPLOADED)})")
            folder = editor.folders[kind]
            path = new_file_in(folder, f"{subfolder}/{name}" if subfolder else name)
            await asyncio.to_thread(pictures.check, file, path.suffix.lower())
            path = await asyncio.to_thread(_save, file, path, fields.get("overwrite") in ("true", "1"))
        parent = path.parent.relative_to(folder).as_posix()
        return web.json_response({"name": path.name, "subfolder": "" if parent == "." else parent, "type": kind})

    @routes.get("/extensions")
    async def extensions(request: web.Request) -> web.Response:
        return web.json_response([f"/extensions/{quote(pack)}/{quote(path.relative_to(folder).as_posix())}"
                                  for pack, folder in webs.items() if folder.is_dir() for path in sorted(folder.rglob("*.js"))])

    @routes.get("/extensions/{pack}/{file:.+}")
    async def extension(request: web.Request) -> web.StreamResponse:
        pack, name = request.match_info["pack"], request.match_info["file"]
        return send_program(webs[pack], name) if pack in webs else send_program(editor.frontend, f"extensions/{pack}/{name}")

    @routes.get("/workflow_templates")
    async def templates(request: web.Request) -> web.Response:
        return web.json_response({PACK: _offered(bool(editor.nodes.lent))})

    @routes.get("/workflow_templates/{pack}/{file}")
    async def template(request: web.Request) -> web.StreamResponse:
        if request.match_info["pack"] == OPENED and editor.opened:
            name, saved = editor.opened
            if request.match_info["file"] == f"{name}.json":
                return web.Response(body=saved.raw, content_type="application/json")
        if request.match_info["pack"] != PACK:
            raise Refused(404, "no such template")
        return send_program(resource("workflows"), request.match_info["file"])

    @routes.get("/templates/{file}")
    async def core_templates(request: web.Request) -> web.Response:
        """ComfyUI's own templates: there are none."""
        if re.fullmatch(r"index(\.[\w-]+)?\.json|index_logo\.json", request.match_info["file"]):
            return web.json_response({} if "logo" in request.match_info["file"] else [])
        raise Refused(404, "no such template")

    @routes.get("/i18n")
    async def translations(request: web.Request) -> web.Response:
        return web.json_response(_translations(resource("locales")))

    @routes.get("/user.css")
    async def style(request: web.Request) -> web.StreamResponse:
        return send_media(path) if (path := path_in(editor.user, "user.css")).is_file() else web.Response(text="", content_type="text/css")


def _offered(lent: bool) -> list[str]:
    """Names of the bundled workflows; those that need ComfyUI's nodes only where it lends them."""
    needs = {path.stem: json.loads(path.read_text(encoding="utf-8")).get("extra", {}).get("dancegrpo", {}).get("needs", [])
             for path in resource("workflows").glob("*.json")}
    return sorted(name for name, needed in needs.items() if lent or "ComfyUI" not in needed)


OPENED = "opened"  # the source under which the page fetches the workflow that the editor was started with


def add_frontend(app: web.Application, editor: Editor, lent: bool) -> None:
    """The page and its files, behind every other route."""

    async def index(request: web.Request) -> web.StreamResponse:
        response = send_program(editor.frontend, "index.html")
        if not lent:  # extensions of other packs may need more
            response.headers["Content-Security-Policy"] = _policy(request.host)
        return response

    async def frontend(request: web.Request) -> web.StreamResponse:
        return send_program(editor.frontend, request.match_info["file"])

    app.router.add_get("/", index)
    app.router.add_get("/{file:.+}", frontend)


def _policy(host: str) -> str:
    """The page reaches this server alone: neither the frontend nor a picture in a stranger's note calls another host."""
    own = f"'self' ws://{host} wss://{host} data: blob:" if re.fullmatch(r"[\w.\[\]:-]+", host) else "'self' data: blob:"
    return ("default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
            f"connect-src {own}; worker-src 'self' blob:; object-src 'none'; frame-ancestors 'self'")


def _web_folders(editor: Editor) -> dict[str, Path]:
    """Each pack's browser files: ours, and with --comfyui those of the packs that it lent."""
    lent = getattr(sys.modules.get("nodes"), "EXTENSION_WEB_DIRS", {}) if editor.nodes.lent else {}
    return {**{name: Path(folder) for name, folder in lent.items()}, PACK: resource("web")}


async def _receive(request: web.Request, file: BinaryIO) -> dict[str, str]:
    """The form's fields, with the picture's "filename"; its bytes go to `file`. Raises `Refused`."""
    fields: dict[str, str] = {}
    total = 0
    try:
        async for part in await request.multipart():
            while chunk := await part.read_chunk(_CHUNK):
                total += len(chunk)
                if total > MOST_UPLOAD:
                    raise Refused(413, f"found more than {MOST_UPLOAD} bytes, accepted: at most as many")
                if part.name == "image":
                    file.write(chunk)
                elif len(text := fields.get(part.name or "", "") + chunk.decode("utf-8")) <= _LONGEST_FIELD:
                    fields[part.name or ""] = text
                else:
                    raise Refused(400, f"{part.name}: found more than {_LONGEST_FIELD} characters")
            if part.name == "image":
                fields["filename"] = part.filename or ""
    except (ValueError, RuntimeError, AttributeError) as error:  # what aiohttp raises over a broken form
        raise Refused(400, f"not a form that can be read here: {' '.join(str(error).split())[:200]}") from None
    file.seek(0)
    return fields


def _save(file: BinaryIO, path: Path, overwrite: bool) -> Path:
    """Writes the upload, under another name where one is taken by another picture; returns where it is."""
    file.seek(0)
    digest, stem, number = _digest(file), path.stem, 1
    while path.exists() and not overwrite:
        with path.open("rb") as there:
            if _digest(there) == digest:
                return path
        path, number = path.with_name(f"{stem} ({number}){path.suffix}"), number + 1
    file.seek(0)
    with replacing(path) as beside, beside.open("wb") as target:
        while chunk := file.read(_CHUNK):
            target.write(chunk)
    return path


def _digest(file: BinaryIO) -> bytes:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.digest()


def _translations(folder: Path) -> dict[str, Any]:
    """ComfyUI's /i18n: main.json's keys, and the other files under their names, for each language."""
    found: dict[str, Any] = {}
    for language in sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ():
        texts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(language.glob("*.json"))}
        found[language.name] = {**texts.pop("main", {}), **texts}
    return found
