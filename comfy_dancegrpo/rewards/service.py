"""Calls a service over HTTP: JSON to one address, over several connections, each answer checked, tried again with growing pauses.

With the standard library alone. Nothing is followed (redirects), nothing is unpickled, and no more of an answer is read than `MOST_ANSWER`.
"""

from __future__ import annotations

import http.client
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .. import __version__, addresses, settings
from ..addresses import Address
from ..errors import RunError
from ..workflow.host import host

T = TypeVar("T")
MOST_ANSWER = 2**20  # bytes
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds; each is twice the one before
_TRY_AGAIN = (408, 425, 429)  # and all from 500 on
_TICK = 0.2  # seconds between two looks at the clock and at the stop button


class Trouble(Exception):
    """A call that failed, in one line. answer: what came, as text. final: trying again is of no use. status: HTTP's, where there was one."""

    def __init__(self, line: str, answer: str = "", final: bool = False, status: int | None = None):
        super().__init__(line)
        self.answer, self.final, self.status = answer, final, status


class CallFailed(RunError):
    """A call that failed for good. index: which of them; answer and status: as `Trouble` has them."""

    def __init__(self, line: str, index: int, trouble: Trouble):
        super().__init__(line)
        self.index, self.answer, self.status = index, trouble.answer, trouble.status


@dataclass(frozen=True)
class Service:
    """connections: calls under way at once. timeout: seconds that a call may take, its answer included. retries: after the first try."""

    address: Address
    connections: int = 8
    timeout: float = 60.0
    retries: int = 5

    def post_all(self, bodies: Sequence[Callable[[], dict[str, Any]]], read: Callable[[int, Any], T]) -> list[T]:
        """What `read(index, answer)` makes of the answer, as JSON, to each body; both may be called in any thread, and `read` raises
        `Trouble` for an answer that is none. A body is made when it is sent: not all pictures are held twice.

        Raises `CallFailed` for the first call that failed for good, `RunError` where the user has not allowed the host.
        """
        addresses.check(self.address)
        return _Calls(self, bodies, read).results()


class _NobodyWaits(Exception):
    """Another call has failed for good, or the user has stopped the run."""


class _Calls(Generic[T]):
    """The calls of one `post_all`: threads that take one after another, watched by the thread that waits for them."""

    def __init__(self, service: Service, bodies: Sequence[Callable[[], dict[str, Any]]], read: Callable[[int, Any], T]):
        self._service, self._bodies, self._read = service, bodies, read
        self._todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(bodies)):
            self._todo.put(index)
        self._events: queue.SimpleQueue[Exception | str | None] = queue.SimpleQueue()  # a call done, one that failed, a line to say
        self._found: dict[int, T] = {}
        self._over = threading.Event()
        self._key = addresses.api_key(service.address)

    def results(self) -> list[T]:
        connections = [_Connection(self._service, self._key) for _ in range(min(self._service.connections, len(self._bodies)))]
        for connection in connections:  # daemons: one that hangs in a look-up of a name must not keep the program
            threading.Thread(target=self._work, args=(connection,), daemon=True).start()
        said: set[str] = set()
        try:
            while len(self._found) < len(self._bodies):
                host().check_interrupt()
                for connection in connections:
                    connection.break_if_late()
                try:
                    event = self._events.get(timeout=_TICK)
                except queue.Empty:
                    continue
                if isinstance(event, Exception):
                    raise event
                if event is not None and event not in said:
                    said.add(event)
                    host().say(event)
        finally:
            self._over.set()
            for connection in connections:
                connection.break_off()
        return [self._found[index] for index in range(len(self._bodies))]

    def _work(self, connection: _Connection) -> None:
        try:
            while not self._over.is_set():
                index = self._todo.get_nowait()
                self._found[index] = self._one(index, connection)
                self._events.put(None)
        except (queue.Empty, _NobodyWaits):
            pass
        except Exception as error:  # told by the thread that waits
            self._events.put(error)
        finally:
            connection.close()

    def _one(self, index: int, connection: _Connection) -> T:
        body = json.dumps(self._bodies[index](), allow_nan=False).encode()
        pause, tries = FIRST_PAUSE, self._service.retries + 1
        for number in range(1, tries + 1):
            try:
                return self._read(index, _parsed(connection.post(body)))
            except Trouble as trouble:
                line = f"{self._service.address}: {trouble}"
                if trouble.final or number == tries:
                    raise CallFailed(line + (f" ({tries} tries)" if number > 1 else ""), index, trouble) from None
            self._events.put(f"{line}; it is tried again")
            if self._over.wait(pause):
                raise _NobodyWaits
            pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError("unreachable")


