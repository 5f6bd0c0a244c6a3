"""What the editor says: on stderr, in the page's log view, and to the pages that watch it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import Any

_KEPT = 500  # lines


class Log:
    def __init__(self, send: Callable[..., None]):
        self._send = send
        self.entries: deque[dict[str, str]] = deque(maxlen=_KEPT)
        self.watchers: set[str] = set()
        self.size = {"cols": 120, "row": 40, "rows": 40}

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        entry = {"t": datetime.now().isoformat(), "m": line + "\n"}
        self.entries.append(entry)
        for client_id in self.watchers:
            self._send("logs", {"entries": [entry], "size": self.size}, client_id)

    def watch(self, client_id: str, enabled: Any) -> None:
        self.watchers.add(client_id) if enabled and len(self.watchers) < 64 else self.watchers.discard(client_id)
