"""The WebSockets of the open pages: who they are, and what is sent to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from typing import Any

from aiohttp import WSMsgType, web

MOST_PAGES = 64
_MOST_WAITING = 2000  # messages for a page that does not read; it is cut off, and comes back for the state as it is then
_LARGEST_MESSAGE = 64 * 1024


class Hub:
    """Sends a message to every page, or to one by its client id. Belongs to the event loop's thread."""

    def __init__(self, features: dict[str, Any]):
        self._features = features
        self._pages: dict[str, asyncio.Queue[str | None]] = {}

    @property
    def full(self) -> bool:
        return len(self._pages) >= MOST_PAGES

    def send(self, event: str, data: Any, client_id: str | None = None) -> None:
        """To every page, or to one; to a page that is not there it is lost, as in ComfyUI."""
        text = json.dumps({"type": event, "data": data})
        for waiting in list(self._pages.values()) if client_id is None else [self._pages.get(client_id)]:
            if waiting is not None:
                self._put(waiting, text)

    async def serve(self, request: web.Request, greeting: Any) -> web.WebSocketResponse:
        """Holds a page's socket until it closes; `greeting(client_id)` gives the messages that it begins with."""
        socket = web.WebSocketResponse(max_msg_size=_LARGEST_MESSAGE, heartbeat=30)
        await socket.prepare(request)
        client_id = request.query.get("clientId") or uuid.uuid4().hex
        waiting: asyncio.Queue[str | None] = asyncio.Queue(_MOST_WAITING)
        former, self._pages[client_id] = self._pages.get(client_id), waiting
        if former is not None:  # the page was loaded again
            self._put(former, None)
        for event, data in greeting(client_id):
            self._put(waiting, json.dumps({"type": event, "data": data}))
        writer = asyncio.create_task(self._write(socket, waiting))
        try:
            async for message in socket:
                if message.type == WSMsgType.TEXT and _is_feature_flags(message.data):
                    self._put(waiting, json.dumps({"type": "feature_flags", "data": self._features}))
        finally:
            writer.cancel()
            if self._pages.get(client_id) is waiting:
                del self._pages[client_id]
        return socket

    def close(self) -> None:
        for waiting in self._pages.values():
            self._put(waiting, None)

    @staticmethod
    def _put(waiting: asyncio.Queue, text: str | None) -> None:
        if waiting.full() or text is None:
            while not waiting.empty():
                waiting.get_nowait()
            text = None
        waiting.put_nowait(text)

    @staticmethod
    async def _write(socket: web.WebSocketResponse, waiting: asyncio.Queue) -> None:
        with contextlib.suppress(ConnectionError, RuntimeError):
            while (text := await waiting.get()) is not None:
                await socket.send_str(text)
            await socket.close()


def _is_feature_flags(text: str) -> bool:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(message, dict) and message.get("type") == "feature_flags"
