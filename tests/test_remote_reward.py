"""Remote rewards over loopback: what is sent, what is refused in one line, and a server that goes and comes back in the middle of a run."""

import base64
import io
import json
import re
import shlex
import socket
import threading
import time

import av
import pytest
import torch
from loopback import Noting, Server, as_json
from PIL import Image

from comfy_dancegrpo import settings
from comfy_dancegrpo.addresses import Address
from comfy_dancegrpo.errors import Interrupted, RunError
from comfy_dancegrpo.prompts import Prompt, Reference
from comfy_dancegrpo.rewards import remote, service
from comfy_dancegrpo.rewards.service import Service
from comfy_dancegrpo.workflow.host import use


def decoded(sample):
    """The picture of a sample, [H, W, 3] in 8 bits."""
    return torch.frombuffer(bytearray(Image.open(io.BytesIO(base64.b64decode(sample["png"]))).tobytes()), dtype=torch.uint8)


def scores(request, of=lambda sample: float(decoded(sample)[0])):
    """A good answer: of each picture its first byte."""
    return {"protocol": "dancegrpo-reward", "version": 1, "name": "first_byte", "count": request["count"],
            "scores": [of(sample) for sample in request["samples"]]}


def honest(handler, body):
    return as_json(scores(json.loads(body)))


pytestmark = pytest.mark.usefixtures("mine")
PICTURES = torch.randint(256, (1000, 4, 4, 3), generator=torch.Generator().manual_seed(0)) / 255
PROMPTS = [f"picture {n}" for n in range(1000)]


def reward_at(address, batch_size=8, connections=8, timeout=10.0, retries=2, name="", **options):
    return remote.load(Service(Address.parse(address), connections, timeout, retries), name, batch_size, **options)


# -- what is sent -------------------------------------------------------------------------------------------------------
def test_a_thousand_pictures_through_eight_connections(serving):
    first, all_eight = iter(range(8)), threading.Barrier(8)

    def together(handler, body):
        if next(first, None) is not None:
            all_eight.wait(30)  # breaks, and the calls with it, where fewer come at once
        return honest(handler, body)

    server = serving(together)
    start = time.perf_counter()
    found = reward_at(server.address, batch_size=2)(PICTURES, PROMPTS)
    print(f"\n1000 pictures in {len(server.requests)} calls, {server.most} at once: {time.perf_counter() - start:.2f} s")
    assert torch.equal(found, (PICTURES[:, 0, 0, 0] * 255).round())
    assert len(server.requests) == 500 and server.most == 8
    assert len({handler.client_address for handler, _ in server.requests}) == 8  # each connection is used again
    assert sorted(sample["prompt"] for _, body in server.requests for sample in json.loads(body)["samples"]) == sorted(PROMPTS)


def test_a_request_is_what_the_protocol_says(serving, mine):
    mine(api_keys={"127.0.0.1": "a key"})
    server = serving(honest)
    reference = Image.new("RGB", (3, 2), (1, 2, 3))
    reward_at(server.address, name="first_byte")(PICTURES[:2], ["a", Prompt("b", Reference("r", "k", lambda: reference))])
    ((handler, body),) = server.requests
    request = json.loads(body)
    assert {key: request[key] for key in ("protocol", "version", "name", "count")} == {
        "protocol": "dancegrpo-reward", "version": 1, "name": "first_byte", "count": 2}
    assert [sorted(sample) for sample in request["samples"]] == [["png", "prompt"], ["png", "prompt", "reference_png"]]
    sent = torch.stack([decoded(sample) for sample in request["samples"]]).view(2, 4, 4, 3)
    assert torch.equal(sent, (PICTURES[:2] * 255).round().byte())
    assert Image.open(io.BytesIO(base64.b64decode(request["samples"][1]["reference_png"]))).getpixel((2, 1)) == (1, 2, 3)
    assert handler.headers["Authorization"] == "Bearer a key" and handler.headers["Content-Type"] == "application/json"


def test_videos_are_sent_as_mp4_and_one_frame_as_a_picture(serving):
    server = serving(lambda handler, body: as_json(scores(json.loads(body), lambda sample: 1.0)))
    ramp = torch.linspace(0.2, 0.8, 9).view(9, 1, 1, 1).expand(9, 32, 48, 3)
    reward_at(server.address, fps=12)([ramp, ramp[:1]], ["a", "b"])
    video, picture = json.loads(server.requests[0][1])["samples"]
    assert video["fps"] == 12 and sorted(picture) == ["png", "prompt"]
    with av.open(io.BytesIO(base64.b64decode(video["mp4"]))) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 12
    assert torch.allclose(torch.stack(frames) / 255, ramp, atol=3 / 255)


