"""The server: the application, its start and its end."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import signal
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from aiohttp import web

from comfy_dancegrpo.errors import WorkflowError
from comfy_dancegrpo.nodes.routes import add_routes
from comfy_dancegrpo.workflow.host import use
from comfy_dancegrpo.workflow.read import SavedWorkflow, read_workflow

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
        await self._runner.setup()
        try:
            site = web.TCPSite(self._runner, self.address, self.port)
            await site.start()
        except (OSError, OverflowError) as error:
            await self.stop()
            raise WorkflowError(f"cannot listen on {self.address}, port {self.port}: {getattr(error, 'strerror', None) or error}; "
                                "choose another with --port and --listen") from None
        self.port = self._runner.addresses[0][1]

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.address, f"[{self.address}]" if ":" in self.address else self.address)
        query = {"token": self.gate.token} if self.gate.token is not None else {}
        if self.editor.opened:
            query |= {"template": self.editor.opened[0], "source": routes_files.OPENED}  # read by the frontend itself
        return f"http://{host}:{self.port}/" + (f"?{urlencode(query)}" if query else "")

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
    """The first signal stops in good order, a second at once."""
    loop, signals = asyncio.get_running_loop(), asyncio.Queue()

    def told(signum: int, frame: Any) -> None:
        loop.call_soon_threadsafe(signals.put_nowait, signum)

    previous = {s: signal.signal(s, told) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        await server.start()
        print(f"The editor is at {server.url}", flush=True)
        await signals.get()
        stopping = asyncio.create_task(server.stop())
        if server.editor.jobs.running is not None:
            server.editor.log.say("stopping the run, and keeping what was trained; Ctrl-C once more stops at once")
        again = asyncio.create_task(signals.get())
        await asyncio.wait({stopping, again}, return_when=asyncio.FIRST_COMPLETED)
        for task in (stopping, again):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stopping
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
