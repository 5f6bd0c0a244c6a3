"""LTX-Video: `diffusion_model.` and the layer's name, the same in diffusers and in ComfyUI, both of which read it."""

from functools import partial

from . import diffusers

to_file = partial(diffusers.to_file, prefix="diffusion_model.")
from_file = partial(diffusers.from_file, prefix="diffusion_model.")
