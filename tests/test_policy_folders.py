"""Diffusers folders that are damaged, hold code, or hold their weights in half precision alone; and a diffusers that is too old for a family."""

import json

import diffusers
import pytest
from comfy_dancegrpo import policies
from comfy_dancegrpo.errors import RunError
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


@pytest.mark.parametrize("version, enough", [("0.36.0", False), ("0.37.0.dev0", True), ("0.100.0", True), ("1.0", True)])
def test_a_diffusers_that_ignores_the_mask_is_too_old_for_qwen_image(version, enough, monkeypatch):
    monkeypatch.setattr(diffusers, "__version__", version)
    assert policies._class("flux", "Flux").__name__ == "Flux"
    if enough:
        assert policies._class("qwen_image", "QwenImage").__name__ == "QwenImage"
    else:
        with pytest.raises(RunError, match='^input "policy": QwenImage needs a newer diffusers than 0.36.0: 0.37 or later$'):
            policies._class("qwen_image", "QwenImage")
