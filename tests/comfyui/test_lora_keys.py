"""The recorded keys that ComfyUI's LoRA loader knows, against the real one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import record_comfyui_keys

SCRIPT = Path(record_comfyui_keys.__file__)
RECORDED = json.loads(record_comfyui_keys.RECORD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if "COMFYUI_PATH" not in os.environ:
        pytest.skip("set COMFYUI_PATH to ComfyUI's folder to compare the recorded keys of LoRAs with its own")
    done = subprocess.run([os.environ.get("COMFYUI_PYTHON", sys.executable), SCRIPT, "--print"], capture_output=True, text=True, timeout=600,
                          cwd=tmp_path_factory.mktemp("here"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", RECORDED)
def test_what_is_recorded_is_what_comfyui_knows(real, family):
    if family not in real:
        pytest.skip(f"this ComfyUI is too old for {family}")
    told, now = RECORDED[family], real[family]
    assert set(told["keys"]) <= set(now["keys"]) and told["layers"].items() <= now["layers"].items()
    if told["comfyui"] == now["comfyui"]:
        assert told == now


def test_every_family_that_it_has_is_recorded(real):
    assert real.keys() <= RECORDED.keys()
