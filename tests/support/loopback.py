"""A server of a test's own on loopback, and what tests of remote rewards share."""

import contextlib
import http.server
import json
import threading

import pytest

from comfy_dancegrpo import settings
from comfy_dancegrpo.rewards import service
from comfy_dancegrpo.workflow.host import Host


class Server:
    """An HTTP server of a test: `answer(handler, body)` gives status, headers and bytes of an answer, or writes it and gives None.

    requests: the bodies, and most: how many calls were under way at once.
    """

    def __init__(self, answer, port=0):
        self.answer, self.requests, self.now, self.most = answer, [], 0, 0
        lock, outer = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    outer.requests.append((self, body))
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    found = outer.answer(self, body)
                    if found is not None:
                        status, headers, data = found
                        self.send_response(status)
                        for name, value in {"Content-Length": str(len(data)), **headers}.items():
                            self.send_header(name, value)
                        self.end_headers()
                        self.wfile.write(data)
                except OSError:
                    self.close_connection = True  # the client has gone
                finally:
                    with lock:
                        outer.now -= 1

            def log_message(self, *args):
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            def handle_error(self, *args):
                pass

        self._server = Quiet(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}/score"

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def as_json(value, status=200):
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


class Noting(Host):
    """Notes what is said; `folder` is its run's."""

    def __init__(self, folder=None):
        super().__init__()
        self.said, self.run_folder = [], folder

    def say(self, line):
        self.said.append(line)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """`mine(**settings)` writes the user's settings, which allow loopback; pauses between tries are short."""
    path = tmp_path / "settings.json"
    monkeypatch.setenv(settings.PATH, str(path))
    monkeypatch.delenv(settings.API_KEYS, raising=False)
    monkeypatch.setattr(service, "FIRST_PAUSE", 0.01)

    def write(**values):
        path.write_text(json.dumps({"allowed_hosts": ["127.0.0.1"], **values}))

    write()
    return write


@pytest.fixture
def serving():
    """`serving(answer)`: a `Server`, closed at the end."""
    with contextlib.ExitStack() as closed:

        def start(answer, port=0):
            server = Server(answer, port)
            closed.callback(server.close)
            return server

        yield start
