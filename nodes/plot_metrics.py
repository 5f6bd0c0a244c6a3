from __future__ import annotations

import importlib.util

from . import wires


class PlotMetrics:
    TITLE = "Plot Metrics"
    DESCRIPTION = "Draws a run's curves: the reward and its spread, what Watch found, the spread within groups, clipping, the gradient's norm."
    SEARCH_ALIASES = ["reward curve", "chart", "graph"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("The curves.",)
    FUNCTION = "plot"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "run": wires.socket(wires.RUN, "From Loop End."),
            "width": wires.integer(960, 320, 4096, "Pixels.", 8),
            "height": wires.integer(640, 240, 4096, "Pixels.", 8),
        }, "optional": {
            "picture_statistics": ("BOOLEAN", {"default": False, "tooltip": "Also sharpness, saturation, grid artefacts and near-duplicates of the pictures."}),
        }}

    @classmethod
    def VALIDATE_INPUTS(cls):
        return True if importlib.util.find_spec("matplotlib") else "needs matplotlib: pip install matplotlib"

    def plot(self, run, width: int, height: int, picture_statistics: bool = False):
        from comfy_dancegrpo.runs import pictures

        return (pictures.to_tensor(pictures.curves(run.rows, run.folder.name, width, height, run.watched, picture_statistics)),)
