"""The embedded set: its exact reader on pictures whose attributes are known, and its captions."""

import random
from dataclasses import astuple, replace

import numpy as np
import pytest

from comfy_dancegrpo.embedded import PROMPTS, shapes


def pixels(attributes, rng=None):
    return np.asarray(shapes.draw(attributes, rng), dtype=np.float64) / 255


def test_every_combination_is_read_right():
    assert len(shapes.every()) == 1440 == len(set(shapes.every()))
    assert [a.caption for a in shapes.every() if shapes.measure(pixels(a)) != a] == []


def test_nearly_every_picture_with_jitter_is_read_right():
    rng = random.Random(0)
    some = rng.sample(shapes.every(), 300)
    right = [np.mean([a == b for a, b in zip(astuple(shapes.measure(pixels(s, rng))), astuple(s))]) for s in some]
    assert np.mean(right) > 0.995


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_a_little_noise_does_not_confuse_it(noise):
    source = np.random.default_rng(0)
    some = random.Random(1).sample(shapes.every(), 100)
    right = [shapes.agreement(np.clip(pixels(s) + noise * source.standard_normal((64, 64, 3)), 0, 1), s.caption) for s in some]
    assert np.mean(right) > 0.99


def test_a_picture_of_another_size():
    wanted = shapes.Attributes("large", "green", "star", "at the top right", "white")
    large = np.asarray(shapes.draw(wanted).resize((256, 256)), dtype=np.float64) / 255
    assert shapes.measure(large) == wanted


def test_nothing_on_the_background():
    gray = np.full((64, 64, 3), 0.5)
    assert shapes.measure(gray) is None
    assert shapes.agreement(gray, shapes.every()[0].caption) == 0.0


OTHERS = {"size": "large", "colour": "blue", "shape": "cross", "place": "at the bottom left", "background": "white"}


def test_agreement_counts_the_attributes():
    shown = shapes.Attributes("small", "red", "circle", "in the center", "black")
    picture, asked = pixels(shown), shown
    for wrong, name in enumerate(OTHERS):
        assert shapes.agreement(picture, asked.caption) == pytest.approx((5 - wrong) / 5)
        assert shapes.agreement(picture, replace(shown, **{name: OTHERS[name]}).caption) == pytest.approx(0.8)
        asked = replace(asked, **{name: OTHERS[name]})
    assert shapes.agreement(picture, asked.caption) == 0.0


def test_captions_are_read_as_they_are_written():
    for attributes in shapes.every():
        assert shapes.parse(attributes.caption) == attributes
    assert shapes.parse("  A small RED  circle in the center on a black background\n").colour == "red"


@pytest.mark.parametrize("caption", ["", "a cat", "a small red circle in the center", "a small mauve circle in the center on a black background"])
def test_another_caption_is_an_error_in_one_line(caption):
    with pytest.raises(ValueError, match="is not one of the embedded set, such as 'a small red circle") as error:
        shapes.agreement(np.zeros((64, 64, 3)), caption)
    assert "\n" not in str(error.value)


def test_the_splits_are_disjoint_and_cover_everything():
    splits = shapes.splits()
    assert {name: len(captions) for name, captions in splits.items()} == {"test": 160, "validation": 160, "train": 1120}
    assert sorted(sum(splits.values(), [])) == sorted(a.caption for a in shapes.every())
    for captions in splits.values():  # each has every word, so none asks for what was never trained
        assert [len(set(values)) for values in zip(*(astuple(shapes.parse(c)) for c in captions))] == [2, 6, 6, 5, 4]


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_the_files_hold_the_splits(name):
    lines = (PROMPTS / f"shapes_{name}.txt").read_text(encoding="utf-8").splitlines()
    assert lines == shapes.splits()[name]


def test_redraw_follows_the_caption_only_partly():
    wanted, rng = shapes.Attributes("large", "red", "ring", "in the center", "pink"), random.Random(0)
    often = {"size": 0.25, "colour": 0.5, "shape": 0.1, "place": 0.2, "background": 1.0}
    drawn = [shapes.Redraw(**often)(wanted, rng) for _ in range(4000)]
    for (name, probability), values in zip(often.items(), shapes.VALUES):
        kept = np.mean([getattr(d, name) == getattr(wanted, name) for d in drawn])
        assert kept == pytest.approx(1 - probability * (1 - 1 / len(values)), abs=0.03)  # a redrawn value may be the same again
    assert shapes.Redraw(0, 0, 0, 0, 0)(wanted, rng) == wanted
