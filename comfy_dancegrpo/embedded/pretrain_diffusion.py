"""Makes the embedded diffusion policy: a small Stable Diffusion over the VAE and text encoder that `pretrain.py` made.

    python -m comfy_dancegrpo.embedded.pretrain_diffusion --output FOLDER

Trains the UNet alone (v prediction as in Stable Diffusion 2, its betas), on the pictures and the captions that the flow was trained on, which it
follows as partly (`REDRAW`). A tenth of the captions is empty, for classifier-free guidance. FOLDER is then a `StableDiffusionPipeline` without
the parts that it shares with the flow policy.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel

from . import DIFFUSION, REWARD, shapes, shared
from .pretrain import REDRAW, Bank, Log, apply, encode, figures, schedule, token_ids

STEPS = 12  # of DDIM, for the figures


def make(seed: int) -> StableDiffusionPipeline:
    """A new UNet beside the flow policy's VAE, text encoder and tokenizer."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, cross_attention_dim=64, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(48, 88), attention_head_dim=(2, 4), mid_block_type="UNetMidBlock2DCrossAttn",
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    # "trailing" (arXiv 2305.08891): of few steps, "leading" ones end in a tiny one, whose log-probability would outweigh all the others' in training
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing", prediction_type="v_prediction")
    return StableDiffusionPipeline(unet=unet, scheduler=scheduler, **shared(DIFFUSION, torch.float32), safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)


def train(pipe: StableDiffusionPipeline, bank: Bank, steps: int, seed: int, fast: bool, keep) -> StableDiffusionPipeline:
    """Prediction of v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x0 (arXiv 2202.00512): an error in it is as large an error of the picture at
    the first of few steps as at the last, where one in epsilon would be 15 times as large. Returns the moving average.

    The attention's matrices are trained with Muon (arXiv 2502.16982), the rest with AdamW.
    """
    rng, captions = random.Random(seed), [shapes.parse(c) for c in shapes.splits()["train"]]
    torch.manual_seed(seed)
    latents = encode(pipe.vae, bank.pictures) * pipe.vae.config.scaling_factor
    texts = [*bank.attributes, None]
    with torch.no_grad():
        hidden = pipe.text_encoder(token_ids(pipe.tokenizer, [a.caption if a else "" for a in texts]))[0]
    index = {a: i for i, a in enumerate(texts)}
    trained = pipe.unet.train()
    average = copy.deepcopy(trained).eval().requires_grad_(False)
    matrices = [p for name, p in trained.named_parameters() if p.ndim == 2 and "attentions" in name]
    rest = [p for p in trained.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, 1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, 2e-3, betas=(0.9, 0.99), weight_decay=0.01),
    ]
    rates, log = [schedule(optimizer, steps) for optimizer in optimizers], Log("diffusion", steps)
    forward = torch.compile(trained) if fast else trained
    for step in range(steps):
        asked = [rng.choice(captions) for _ in range(32)]
        x0 = latents[bank.rows([REDRAW(a, rng) for a in asked], rng)]
        rows = torch.tensor([index[None if rng.random() < 0.1 else a] for a in asked])
        timesteps, noise = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(x0),)), torch.randn_like(x0)
        velocity = forward(pipe.scheduler.add_noise(x0, noise, timesteps), timesteps, hidden[rows], return_dict=False)[0]
        loss = F.mse_loss(velocity, pipe.scheduler.get_velocity(x0, noise, timesteps))
        apply(loss, optimizers, rates, trained.parameters())
        beta = min(0.995, (step + 1) / (step + 20))
        with torch.no_grad():
            for a, b in zip(average.parameters(), trained.parameters()):
                a.lerp_(b, 1 - beta)
        log(step, loss)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            pipe.register_modules(unet=average)
            keep(step + 1, pipe)
    return pipe


def save(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """What the flow policy's folder has not: the UNet in fp16, the scheduler and the index."""
    copy.deepcopy(pipe.unet).half().save_pretrained(folder / "unet")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.save_config(folder)
    index = folder / "model_index.json"
    components = json.loads(index.read_text()) | {"tokenizer": ["transformers", "CLIPTokenizerFast"]}  # as transformers 4 names it too
    index.write_text(json.dumps(components, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write the UNet, the scheduler and card.json to")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--compile", action="store_true", help="compile the UNet: faster, where a C++ compiler is installed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    start, reward, cards = time.time(), CLIPModel.from_pretrained(REWARD, torch_dtype=torch.float32).eval(), []

    def keep(step: int, pipe: StableDiffusionPipeline) -> None:
        cards.append({**figures(pipe, reward, steps=STEPS), "steps": step, "minutes": (time.time() - start) / 60, "torch": torch.__version__})
        print(cards[-1], flush=True)
        save(pipe, options.output)
        (options.output / "card.json").write_text(json.dumps(cards[-1], indent=2) + "\n")

    train(make(options.seed), Bank.drawn(), options.steps, options.seed, options.compile, keep)


if __name__ == "__main__":
    main()
