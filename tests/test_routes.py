"""What the panel's routes answer, mounted as ComfyUI mounts them, and what they refuse."""

import asyncio
import http.client
import json
import threading

import pytest

pytest.importorskip("aiohttp")

from aiohttp import web  # noqa: E402
from aiohttp.test_utils import TestServer  # noqa: E402

from comfy_dancegrpo.nodes import routes  # noqa: E402
from comfy_dancegrpo.runs import live, lock  # noqa: E402

ACTIVE = {"run": "first", "node": "10", "prompt_id": "p", "iteration": 2, "iterations": 5}
JPEG = b"\xff\xd8 a picture"
WEBP = b"RIFF a video"
ROWS = [{"iteration": 1, "reward_mean": 0.25, "reward_std": 0.1}, {"iteration": 2, "reward_mean": float("nan"), "reward_std": 0.2}]
GROUP = {"prompt": "a red ring", "reward": "clip_score", "samples": [{"file": "2-0.jpg", "score": 0.5, "advantage": 1.0}]}


@pytest.fixture
def output(tmp_path):
    """An output folder with a running and a finished run, and files around it that are nobody's business."""
    for name, state, iterations in (("first", "running", 0), ("second run", "finished", 2)):
        run = tmp_path / "output" / name
        (run / "live").mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"state": state, "iterations": iterations}))
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        (run / "live" / "state.json").write_text(json.dumps({"iteration": 2, "iterations": 5, "seconds_left": 7.5, **GROUP}))
        (run / "live" / "2-0.jpg").write_bytes(JPEG)
        (run / "live" / "2-1.webp").write_bytes(WEBP)
        (run / "1-0.jpg").write_bytes(b"not live")
    (tmp_path / "live").mkdir()
    for secret in (tmp_path / "live" / "1-0.jpg", tmp_path / "output" / "1-0.jpg", tmp_path / "run.json"):
        secret.write_bytes(b"secret")
    (tmp_path / "output" / "plain").mkdir()
    running = lock.take(tmp_path / "output" / "first")
    yield tmp_path / "output"
    running.release()


