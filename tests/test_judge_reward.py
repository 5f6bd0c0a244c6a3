"""A judge over loopback: what it is asked, what its answers may look like, and what is no score."""

import base64
import io
import json
import threading

import pytest
import torch
from loopback import Noting, as_json
from PIL import Image

from comfy_dancegrpo.addresses import Address
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.nodes.judge_reward import QUESTION, JudgeReward
from comfy_dancegrpo.nodes.remote_reward import RemoteReward
from comfy_dancegrpo.prompts import Prompt, Reference
from comfy_dancegrpo.rewards import judge
from comfy_dancegrpo.rewards.judge import Question
from comfy_dancegrpo.rewards.service import Service
from comfy_dancegrpo.workflow.host import use

pytestmark = pytest.mark.usefixtures("mine")
PICTURES = torch.arange(24).view(24, 1, 1, 1).expand(24, 4, 6, 3) / 255
PROMPTS = [f"picture {n}" for n in range(24)]


def said(text, **choice):
    """A chat completion with this text."""
    return as_json({"object": "chat.completion", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, **choice}]})


def images(body):
    """The pictures of a request, in order, and its texts."""
    (message,) = json.loads(body)["messages"]
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls], [p["text"] for p in message["content"] if p["type"] == "text"]


def judged(server, model="a-model", question=Question("Rate {prompt} from {low} to {high}.", 0, 100), retries=1, connections=8):
    address = Address.parse(f"http://127.0.0.1:{server.port}/v1")
    return judge.load(judge.completions(Service(address, connections, 10.0, retries)), model, question)


def test_every_picture_is_judged_with_its_prompt_and_many_at_once(serving):
    first, all_eight = iter(range(8)), threading.Barrier(8)

    def first_byte(handler, body):
        if next(first, None) is not None:
            all_eight.wait(30)
        (image,), (text,) = images(body)
        assert text == f"Rate picture {image.getpixel((0, 0))[0]} from 0 to 100." and image.size == (6, 4)
        return said(json.dumps({"score": image.getpixel((0, 0))[0] + 0.5}))

    server = serving(first_byte)
    assert judged(server)(PICTURES, PROMPTS).tolist() == [n + 0.5 for n in range(24)]
    assert len(server.requests) == 24 and server.most == 8


