"""What the page asks about the program: nodes, models, features, the system, and what was said."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from aiohttp import web

from comfy_dancegrpo import __version__
from comfy_dancegrpo.workflow.schema import object_info

from .editor import Editor
from .files import Refused, read_object

_KINDS = ("checkpoints", "diffusers", "diffusion_models", "loras", "reward_models")  # model folders that our nodes read

# the worker tells what torch finds; the page takes the first of the list without looking whether there is one
_NOT_YET = {"name": "known after the first run", "type": "cpu", "index": 0, "vram_total": 0, "vram_free": 0, "torch_vram_total": 0,
            "torch_vram_free": 0}


def add(routes: web.RouteTableDef, editor: Editor) -> None:
    host = editor.host

    def read_nodes() -> tuple[str, list[str]]:
        found, left_out = {}, []
        for name, cls in editor.nodes.registry.items():
            try:
                found.update(object_info({name: cls}, editor.nodes.display_names))
            except Exception as error:  # noqa: BLE001 - as in ComfyUI, a node of another pack that cannot tell its inputs is left out
                left_out.append(f"node {name} cannot be shown: {type(error).__name__}: {error}")
        return json.dumps(found, default=str), left_out

    async def node_table() -> dict[str, Any]:
        table, left_out = await asyncio.to_thread(read_nodes)
        for line in left_out:
            editor.log.say(line)
        return json.loads(table)

    @routes.get("/object_info")
    async def every_node(request: web.Request) -> web.Response:
        return web.json_response(await node_table())

    @routes.get("/object_info/{name}")
    async def one_node(request: web.Request) -> web.Response:
        table, name = await node_table(), request.match_info["name"]
        return web.json_response({name: table[name]} if name in table else {})

    @routes.get("/features")
    async def features(request: web.Request) -> web.Response:
        return web.json_response(editor.features)

    @routes.get("/system_stats")
    async def system_stats(request: web.Request) -> web.Response:
        total, free = _memory()
        system = {"os": sys.platform, "ram_total": total, "ram_free": free, "comfyui_version": f"comfy-dancegrpo {__version__}",
                  "python_version": platform.python_version(), "pytorch_version": _version("torch"), "embedded_python": False, "argv": [],
                  "required_frontend_version": _version("comfyui_frontend_package")}
        return web.json_response({"system": system, "devices": editor.jobs.devices or [_NOT_YET]})

    @routes.get("/global_subgraphs")
    @routes.get("/node_replacements")
    async def none_of_these(request: web.Request) -> web.Response:
        return web.json_response({})

    @routes.get("/embeddings")
    async def embeddings(request: web.Request) -> web.Response:
        return web.json_response([])

    # -- models -----------------------------------------------------------------------------------------------------
    @routes.get("/models")
    async def kinds(request: web.Request) -> web.Response:
        return web.json_response(list(_KINDS))

    @routes.get("/models/{kind}")
    async def names(request: web.Request) -> web.Response:
        return web.json_response(host.list_models(_kind(request)))

    @routes.get("/experiment/models")
    async def folders(request: web.Request) -> web.Response:
        return web.json_response([{"name": kind, "folders": [str(f) for f in host.model_folders(kind)]} for kind in _KINDS])

    @routes.get("/experiment/models/{kind}")
    async def models(request: web.Request) -> web.Response:
        found = []
        for index, folder in enumerate(host.model_folders(_kind(request))):
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                stat = path.stat()
                found.append({"name": path.name, "pathIndex": index, "modified": stat.st_mtime, "created": stat.st_ctime, "size": stat.st_size})
        return web.json_response(found)

    # -- for the frontend alone -------------------------------------------------------------------------------------
    @routes.get("/internal/folder_paths")
    async def folder_paths(request: web.Request) -> web.Response:
        return web.json_response({kind: [os.path.abspath(f) for f in host.model_folders(kind)] for kind in _KINDS})

    @routes.get("/internal/files/{kind}")
    async def files(request: web.Request) -> web.Response:
        folder = editor.folders.get(request.match_info["kind"])
        if folder is None:
            raise Refused(400, "accepted: output, input or temp")
        found = [p for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
        return web.json_response([p.name for p in sorted(found, key=_modified, reverse=True)])

    @routes.get("/internal/logs")
    async def logs(request: web.Request) -> web.Response:
        return web.json_response("".join(f"{entry['t']} - {entry['m']}" for entry in editor.log.entries))

    @routes.get("/internal/logs/raw")
    async def raw_logs(request: web.Request) -> web.Response:
        return web.json_response({"entries": list(editor.log.entries), "size": editor.log.size})

    @routes.patch("/internal/logs/subscribe")
    async def subscribe(request: web.Request) -> web.Response:
        body = await read_object(request)
        editor.log.watch(str(body.get("clientId")), body.get("enabled"))
        return web.json_response({})


def _kind(request: web.Request) -> str:
    kind = request.match_info["kind"]
    if kind not in _KINDS:
        raise Refused(404, f"no models of kind {kind!r}")
    return kind


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _memory() -> tuple[int, int]:
    """This machine's memory and how much is free, in bytes; 0 where the system does not say it in this way."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0, 0
