"""The panel's functions that need no page, in node."""

import shutil
import subprocess
from pathlib import Path

import pytest

import comfy_dancegrpo

NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_the_panels_functions(tmp_path):
    shutil.copytree(comfy_dancegrpo.resource("web") / "panel", tmp_path / "panel")
    shutil.copy(Path(__file__).with_name("panel.test.mjs"), tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')  # the browser needs none
    done = subprocess.run([NODE, "--test", "panel.test.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "# fail 0" in done.stdout and "# pass 0" not in done.stdout, done.stdout + done.stderr