def test_a_request_is_a_chat_completion_with_a_schema(serving, mine):
    server = serving(lambda handler, body: said('{"score": 7}'))
    mine(api_keys={f"127.0.0.1:{server.port}": "sk-1"})
    judged(server, question=Question("{prompt} {x}", 1, 10))(PICTURES[:1], ["a {low} cat"])
    ((handler, body),) = server.requests
    request = json.loads(body)
    assert handler.path == "/v1/chat/completions" and handler.headers["Authorization"] == "Bearer sk-1"
    assert request["model"] == "a-model" and request["temperature"] == 0 and images(body)[1] == ["a {low} cat {x}"]
    schema = request["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["score"] == {"type": "number", "minimum": 1, "maximum": 10} and schema["required"] == ["score"]


@pytest.mark.parametrize("given", ["/v1", "/v1/", "/v1/chat/completions", ""])
def test_the_address_may_name_the_whole_path_or_not(given):
    service = Service(Address.parse(f"http://127.0.0.1:8000{given}"))
    assert judge.completions(service).address.path == ("/chat/completions" if given == "" else "/v1/chat/completions")


def test_reference_pictures_and_the_frames_of_videos_go_along(serving):
    server = serving(lambda handler, body: said("5"))
    reference = Reference("r", "k", lambda: Image.new("RGB", (2, 2), (200, 0, 0)))
    video = PICTURES[:9]
    for question in (Question("?", 0, 10, frames=3), Question("?", 0, 10, frames=3, reference=False)):
        judged(server, question=question)([video, video[:1]], [Prompt("a", reference), Prompt("b")])
    asked = sorted([[image.getpixel((0, 0))[0] for image in images(body)[0]], images(body)[1]] for _, body in server.requests)
    assert asked == sorted([[[200, 0, 4, 8], ["The reference picture:", "What is judged:", "?"]], [[0], ["?"]], [[0, 4, 8], ["?"]], [[0], ["?"]]])


@pytest.mark.parametrize("text, score", [
    ('{"score": 7.5}', 7.5), ('```json\n{"score": 7}\n```', 7), ("7", 7), ("Score: 7.25.", 7.25), ("<think>3 stars, or 10?</think>\n\nI say 8", 8),
    ("8, yes, 8", 8), ('{"score": "6"}', 6), ("-0.5", -0.5), ("1e1", 10),
])
def test_scores_are_read_from(serving, text, score):
    assert judged(serving(lambda handler, body: said(text)), question=Question("?", -1, 10))(PICTURES[:1], ["a"]).tolist() == [score]


@pytest.mark.parametrize("answer, line", [
    (said("8/10"), "its answer has 2 numbers, accepted: one: '8/10'"), (said("Beautiful!"), "its answer has 0 numbers"), (said(""), "its answer has 0 numbers"),
    (said('{"score": null}'), "its answer has 0 numbers"), (said("11"), "its answer gives the score 11, accepted: 0 to 10"),
    (said('{"score": NaN}'), "its answer gives the score nan"), (said('{"score": 8', finish_reason="length"), "its answer was cut off"),
    (said(None), "its answer has no text"), (as_json({"choices": []}), "its answer is not a chat completion"), (as_json([]), "is not a chat completion"),
    (as_json({"error": {"message": "no such model"}}, 404), "it answers 404: no such model"),
])
def test_what_is_no_score_is_one_line_and_the_picture_is_kept(serving, tmp_path, answer, line):
    good = iter([said("5")] * 3)
    server = serving(lambda handler, body: next(good) if "picture 3" not in str(images(body)[1]) else answer)
    with use(Noting(tmp_path)), pytest.raises(RunError) as raised:
        judged(server, question=Question("{prompt}", 0, 10))(PICTURES[:4], PROMPTS[:4])
    assert line in str(raised.value) and len(str(raised.value).splitlines()) == 1
    record = json.loads((tmp_path / "failed_reward/judge-1/fault.json").read_text())
    assert [sample["prompt"] for sample in record["samples"]] == ["picture 3"]
    assert Image.open(tmp_path / "failed_reward/judge-1" / record["samples"][0]["file"]).getpixel((0, 0)) == (3, 3, 3)


@pytest.mark.parametrize("status", [400, 422, 501])
def test_a_server_that_knows_no_schemas_is_asked_without_and_it_is_said_once(serving, status):
    def plain(handler, body):
        return as_json({"error": {"message": "response_format?"}}, status) if "response_format" in json.loads(body) else said("I give it a 6.")

    server = serving(plain)
    reward = judged(server, retries=0)
    with use(Noting()) as host:
        assert reward(PICTURES, PROMPTS).tolist() == reward(PICTURES, PROMPTS).tolist() == [6] * 24
    assert len(host.said) == 1 and f"it answers {status}: response_format?; it is asked without a schema from now on" in host.said[0]
    assert sum(b"response_format" in body for _, body in server.requests) <= 8


def test_a_picture_that_is_refused_costs_the_others_no_schema(serving):
    bad = as_json({"error": {"message": "no such picture"}}, 400)
    server = serving(lambda handler, body: bad if "picture 3" in str(images(body)[1]) else said('{"score": 6}'))
    reward = judged(server, question=Question("{prompt}", 0, 10), connections=1)
    with use(Noting()) as host, pytest.raises(RunError, match="it answers 400: no such picture$"):
        reward(PICTURES[:4], PROMPTS[:4])
    assert host.said == []
    before = len(server.requests)
    assert reward(PICTURES[4:6], PROMPTS[4:6]).tolist() == [6, 6]
    assert [b"response_format" in body for _, body in server.requests[before:]] == [True, True]


def test_the_node_makes_what_its_inputs_say(serving):
    server = serving(lambda handler, body: said("3"))
    defaults = {name: options["default"] for kind in JudgeReward.INPUT_TYPES().values() for name, (_, options) in kind.items()}
    (reward,) = JudgeReward().load(**{**defaults, "address": f"http://127.0.0.1:{server.port}/v1", "name": "taste"})
    assert reward(PICTURES[:1], ["a cat"]).tolist() == [3] and reward.name == "taste"
    assert images(server.requests[0][1])[1] == [QUESTION.replace("{prompt}", "a cat").replace("{low}", "0").replace("{high}", "10")]
    assert "model" not in json.loads(server.requests[0][1])


@pytest.mark.parametrize("inputs, line", [
    ({"low": 10.0}, 'input "low": found 10, accepted: less than "high", which is 10'), ({"name": "a/b"}, "input \"name\": found 'a/b', accepted: letters"),
    ({"address": "http://elsewhere.example/v1"}, "found the host elsewhere.example:80, which the user has not allowed"),
])
def test_inputs_that_cannot_be(inputs, line):
    assert line in JudgeReward.VALIDATE_INPUTS(**{"address": "http://127.0.0.1:8000/v1", "low": 0.0, "high": 10.0, **inputs})
    assert JudgeReward.VALIDATE_INPUTS(address="http://127.0.0.1:8000/v1", low=0.0, high=10.0) is True


@pytest.mark.parametrize("inputs, line", [
    ({"low": 10.0}, 'input "low": found 10, accepted: less than "high", which is 10'), ({"name": "a/b"}, "input \"name\": found 'a/b', accepted: letters"),
])
def test_inputs_that_came_over_links_are_looked_at_too(inputs, line):
    given = {name: None for name in inputs}
    assert JudgeReward.VALIDATE_INPUTS(**{"address": "http://127.0.0.1:8000/v1", "low": 0.0, "high": 10.0, **given}) is True
    others = {"address": "http://127.0.0.1:8000/v1", "model": "", "question": "?", "low": 0.0, "high": 10.0, "connections": 1, "timeout": 1.0, "retries": 0}
    with pytest.raises(RunError, match=f"^{line}"):
        JudgeReward().load(**{**others, **inputs})
    with pytest.raises(RunError, match="^input \"reward\": found 'a/b', accepted: letters"):
        RemoteReward().load("http://127.0.0.1:8000/score", "a/b", 8, 1, 1.0, 0)