# -- what is refused ----------------------------------------------------------------------------------------------------
def of_request(change):
    return lambda handler, body: as_json({**scores(json.loads(body)), **change(json.loads(body))})


def drip(handler, body):
    """An answer that never ends: a byte now and then."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def hundred_megabytes(handler, body):
    handler.send_response(200)
    handler.send_header("Connection", "close")  # without its length: it must be read to be known
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" " * 2**20)
    handler.close_connection = True


def closes(handler, body):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


FAULTS = {
    # what the server does: (its answer, what the line holds, how often it is asked with 2 retries)
    "hangs": (lambda handler, body: time.sleep(1.5), "no answer within 0.4 s (3 tries)", 3),
    "drips": (drip, "no answer within 0.4 s (3 tries)", 3),
    "too few": (of_request(lambda r: {"scores": [1.0]}), "its answer has 1 scores, and counts 2, for 2 pictures", 3),
    "too many": (of_request(lambda r: {"scores": [1.0] * 3, "count": 3}), "its answer has 3 scores, and counts 3, for 2 pictures", 3),
    "lies about the count": (of_request(lambda r: {"count": 5}), "its answer has 2 scores, and counts 5, for 2 pictures", 3),
    "no scores": (of_request(lambda r: {"scores": "1, 2"}), "its answer has no list of scores", 3),
    "NaN": (of_request(lambda r: {"scores": [1.0, float("nan")]}), "its answer has the score nan for picture 2 of 2, accepted: finite numbers", 3),
    "infinity": (of_request(lambda r: {"scores": [float("-inf"), 1.0]}), "the score -inf for picture 1 of 2", 3),
    "beyond float32": (of_request(lambda r: {"scores": [1.0, 10**400]}), "the score 1000", 3),
    "null": (of_request(lambda r: {"scores": [1.0, None]}), "the score None for picture 2 of 2", 3),
    "true": (of_request(lambda r: {"scores": [1.0, True]}), "the score True for picture 2 of 2", 3),
    "another protocol": (of_request(lambda r: {"version": 2}), "its answer is not of protocol 'dancegrpo-reward', version 1", 3),
    "another reward": (of_request(lambda r: {"name": "second_byte"}), "it answers for the reward 'second_byte', asked was 'first_byte'", 3),
    "a list": (lambda handler, body: as_json([1, 2]), "its answer is not of protocol 'dancegrpo-reward', version 1", 3),
    "not JSON": (lambda handler, body: (200, {}, b"<html>\n\x1b[31mSorry"), "its answer is not JSON: '<html>  [31mSorry'", 3),
    "deep": (lambda handler, body: (200, {}, b"[" * 100_000), "its answer is not JSON: '[[[", 3),
    "100 MB": (hundred_megabytes, "its answer is of more than 1048576 bytes, which is the most that is accepted", 3),
    "100 MB, as it says": (lambda handler, body: (200, {"Content-Length": str(10**8)}, b" "), "its answer is of 100000000 bytes, accepted: at most 1048576", 3),
    "closes": (closes, "it closes the connection without an answer", 3),
    "breaks off": (lambda handler, body: (200, {"Content-Length": "100", "Connection": "close"}, b"{"), "its answer breaks off", 3),
    "is broken": (lambda handler, body: as_json({"error": {"message": "out of\nmemory"}}, 500), "it answers 500: out of memory", 3),
    "is busy": (lambda handler, body: as_json({"detail": "too many"}, 429), "it answers 429: too many", 3),
    "refuses": (lambda handler, body: as_json({"error": "which reward?"}, 404), "it answers 404: which reward?", 1),
    "wants a key": (lambda handler, body: as_json({}, 401), '; a key for it goes into "api_keys" of ', 1),
    "redirects": (lambda handler, body: (307, {"Location": "http://elsewhere.example/score"}, b""),
                  "it redirects to 'http://elsewhere.example/score', which is not followed", 1),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_server_that_misbehaves_is_one_line_and_what_it_was_sent_is_kept(serving, tmp_path, what):
    answer, said, asked = FAULTS[what]
    server = serving(answer)
    timeout = 0.4 if "no answer" in said else 10.0
    with use(Noting(tmp_path)) as host, pytest.raises(RunError) as raised:
        reward_at(server.address, timeout=timeout, name="first_byte")(PICTURES[:2], PROMPTS[:2])
    (line,) = str(raised.value).splitlines()
    print(f"\n{what}: {line}")
    assert line.startswith(f"reward 'first_byte': {server.address}: ") and said in line and line.isprintable()
    assert len(server.requests) == asked and len(host.said) == (asked > 1)
    evidence = tmp_path / "failed_reward" / "first_byte-1"
    record = json.loads((evidence / "fault.json").read_text())
    assert line.endswith(f"; what it was given is in {evidence}") and len(line) < 700 + len(str(evidence)) and len(record["answer"]) <= 300
    assert [sample["prompt"] for sample in record["samples"]] == PROMPTS[:2]
    assert torch.equal(torch.frombuffer(bytearray(Image.open(evidence / record["samples"][1]["file"]).tobytes()), dtype=torch.uint8),
                       (PICTURES[1] * 255).round().byte().flatten())


def test_no_server_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/score"
        with pytest.raises(RunError, match=re.escape(f"reward 'remote': {address}: ") + r".*refused \(3 tries\)$"):
            reward_at(address)(PICTURES[:2], PROMPTS[:2])


def test_of_several_batches_the_one_that_failed_is_kept(serving, tmp_path):
    def but_one(handler, body):
        request = json.loads(body)
        wrong = any(sample["prompt"] == "picture 13" for sample in request["samples"])
        return as_json({**scores(request), "scores": []} if wrong else scores(request))

    with use(Noting(tmp_path)), pytest.raises(RunError):
        reward_at(serving(but_one).address)(PICTURES[:40], PROMPTS[:40])
    record = json.loads((tmp_path / "failed_reward/remote-1/fault.json").read_text())
    assert [sample["prompt"] for sample in record["samples"]] == PROMPTS[8:16]


def test_a_host_that_is_not_allowed_is_not_called(serving, monkeypatch, tmp_path):
    server = serving(honest)
    reward = reward_at(server.address)
    monkeypatch.setenv(settings.PATH, str(tmp_path / "none.json"))
    with pytest.raises(RunError, match=f"found the host 127.0.0.1:{server.port}, which the user has not allowed"):
        reward(PICTURES[:2], PROMPTS[:2])
    assert server.requests == []


def test_a_redirect_to_another_host_is_not_followed(serving):
    other = serving(honest)
    server = serving(lambda handler, body: (308, {"Location": other.address}, b""))
    with pytest.raises(RunError, match="redirects"):
        reward_at(server.address)(PICTURES[:2], PROMPTS[:2])
    assert other.requests == []


def test_faults_that_pass_cost_nothing_but_time(serving):
    """Of every call the first try fails, in five ways."""
    seen, ways = set(), [closes, FAULTS["not JSON"][0], FAULTS["NaN"][0], FAULTS["is broken"][0], FAULTS["too few"][0]]

    def at_first(handler, body):
        first = body not in seen
        seen.add(body)
        return ways[len(seen) % 5](handler, body) if first else honest(handler, body)

    with use(Noting()) as host:
        found = reward_at(serving(at_first).address)(PICTURES[:200], PROMPTS[:200])
    assert torch.equal(found, (PICTURES[:200, 0, 0, 0] * 255).round())
    assert host.said and len(host.said) == len(set(host.said)) and all(line.endswith("; it is tried again") for line in host.said)


def test_a_stop_ends_a_call_that_hangs(serving):
    class Stopping(Noting):
        def check_interrupt(self):
            raise Interrupted("stopped")

    server, start = serving(lambda handler, body: time.sleep(1)), time.perf_counter()
    with use(Stopping()), pytest.raises(Interrupted):
        reward_at(server.address, timeout=60)(PICTURES[:16], PROMPTS[:16])
    assert time.perf_counter() - start < 0.9


# -- in a run -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def remote_loop(loop_only):
    """`remote_loop(address, ...)`: the quickstart's loop with its reward from there."""
    def make(address, **inputs):
        loop_only["3"] = {"class_type": "DanceGRPORemoteReward", "inputs": {
            "address": address, "reward": "", "batch_size": 2, "connections": 2, "timeout": 5.0, "retries": 2, **inputs}}
        return loop_only
    return make


