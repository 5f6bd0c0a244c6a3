"""OCR: the score by hand, and texts that Pillow wrote read back."""

import importlib.util
import socket

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from comfy_dancegrpo import rewards
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.rewards import ocr

needs_ocr = pytest.mark.skipif(importlib.util.find_spec("rapidocr") is None, reason='rapidocr is not installed: pip install "comfy-dancegrpo[ocr]"')


@pytest.mark.parametrize("a, b, changes", [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("same", "same", 0),
                                           ("ab", "ba", 2), ("intention", "execution", 5)])
def test_edit_distance(a, b, changes):
    assert ocr.distance(a, b) == ocr.distance(b, a) == changes


@pytest.mark.parametrize("found, prompt, score", [
    ("Hello World", 'a sign with "Hello World"', 1.0),
    ("HELLOWORLD", 'a sign with "hello world"', 1.0),  # case and blanks play no part
    ("xx hello world yy", 'a sign with "Hello World" in it', 1.0),  # letters around it cost nothing
    ("Hallo World", 'a sign with "Hello World"', 0.9),
    ("", 'a sign with "Hello World"', 0.0),
    ("something else that is far too long", 'a sign with "open"', 0.0),  # at most as much as all of its letters
    ("open", 'a door with "open" beside one with "closed"', 1.0),  # the first counts
    ("open", "a door with “open”", 1.0),
])
def test_the_score(found, prompt, score):
    assert ocr.score(found, ocr.wanted(prompt)) == pytest.approx(score)


@pytest.mark.parametrize("prompt", ["a sign that says open", 'a sign with ""', 'a sign with " "', 'a 5" nail'])
def test_a_prompt_without_a_text_is_one_line(prompt):
    with pytest.raises(RunError, match="accepted: one with a text in double quotes"):
        ocr.wanted(prompt)


def sign(*lines, ink="black", paper="white"):
    picture = Image.new("RGB", (320, 160), paper)
    for number, line in enumerate(lines):
        ImageDraw.Draw(picture).text((20, 15 + 65 * number), line, ink, ImageFont.load_default(44))
    return torch.from_numpy(np.asarray(picture) / 255).float()


@needs_ocr
def test_written_texts_are_read_without_a_network(monkeypatch):
    def refused(*_):
        raise AssertionError("it asked the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    pictures = [sign("Hello", "World 42"), sign("Grand", "Opening", ink="red", paper=(20, 30, 90)), sign("Hallo"), sign()]
    prompts = ['fireworks that say "Hello World 42"', 'a shop, "grand opening"', 'a sign with "hello"', 'a sign with "hello"']
    found = rewards.load("ocr")(pictures, prompts)
    assert found.tolist() == pytest.approx([1, 1, 0.8, 0])
    assert rewards.load("ocr", batch_size=1)(torch.stack(pictures), prompts).tolist() == found.tolist()


@needs_ocr
def test_of_a_video_the_mean_or_the_worst_frame_counts():
    video = torch.stack([sign("hello"), sign("hallo")])
    assert rewards.load("ocr")([video], ['a sign with "hello"']).item() == pytest.approx(0.9)
    assert rewards.load("ocr", frame_score="worst")([video], ['a sign with "hello"']).item() == pytest.approx(0.8)


@needs_ocr
def test_channels_are_not_swapped(monkeypatch):
    """RapidOCR takes blue first: its preprocessing has a mean and a deviation for each channel."""
    import rapidocr

    seen = []
    monkeypatch.setattr(rapidocr.RapidOCR, "__call__", lambda self, image, **_: seen.append(image) or type("Read", (), {"txts": None}))
    rewards.load("ocr")(torch.tensor([1.0, 0.5, 0.0]).expand(1, 4, 4, 3), ['"a"'])
    assert seen[0].dtype == np.uint8 and seen[0][0, 0].tolist() == [0, 128, 255]


def test_a_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = 'input "reward": found \'ocr\', which needs rapidocr and onnxruntime; pip install "comfy-dancegrpo[ocr]"'
    assert rewards.problem("ocr", "embedded") == line
    with pytest.raises(RunError) as raised:
        rewards.load("ocr")
    assert str(raised.value) == line
