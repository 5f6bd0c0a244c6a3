"""What the program's servers share: where they listen, and serving until the user has had enough."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from comfy_dancegrpo.errors import WorkflowError


async def listen(runner: web.AppRunner, address: str, port: int, stop: Callable[[], Awaitable[None]]) -> int:
    """Listens; returns the port, which for 0 is any that is free. Raises WorkflowError, after `stop()`, where address or port cannot be had."""
    await runner.setup()
    try:
        await web.TCPSite(runner, address, port).start()
    except (OSError, OverflowError) as error:
        await stop()
        raise WorkflowError(f"cannot listen on {address}, port {port}: {getattr(error, 'strerror', None) or error}; "
                            "choose another with --port and --listen") from None
    return runner.addresses[0][1]


def url(address: str, port: int) -> str:
    """Where this machine finds what listens there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, f"[{address}]" if ":" in address else address)
    return f"http://{host}:{port}/"


async def until_told(start: Callable[[], Awaitable[None]], stop: Callable[[], Awaitable[None]], stopping: Callable[[], None] = lambda: None) -> None:
    """`start()`, and at the first SIGINT or SIGTERM `stop()`, in good order; a second ends it at once. `stopping` may tell the user meanwhile."""
    loop, signals = asyncio.get_running_loop(), asyncio.Queue()

    def told(signum: int, frame: Any) -> None:
        loop.call_soon_threadsafe(signals.put_nowait, signum)

    previous = {s: signal.signal(s, told) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        await start()
        await signals.get()
        ending = asyncio.create_task(stop())
        stopping()
        again = asyncio.create_task(signals.get())
        await asyncio.wait({ending, again}, return_when=asyncio.FIRST_COMPLETED)
        for task in (ending, again):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ending
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
