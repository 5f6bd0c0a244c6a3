"""What the page asks of its server about runs: the same routes in ComfyUI and in the bundled editor. Needs aiohttp."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from comfy_dancegrpo.runs import live
from comfy_dancegrpo.runs.folder import name_problem

_PICTURE = re.compile(rf"[0-9]+-[0-9]+\.({'|'.join(live.KINDS)})")


def add_routes(routes: web.RouteTableDef, output_folder: Callable[[], Path], active: Callable[[], dict[str, Any] | None]) -> None:
    """Adds the panel's routes.

    Args:
        routes: of the server that will mount them, with and without its /api prefix.
        output_folder: gives the folder that holds the runs; nothing outside of it is read or written.
        active: gives the run that this server trains now ({"run", "node", "prompt_id", "iteration", "iterations"}), or None.
    """

    def folder(request: web.Request) -> Path:
        name = request.match_info["name"]
        if problem := name_problem(name, "name"):
            raise web.HTTPBadRequest(text=problem)
        return output_folder() / name

    async def state(request: web.Request) -> tuple[Path, dict[str, Any]]:
        path = folder(request)
        found = await asyncio.to_thread(live.read, path)
        if not found:
            raise web.HTTPNotFound(text=f"no run {path.name!r} in the output folder")
        return path, found

    @routes.get("/dancegrpo/runs")
    async def runs(request: web.Request) -> web.Response:
        return _json({"active": active(), "runs": await asyncio.to_thread(live.list_runs, output_folder())})

    @routes.get("/dancegrpo/runs/{name}")
    async def run(request: web.Request) -> web.Response:
        return _json((await state(request))[1])

    @routes.get("/dancegrpo/runs/{name}/live/{file}")
    async def picture(request: web.Request) -> web.Response:
        path, file = folder(request), request.match_info["file"]
        kind = _PICTURE.fullmatch(file)
        if not kind:
            raise web.HTTPNotFound(text="no such picture")
        try:
            data = await asyncio.to_thread((path / "live" / file).read_bytes)
        except OSError:
            if await asyncio.to_thread((path / "live").is_dir):  # the next iteration has taken its place: no fault, so none in the console
                return web.Response(status=204)
            raise web.HTTPNotFound(text="no such picture") from None
        return web.Response(body=data, content_type=live.KINDS[kind[1]], headers={"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"})

    @routes.post("/dancegrpo/runs/{name}/stop")
    async def stop(request: web.Request) -> web.Response:
        path, found = await state(request)
        if found["state"] not in ("running", "stopping"):
            raise web.HTTPConflict(text=f"run {path.name!r} is {found['state']}")
        await asyncio.to_thread(live.request_stop, path)
        return _json({"stopping": True})


def _json(value: Any) -> web.Response:
    return web.json_response(_finite(value), headers={"Cache-Control": "no-cache"})


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinities, which a diverged run has and JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
