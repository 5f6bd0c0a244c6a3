from __future__ import annotations

import re
import uuid

from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.workflow.host import host, inside

from . import wires


class SaveVideo:
    TITLE = "Save Video"
    DESCRIPTION = "Writes the frames as an mp4, and shows them as an animated WebP."
    SEARCH_ALIASES = ["mp4", "movie", "export", "animation"]
    CATEGORY = wires.CATEGORY
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "images": wires.socket("IMAGE", "A video's frames in order; each video of a list goes into a file of its own."),
            "fps": wires.number(16.0, 0.1, 240.0, "Frames a second: 16 for Wan 2.1, 24 for Wan 2.2 TI2V-5B and HunyuanVideo.", 1.0),
            "filename_prefix": ("STRING", {"default": "video", "tooltip": "Begins each file's name, in the run's videos folder."}),
        }}

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix):
        return (filename_prefix is not None and cls._problem(filename_prefix)) or True

    @staticmethod
    def _folder():
        return host().run_folder / "videos" if host().run_folder else host().output_folder

    @classmethod
    def _problem(cls, prefix: str) -> str | None:
        if inside(cls._folder(), prefix) and not prefix.endswith(("/", "\\")):
            return None
        return f'input "filename_prefix": found {prefix!r}, accepted: a name that stays within the output folder'

    def save(self, images, fps, filename_prefix):
        from comfy_dancegrpo.runs import video
        from comfy_dancegrpo.runs.pictures import save_animation

        if problem := self._problem(filename_prefix):
            raise RunError(problem)
        target = inside(self._folder(), filename_prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        taken = [int(m[1]) for p in target.parent.glob("*.mp4") if (m := re.fullmatch(re.escape(target.name) + r"_(\d{5,})_\.mp4", p.name))]
        path = target.parent / f"{target.name}_{max(taken, default=0) + 1:05d}_.mp4"
        video.write(images, path, fps)
        host().say(f"video: {path}")
        if host().preview_folder is None:
            return {"ui": {"text": [str(path)]}}
        preview = f"video_{uuid.uuid4().hex}.webp"
        save_animation(images, host().preview_folder / preview, fps)
        return {"ui": {"text": [str(path)], "images": [{"filename": preview, "subfolder": "", "type": "temp"}], "animated": (True,)}}
