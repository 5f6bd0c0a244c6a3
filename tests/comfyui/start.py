"""Starts the ComfyUI in the folder `sys.argv[1]` with the rest of the words, also where torchvision was built for another torch."""

import contextlib
import os
import runpy
import sys

import torch


def complete_torchvision() -> torch.library.Library:
    """Defines what torchvision's own library would; call it before torchvision is imported, and keep what it returns."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # torchvision's own library is there, and has defined it
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


if __name__ == "__main__":
    root, *words = sys.argv[1:]
    library = complete_torchvision()
    started = os.path.join(os.path.dirname(os.path.abspath(__file__)), "started")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (started, os.environ.get("PYTHONPATH"))))
    os.chdir(root)
    sys.path.insert(0, root)
    sys.argv = ["main.py", *words]
    runpy.run_path(os.path.join(root, "main.py"), run_name="__main__")
