"""Stand-ins for the few of ComfyUI's own nodes that training graphs contain, with their ids, inputs and order.

ComfyUI never sees these; with `--comfyui PATH` its own take their place.
"""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path

from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.workflow.host import host, inside

from . import wires


def _images_folder() -> Path:
    """The run's images/, or the output folder before any run began."""
    return host().run_folder / "images" if host().run_folder else host().output_folder


class SaveImage:
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "image", "save", (), True
    DESCRIPTION = "Saves the pictures as PNG, in the run's images folder."

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": wires.socket("IMAGE", "The pictures to save."),
                             "filename_prefix": ("STRING", {"default": "ComfyUI", "tooltip": "Begins each file's name."})},
                "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}}

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix):
        return (filename_prefix is not None and cls._problem(filename_prefix)) or True

    @staticmethod
    def _problem(prefix: str) -> str | None:
        if inside(_images_folder(), prefix) and not prefix.endswith(("/", "\\")):
            return None
        return f'input "filename_prefix": found {prefix!r}, accepted: a name that stays within the output folder'

    def save(self, images, filename_prefix="ComfyUI", prompt=None, extra_pnginfo=None):
        from PIL.PngImagePlugin import PngInfo

        from comfy_dancegrpo.runs.pictures import to_image

        if problem := self._problem(filename_prefix):
            raise RunError(problem)
        target = inside(_images_folder(), filename_prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        taken = [int(m[1]) for p in target.parent.glob("*.png") if (m := re.fullmatch(re.escape(target.name) + r"_(\d{5,})_\.png", p.name))]
        counter, saved, info = max(taken, default=0) + 1, [], PngInfo()
        for key, value in {"prompt": prompt, **(extra_pnginfo or {})}.items():
            if value is not None:
                info.add_text(key, json.dumps(value))
        for i, picture in enumerate(images):
            path = target.parent / f"{target.name}_{counter + i:05d}_.png"
            to_image(picture).save(path, pnginfo=info)
            relative = path.relative_to(host().output_folder)
            saved.append({"filename": path.name, "subfolder": relative.parent.as_posix(), "type": "output"})
        return {"ui": {"images": saved}}


class PreviewImage:
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "image", "preview", (), True
    DESCRIPTION = "Shows the pictures, of videos the middle frame; headless, the latest are kept as one contact sheet in the run's images folder."
    INPUT_IS_LIST = True  # videos come as a list, one IMAGE each: all of them belong in one sheet

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": wires.socket("IMAGE", "The pictures to show.")}, "hidden": {"unique_id": "UNIQUE_ID"}}

    def preview(self, images, unique_id=(None,)):
        from comfy_dancegrpo.runs.pictures import contact_sheet

        pictures = list(images[0] if len(images) == 1 else images)  # one batch of pictures, or several videos
        if not pictures:
            raise RunError('input "images": found none, accepted: one or more')
        name = re.sub(r"\W", "_", str(unique_id[0]))
        if host().preview_folder is not None:
            return {"ui": {"images": self._for_page(host().preview_folder, f"preview_{name}_{uuid.uuid4().hex}", pictures)}}
        folder = _images_folder()
        folder.mkdir(parents=True, exist_ok=True)
        contact_sheet(pictures).save(folder / f"preview_{name}.png")
        return {"ui": {"images": []}}

    @staticmethod
    def _for_page(folder: Path, name: str, pictures: list) -> list[dict]:
        """Writes each picture under a name that was never used: a page may still fetch the former ones."""
        from comfy_dancegrpo.runs.pictures import to_image

        names = [f"{name}_{i}.png" for i in range(len(pictures))]
        for file, picture in zip(names, pictures):
            to_image(picture).save(folder / file, compress_level=1)
        return [{"filename": file, "subfolder": "", "type": "temp"} for file in names]


class LoadImage:
    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = "image", "load", ("IMAGE", "MASK"), ("IMAGE", "MASK")
    DESCRIPTION = "A picture from the input folder."

    @classmethod
    def INPUT_TYPES(cls):
        folder = host().input_folder
        names = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
        return {"required": {"image": (names, {"image_upload": True, "tooltip": "A file in the input folder."})}}

    @classmethod
    def VALIDATE_INPUTS(cls, image):
        return True if image is None or cls._path(image) else f'input "image": found {image!r}, which is not in {host().input_folder}'

    @staticmethod
    def _path(name: str) -> Path | None:
        path = inside(host().input_folder, name)
        return path if path and path.is_file() else None

    def load(self, image: str):
        import numpy as np
        import torch
        from PIL import Image, ImageOps

        picture = ImageOps.exif_transpose(Image.open(self._path(image)))
        pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
        if "A" not in picture.getbands():
            return pixels, torch.zeros(1, 64, 64)
        return pixels, 1 - torch.from_numpy(np.asarray(picture.getchannel("A"), dtype=np.float32) / 255)[None]


def _primitive(kind: str, options: dict) -> type:
    """A node that hands its one widget's value on."""

    class Primitive:
        CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = "utils/primitive", "value", (kind,), (kind,)
        DESCRIPTION = "Hands its value on."

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"value": (kind, {**options, "tooltip": "The value."})}}

        def value(self, value):
            return (value,)

    return Primitive


_LARGEST = 2**63 - 1
NODES = {
    "SaveImage": SaveImage,
    "PreviewImage": PreviewImage,
    "LoadImage": LoadImage,
    "PrimitiveInt": _primitive("INT", {"default": 0, "min": -_LARGEST, "max": _LARGEST, "control_after_generate": True}),
    "PrimitiveFloat": _primitive("FLOAT", {"default": 0.0, "min": -1e308, "max": 1e308}),
    "PrimitiveString": _primitive("STRING", {"default": ""}),
    "PrimitiveStringMultiline": _primitive("STRING", {"default": "", "multiline": True}),
    "PrimitiveBoolean": _primitive("BOOLEAN", {"default": False}),
}
for _node in NODES.values():
    _node.RELATIVE_PYTHON_MODULE = "nodes"  # where ComfyUI has them: the editor takes them for its core's
