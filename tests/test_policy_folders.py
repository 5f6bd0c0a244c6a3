"""Diffusers folders that are damaged, hold code, or hold their weights in half precision alone; and a diffusers that is too old for a family."""

import json

import pytest
from comfy_dancegrpo import policies
from comfy_dancegrpo.workflow.host import Host, use
from families.stable_diffusion import sd15


@pytest.fixture
def folder(tmp_path):
    """A model folder in which "sd" lies whole."""
    sd15().save_pretrained(tmp_path / "diffusers" / "sd")
    with use(Host(models=tmp_path)):
        yield tmp_path / "diffusers" / "sd"


def refused(line, name="sd"):
    found = policies.problem(name)
    assert found is not None and line in found and "\n" not in found


@pytest.mark.parametrize("code", ["unet/diffusers.py", "text_encoder/transformers.py"])
def test_code_in_the_place_of_a_library_is_refused(code, folder):
    assert policies.problem("sd") is None
    (folder / code).write_text("raise SystemExit")
    refused(f"found code in {folder / code}, accepted: a diffusers folder without code of its own")
