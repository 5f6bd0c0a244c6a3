"""What the page keeps on the server: settings and saved workflows, all of it JSON, in the output folder's `user/`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from aiohttp import web

from comfy_dancegrpo.atomic import replacing

from .editor import Editor
from .files import Refused, file_in, new_file_in, path_in, read_json, read_object, send_media

_SETTINGS = "comfy.settings.json"
_DEFAULTS = {"Comfy.Notification.ShowVersionUpdates": False}  # else the page asks comfy.org for the news of ComfyUI
# While the page thinks it new, it opens an empty canvas; later it would open a graph of ComfyUI's nodes, which are not here.
_NEVER_KEPT = ("Comfy.TutorialCompleted",)
# asked for at every start; an answer of 404 would stand as an error in the browser's console
_EMPTY = {"user.css": ("text/css", ""), "comfy.templates.json": ("application/json", "[]"),
          "workflows/.index.json": ("application/json", '{"favorites": []}')}


def add(routes: web.RouteTableDef, editor: Editor) -> None:
    user = editor.user

    @routes.get("/users")
    async def users(request: web.Request) -> web.Response:
        return web.json_response({"storage": "server", "migrated": True})

    # -- settings ---------------------------------------------------------------------------------------------------
    @routes.get("/settings")
    async def settings(request: web.Request) -> web.Response:
        return web.json_response(_settings(user))

    @routes.get("/settings/{id}")
    async def setting(request: web.Request) -> web.Response:
        return web.json_response(_settings(user).get(request.match_info["id"]))

    @routes.post("/settings")
    async def change_settings(request: web.Request) -> web.Response:
        _change(user, await read_object(request))
        return web.json_response({})

    @routes.post("/settings/{id}")
    async def change_setting(request: web.Request) -> web.Response:
        _change(user, {request.match_info["id"]: await read_json(request)})
        return web.json_response({})

    # -- files ------------------------------------------------------------------------------------------------------
    @routes.get("/userdata")
    async def list_files(request: web.Request) -> web.Response:
        directory = request.query.get("dir", "")
        if not directory:
            raise Refused(400, "dir: missing, accepted: a folder of the user's")
        folder = path_in(user, directory)
        files = _files(folder, recurse=request.query.get("recurse", "").lower() == "true")
        if request.query.get("full_info", "").lower() == "true":
            return web.json_response([_info(path, folder) for path in files])
        names = [path.relative_to(folder).as_posix() for path in files]
        split = request.query.get("split", "").lower() == "true"
        return web.json_response([[name, *name.split("/")] for name in names] if split else names)

    @routes.get("/v2/userdata")
    async def list_all(request: web.Request) -> web.Response:
        wanted = request.query.get("path", "")
        folder = path_in(user, wanted) if wanted else user
        if wanted and not folder.is_dir():
            raise Refused(404, f"no folder {wanted!r}")
        found = _files(folder, recurse=True)
        folders = sorted({parent for path in found for parent in path.parents if folder in parent.parents})
        return web.json_response([
            *({"name": path.name, "path": path.relative_to(user).as_posix(), "type": "directory"} for path in folders),
            *({"name": path.name, **_info(path, user), "type": "file"} for path in found)])

    @routes.get("/userdata/{file}")
    async def read(request: web.Request) -> web.StreamResponse:
        name = request.match_info["file"]
        if name in _EMPTY and not path_in(user, name).is_file():
            kind, text = _EMPTY[name]
            return web.Response(text=text, content_type=kind)
        path = file_in(user, name)
        response = send_media(path)
        if path.suffix == ".json":
            response.headers["Content-Type"] = "application/json"
        return response

    @routes.post("/userdata/{file}")
    async def write(request: web.Request) -> web.Response:
        path = _json_file(user, request.match_info["file"])
        if path.exists() and request.query.get("overwrite", "true") == "false":
            raise Refused(409, f"{request.match_info['file']!r} is there already")
        await read_json(request)
        with replacing(path) as beside:
            beside.write_bytes(await request.read())
        return web.json_response(_told(request, path, user))

    @routes.delete("/userdata/{file}")
    async def delete(request: web.Request) -> web.Response:
        file_in(user, request.match_info["file"]).unlink()
        return web.Response(status=204)

    @routes.post("/userdata/{file}/move/{dest}")
    async def move(request: web.Request) -> web.Response:
        source, target = file_in(user, request.match_info["file"]), _json_file(user, request.match_info["dest"])
        if target.exists() and request.query.get("overwrite", "true") == "false":
            raise Refused(409, f"{request.match_info['dest']!r} is there already")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        return web.json_response(_told(request, target, user))


def _settings(user: Path) -> dict[str, Any]:
    try:
        kept = json.loads((user / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    return {**_DEFAULTS, **{key: value for key, value in kept.items() if key not in _NEVER_KEPT}}


def _change(user: Path, changes: dict[str, Any]) -> None:
    with replacing(user / _SETTINGS) as beside:
        beside.write_text(json.dumps({**_settings(user), **changes}, indent=1) + "\n", encoding="utf-8")


def _json_file(user: Path, name: str) -> Path:
    path = new_file_in(user, name)
    if path.suffix != ".json":
        raise Refused(400, f"found {name!r}, accepted: a name that ends with .json")
    return path


def _files(folder: Path, recurse: bool) -> list[Path]:
    """The files below a folder, by name; links that lead out of it are left out."""
    if not folder.is_dir():
        return []
    root = folder.resolve()
    found = folder.rglob("*") if recurse else folder.iterdir()
    return sorted(path for path in found if path.is_file() and path.resolve().is_relative_to(root))


def _info(path: Path, folder: Path) -> dict[str, Any]:
    found = path.stat()
    return {"path": path.relative_to(folder).as_posix(), "size": found.st_size, "modified": int(found.st_mtime * 1000),
            "created": int(found.st_ctime * 1000)}


def _told(request: web.Request, path: Path, user: Path) -> Any:
    full = request.query.get("full_info", "").lower() == "true"
    return _info(path, user) if full else path.relative_to(user).as_posix()