@pytest.fixture
def ask(output):
    """`ask("GET", path)`: status, content type and body; the path is sent as it is written."""
    loop, told = asyncio.new_event_loop(), {"active": ACTIVE}

    async def start():
        table, app = web.RouteTableDef(), web.Application()
        routes.add_routes(table, lambda: output, lambda: told["active"])
        app.add_routes(table)
        app.add_routes([web.route(route.method, "/api" + route.path, route.handler) for route in table])  # as ComfyUI does
        server = TestServer(app, host="127.0.0.1")
        await server.start_server()
        return server

    threading.Thread(target=loop.run_forever, daemon=True).start()
    server = asyncio.run_coroutine_threadsafe(start(), loop).result(30)

    def send(method, path):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type", "").split(";")[0], answer.read()

    send.told = told
    yield send
    asyncio.run_coroutine_threadsafe(server.close(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)


def value(answer):
    """The JSON of an answer that went well; NaN and Infinity, which browsers do not read, are errors."""
    status, kind, body = answer
    assert (status, kind) == (200, "application/json")
    return json.loads(body, parse_constant=lambda word: pytest.fail(f"{word} in the answer"))


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_answers(ask, output, prefix):
    listed = value(ask("GET", f"{prefix}/dancegrpo/runs"))
    assert listed["active"] == ACTIVE and {r["name"]: r["state"] for r in listed["runs"]} == {"first": "running", "second run": "finished"}
    run = value(ask("GET", f"{prefix}/dancegrpo/runs/first"))
    assert run["columns"]["reward_mean"] == [0.25, None] and run["columns"]["reward_std"] == [0.1, 0.2]
    assert (run["state"], run["iteration"], run["iterations"], run["seconds_left"], run["group"]) == ("running", 2, 5, 7.5, GROUP)
    assert value(ask("GET", f"{prefix}/dancegrpo/runs/second%20run"))["state"] == "finished"
    assert ask("GET", f"{prefix}/dancegrpo/runs/first/live/2-0.jpg") == (200, "image/jpeg", JPEG)
    assert ask("GET", f"{prefix}/dancegrpo/runs/first/live/2-1.webp") == (200, "image/webp", WEBP)


def test_a_run_whose_process_is_gone(ask, output):
    (output / "second run" / "run.json").write_text(json.dumps({"state": "running", "iterations": 1}))
    assert {r["name"]: r["state"] for r in value(ask("GET", "/dancegrpo/runs"))["runs"]} == {"first": "running", "second run": "interrupted"}
    run = value(ask("GET", "/dancegrpo/runs/second%20run"))
    assert (run["state"], run["kept"], run["seconds_left"]) == ("interrupted", 1, None)
    assert ask("POST", "/dancegrpo/runs/second%20run/stop")[0] == 409
    assert not (output / "second run" / "live" / "stop").exists()


def test_no_active_run(ask):
    ask.told["active"] = None
    assert value(ask("GET", "/dancegrpo/runs"))["active"] is None


def test_stop(ask, output):
    assert value(ask("POST", "/dancegrpo/runs/first/stop")) == {"stopping": True}
    assert (output / "first" / "live" / "stop").exists()
    assert value(ask("GET", "/dancegrpo/runs/first"))["state"] == "stopping"
    assert value(ask("POST", "/dancegrpo/runs/first/stop")) == {"stopping": True}  # twice is once
    assert ask("POST", "/dancegrpo/runs/second%20run/stop")[0] == 409
    assert not (output / "second run" / "live" / "stop").exists()
    assert ask("GET", "/dancegrpo/runs/first/stop")[0] == 405  # a link or a picture's address stops nothing


@pytest.mark.parametrize("name", ["none", "plain"])
def test_unknown_runs(ask, output, name):
    before = sorted(output.rglob("*"))
    for method, path in (("GET", f"/dancegrpo/runs/{name}"), ("GET", f"/dancegrpo/runs/{name}/live/1-0.jpg"), ("POST", f"/dancegrpo/runs/{name}/stop")):
        assert ask(method, path)[0] == 404
    assert sorted(output.rglob("*")) == before


@pytest.mark.parametrize("name", ["..", "%2e%2e", ".%2E", "..%2f..", "%2Fetc", "%252e%252e", "..%5C..", "C%3A", "nul", "first%00", "first%2e", "first%20"])
def test_bad_names(ask, output, name):
    before = sorted(output.parent.rglob("*"))
    for method, path in (("GET", f"/dancegrpo/runs/{name}"), ("GET", f"/dancegrpo/runs/{name}/live/1-0.jpg"), ("POST", f"/dancegrpo/runs/{name}/stop")):
        status, _, body = ask(method, path)
        assert status in (400, 404) and b"secret" not in body
    assert sorted(output.parent.rglob("*")) == before


def test_a_bad_name_is_told(ask):
    status, _, body = ask("GET", "/dancegrpo/runs/..%2fx")
    assert status == 400 and b"accepted: letters, digits" in body


@pytest.mark.parametrize("file", ["state.json", "..%2F1-0.jpg", "../1-0.jpg", "..%5C1-0.jpg", "2-0.jpg%0A", "2-0.jpg%00", "2-0.JPG", "a-0.jpg",
                                  "%D9%A2-0.jpg", "2-0.jpg/", "..%2F..%2F..%2Flive%2F1-0.jpg", ""])
def test_wrong_files(ask, file):
    assert ask("GET", f"/dancegrpo/runs/first/live/{file}")[0] == 404


def test_a_picture_that_the_next_iteration_has_replaced(ask):
    assert ask("GET", "/dancegrpo/runs/first/live/1-0.jpg")[::2] == (204, b"")


def test_a_damaged_run_is_none(ask, output):
    (output / "first" / "run.json").write_text("{")
    assert live.read(output / "first") == {} and ask("GET", "/dancegrpo/runs/first")[0] == 404
    assert [r["name"] for r in value(ask("GET", "/dancegrpo/runs"))["runs"]] == ["second run"]
