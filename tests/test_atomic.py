"""Files that are whole or not there, also where another process has them open."""

import os
import time

import pytest

from comfy_dancegrpo.atomic import replacing


@pytest.fixture
def opened(monkeypatch):
    """`opened(count)`: the next so many replacements fail, as on Windows while another process has the file open."""
    left, replace = [0], os.replace

    def refuse(source, target):
        if left[0] > 0:
            left[0] -= 1
            raise PermissionError(13, "Access is denied", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    return lambda count: left.__setitem__(0, count)


def test_a_file_that_is_open_for_an_instant_is_replaced_after_it(tmp_path, opened):
    path = tmp_path / "a"
    path.write_text("former")
    opened(3)
    with replacing(path) as beside:
        beside.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_one_that_stays_open_is_given_up_and_stays_as_it_was(tmp_path, opened):
    path = tmp_path / "a"
    path.write_text("former")
    opened(1_000_000)
    start = time.monotonic()
    with pytest.raises(PermissionError, match="Access is denied"), replacing(path) as beside:
        beside.write_text("new")
    assert 0.9 < time.monotonic() - start < 10
    assert path.read_text() == "former" and list(tmp_path.iterdir()) == [path]


def test_what_the_block_raised_is_told_where_its_file_cannot_be_removed_either(tmp_path):
    with pytest.raises(ValueError, match="first"), replacing(tmp_path / "a") as beside:
        beside.mkdir()  # unlink does not take it
        raise ValueError("first")
