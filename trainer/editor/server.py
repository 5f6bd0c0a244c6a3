"""The server: the application, its start and its end."""

from __future__ import annotations

import asyncio
import re
import secrets
from pathlib import Path
from urllib.parse import urlencode

from aiohttp import web

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.nodes.routes import add_routes
from comfy_dancegrpo.workflow.host import use
from comfy_dancegrpo.workflow.read import SavedWorkflow, read_workflow

from ..serving import listen, until_told, url
from ..session import Options
from . import routes_files, routes_info, routes_jobs, routes_user
from .editor import Editor
from .files import MOST_JSON
from .security import Gate, is_loopback


def make_app(editor: Editor, gate: Gate) -> web.Application:
    """Every route with and without /api, as in ComfyUI, and behind them the frontend's files."""
    routes = web.RouteTableDef()
    for module in (routes_jobs, routes_user, routes_files, routes_info):
        module.add(routes, editor)
    add_routes(routes, lambda: editor.output, lambda: editor.jobs.run)
    app = web.Application(middlewares=[gate.middleware], client_max_size=MOST_JSON)
    app.on_response_prepare.append(gate.prepare)
    app.add_routes(list(routes))
    app.add_routes([web.RouteDef(route.method, "/api" + route.path, route.handler, route.kwargs) for route in routes])
    routes_files.add_frontend(app, editor, lent=bool(editor.nodes.lent))
    return app


class Server:
    """One running editor at an address. `url` opens it, token and workflow included."""

    def __init__(self, editor: Editor, address: str = "127.0.0.1", port: int = 0, token: str | None = None):
        if token is None and not is_loopback(address):
            token = secrets.token_urlsafe(32)
        self.editor, self.address, self.port = editor, address, port
        self.gate = Gate(address, token)
        self._runner = web.AppRunner(make_app(editor, self.gate), access_log=None, handle_signals=False, shutdown_timeout=2)

    async def start(self) -> None:
        """Listens. Raises WorkflowError where the address or the port cannot be had."""
        self.port = await listen(self._runner, self.address, self.port, self.stop)

    @property
    def url(self) -> str:
        query = {"token": self.gate.token} if self.gate.token is not None else {}
        if self.editor.opened:
            query |= {"template": self.editor.opened[0], "source": routes_files.OPENED}  # read by the frontend itself
        return url(self.address, self.port) + (f"?{urlencode(query)}" if query else "")

    async def stop(self) -> None:
        """Stops what runs, keeping what was trained; cancelled, it does not wait for that."""
        try:
            await self.editor.close()
        finally:
            await self._runner.cleanup()


def opened(workflow: Path) -> tuple[str, SavedWorkflow]:
    """A workflow for the page to begin with, and a name for it. Raises WorkflowError for one that has no layout to draw."""
    saved = read_workflow(workflow)
    if saved.format != "ui":
        raise WorkflowError(f"{workflow}: found the API format, which has no layout, accepted here: the editor's JSON, or a PNG that holds it")
    return re.sub(r"[^\w.-]+", "_", workflow.stem, flags=re.ASCII).strip("._") or "workflow", saved


def serve(options: Options, workflow: Path | None, address: str, port: int, token: str | None) -> None:
    """Runs the editor until Ctrl-C. Raises WorkflowError for options that cannot be."""
    editor = Editor(options, opened(workflow) if workflow is not None else None)
    with use(editor.host):
        asyncio.run(_serve(Server(editor, address, port, token)))


async def _serve(server: Server) -> None:
    async def start() -> None:
        await server.start()
        print(f"The editor is at {server.url}", flush=True)

    def stopping() -> None:
        if server.editor.jobs.running is not None:
            server.editor.log.say("stopping the run, and keeping what was trained; Ctrl-C once more stops at once")

    await until_told(start, server.stop, stopping)
