"""The embedded policies, their learned reward and the set of captioned pictures that all were trained on.

`policy/` is a `FluxPipeline` folder, `diffusion/` a `StableDiffusionPipeline` folder without the parts that it shares with it, `reward/` a
`CLIPModel` folder, `prompts/` the captions by split; `pretrain.py` makes all but `diffusion/`, which `pretrain_diffusion.py` makes.
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
POLICY = FOLDER / "policy"
DIFFUSION = FOLDER / "diffusion"
REWARD = FOLDER / "reward"
PROMPTS = FOLDER / "prompts"
POLICIES = {"embedded": POLICY, "embedded_diffusion": DIFFUSION}


def shared(folder: Path, dtype) -> dict:
    """The parts that `diffusion/` shares with `policy/` (its VAE, text encoder and tokenizer), by name; of any other folder none."""
    if folder != DIFFUSION:
        return {}
    from diffusers import FluxPipeline

    from ..policies.base import from_folder

    flow = from_folder(FluxPipeline, POLICY, dtype, transformer=None, text_encoder_2=None, tokenizer_2=None)
    return {name: flow.components[name] for name in ("vae", "text_encoder", "tokenizer")}
