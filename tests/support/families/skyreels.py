import tiny
from comfy_dancegrpo.grpo.protocol import Size
from diffusers import HunyuanSkyreelsImageToVideoPipeline

from . import Case, draw_video_of_picture, pictured
from .hunyuan_video import CASE as HUNYUAN
from .hunyuan_video import WIDE, cheaply, parts, wide


def skyreels(make=tiny.seeded, **transformer):
    found = parts(make, in_channels=8, guidance_embeds=False, **transformer)
    tiny.certain(found["vae"].quant_conv, 4)
    return HunyuanSkyreelsImageToVideoPipeline(**found)


def draw(pipeline, asked):
    return draw_video_of_picture(pipeline, asked, true_cfg_scale=asked.guidance_scale, guidance_scale=1.0, negative_prompt="")


CASE = Case("skyreels", skyreels, comfyui=HUNYUAN.comfyui, draw=draw, prompts=pictured(), size=Size(32, 32, 5), odd=Size(32, 40, 5))
CASES = [wide(CASE, lambda: skyreels(cheaply, **WIDE))]
