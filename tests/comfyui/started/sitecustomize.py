"""Loaded by every Python that the ComfyUI of these tests starts: what `start.py` completes for that one."""

import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location("start", Path(__file__).resolve().parent.parent / "start.py")
start = importlib.util.module_from_spec(spec)
spec.loader.exec_module(start)
library = start.complete_torchvision()