def mean(handler, body):
    return as_json(scores(json.loads(body), lambda sample: float(decoded(sample).float().mean())))


def loras(folder):
    from safetensors.torch import load_file

    (path,) = (folder / "lora").iterdir()
    return load_file(path)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_workflow_does_not_choose_the_host(cli, saved, tiny_loop, tmp_path, monkeypatch, remote_loop):
    monkeypatch.setenv(settings.PATH, str(tmp_path / "none.json"))
    flow = saved(remote_loop("http://127.0.0.1:9/score"))
    for command in ("run", "validate"):
        done = cli(command, flow, "--output", tmp_path, *tiny_loop)
        (line,) = done.verdict
        assert done.status == 2 and 'node 3 "Remote Reward"' in line and 'input "address": found the host 127.0.0.1:9,' in line
        assert '"--allow-host 127.0.0.1:9"' in line and str(tmp_path / "none.json") in line
    assert not (tmp_path / "quickstart").exists()
    assert cli("validate", flow, *tiny_loop, "--allow-host", "127.0.0.1:9").status == 0


def test_killed_and_restarted_in_the_middle_of_a_run(cli, saved, tiny_loop, tmp_path, monkeypatch, serving, remote_loop):
    """First for a moment, and the run waits; then for good, and it stops, to go on where it was. The LoRA is that of a run that nothing disturbed."""
    monkeypatch.setenv(settings.PATH, str(tmp_path / "none.json"))
    words = [*tiny_loop, "--iterations", 3, "--set", "Loop Start.checkpoint_every=1"]
    steady = serving(mean)
    run = ["run", saved(remote_loop(steady.address)), *words, "--allow-host", "127.0.0.1"]
    assert cli(*run, "--output", tmp_path / "whole").status == 0

    calls, back, again = [], threading.Event(), []

    def killed(handler, body):
        calls.append(body)
        if len(calls) == 5:  # in the second iteration
            handler.close_connection = True
            handler.connection.close()
            threading.Thread(target=restart).start()
            return None
        return mean(handler, body)

    server = Server(killed)

    def restart():
        server.close()
        time.sleep(0.3)
        again.append(Server(mean, server.port))
        back.set()

    monkeypatch.setattr(service, "FIRST_PAUSE", 0.2)
    run[1] = saved(remote_loop(server.address, retries=6))
    done = cli(*run, "--output", tmp_path / "waits")
    assert done.status == 0 and back.is_set() and len(calls) >= 5, done.err
    assert any("tried again" in line for line in done.err)
    assert equal(loras(tmp_path / "waits/quickstart"), loras(tmp_path / "whole/quickstart"))

    monkeypatch.setattr(service, "FIRST_PAUSE", 0.01)
    answered, gone = [], threading.Event()

    def leaves(handler, body):
        answered.append(body)
        if len(answered) > 6:  # of three calls an iteration, in the third
            gone.set()
        return as_json({"error": "going down"}, 503) if gone.is_set() else mean(handler, body)

    leaving = serving(leaves)
    run[1] = saved(remote_loop(leaving.address))
    done = cli(*run, "--output", tmp_path / "stops")
    (line,) = done.verdict
    print(f"\n{line}")
    assert done.status == 3 and "it answers 503: going down (3 tries); what it was given is in " in line and "--allow-host 127.0.0.1" in line
    leaving.answer = mean
    program, *resume = shlex.split(line.partition("; resume with: ")[2])
    done = cli(*resume)
    assert done.status == 0 and any("goes on after iteration 2" in said for said in done.err)
    assert equal(loras(tmp_path / "stops/quickstart"), loras(tmp_path / "whole/quickstart"))
    for one in again:
        one.close()


def test_the_editor_asks_the_user_s_settings(start_editor, tmp_path, mine, remote_loop):
    pytest.importorskip("comfyui_frontend_package")
    editor = start_editor(tmp_path / "editor")
    answer = editor.post("/prompt", {"prompt": remote_loop("http://127.0.0.1:9/score", reward="a/b")})
    assert answer.status == 400 and b"a/b" in answer.body  # the host is allowed, and only the name is wrong
    mine(allowed_hosts=[])
    answer = editor.post("/prompt", {"prompt": remote_loop("http://127.0.0.1:9/score")})
    assert answer.status == 400 and b"found the host 127.0.0.1:9, which the user has not allowed" in answer.body