class _Connection:
    """One connection, opened when it is needed, and again after a fault. `break_if_late` and `break_off` come from another thread."""

    def __init__(self, service: Service, key: str | None):
        self._service, self._http, self._socket = service, None, None
        self._deadline = float("inf")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": f"comfy_dancegrpo/{__version__}",
                         **({"Authorization": f"Bearer {key}"} if key else {})}

    def post(self, body: bytes) -> bytes:
        """The answer's body. Raises `Trouble`."""
        self._deadline = time.monotonic() + self._service.timeout
        reused = self._http is not None
        try:
            try:
                return self._post(body)
            except (ConnectionError, http.client.RemoteDisconnected):
                if not reused or self._late:
                    raise
                self.close()  # the server had closed it in the meantime: that is no fault
                return self._post(body)
        except Trouble:
            self.close()
            raise
        except Exception as error:  # a socket that another thread shut down fails in many ways
            self.close()
            if self._late or isinstance(error, TimeoutError):
                raise Trouble(f"no answer within {self._service.timeout:g} s") from None
            raise Trouble(_in_words(error)) from None
        finally:
            self._deadline = float("inf")

    @property
    def _late(self) -> bool:
        return time.monotonic() >= self._deadline

    def _post(self, body: bytes) -> bytes:
        address = self._service.address
        if self._http is None:
            make = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
            self._http = make(address.place.host, address.place.port, timeout=self._service.timeout)
            self._http.connect()
            self._socket = self._http.sock
        self._http.request("POST", address.path, body, self._headers)
        response = self._http.getresponse()
        if (response.length or 0) > MOST_ANSWER:
            raise Trouble(f"its answer is of {response.length} bytes, accepted: at most {MOST_ANSWER}")
        answer = response.read() if response.length is not None else response.read(MOST_ANSWER + 1)  # the former knows when it breaks off
        if self._late:
            raise TimeoutError
        if len(answer) > MOST_ANSWER:
            raise Trouble(f"its answer is of more than {MOST_ANSWER} bytes, which is the most that is accepted", shown(answer))
        if response.will_close:
            self.close()
        if 300 <= response.status < 400:
            raise Trouble(f"it redirects to {shown(response.headers.get('Location', ''))!r}, which is not followed; accepted: an address that "
                          "answers itself, and that the user has allowed", shown(answer), final=True, status=response.status)
        if response.status != 200:
            final = response.status < 500 and response.status not in _TRY_AGAIN
            key = f'; a key for it goes into "api_keys" of {settings.path()}' if response.status in (401, 403) else ""
            raise Trouble(f"it answers {response.status}{_reason(answer)}{key}", shown(answer), final, response.status)
        return answer

    def break_if_late(self) -> None:
        if self._late:
            self.break_off()

    def break_off(self) -> None:
        """Wakes the thread that waits for this connection, with an error."""
        try:
            if self._socket is not None:
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed already

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
        self._http = self._socket = None


def shown(text: bytes | str, most: int = 300) -> str:
    """A stranger's text in one line that a terminal may print."""
    text = text[: 4 * most].decode(errors="replace") if isinstance(text, bytes) else text
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))[:most]


def _parsed(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        raise Trouble(f"its answer is not JSON: {shown(answer, 80)!r}", shown(answer)) from None


def _reason(answer: bytes) -> str:
    """What an answer says is wrong: as `{"error": {"message": …}}`, `{"error": …}` or `{"detail": …}`, or its text."""
    try:
        found = json.loads(answer)
        for name in ("error", "detail", "message"):
            found = found.get(name, found) if isinstance(found, dict) else found
        text = found if isinstance(found, str) else json.dumps(found)
    except (ValueError, RecursionError):
        text = answer
    return f": {said}" if (said := shown(text, 200)) else ""


def _in_words(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "its host's name is not known"
    if isinstance(error, http.client.RemoteDisconnected):
        return "it closes the connection without an answer"
    if isinstance(error, http.client.IncompleteRead):
        return "its answer breaks off"
    if isinstance(error, OSError):
        return shown(error.strerror or str(error) or type(error).__name__)
    return shown(f"{type(error).__name__}: {error}")
