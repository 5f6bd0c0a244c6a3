"""Makes the embedded policy and reward from nothing but `shapes.py`: about fifty minutes on two cores with --compile.

    python -m comfy_dancegrpo.embedded.pretrain --output FOLDER

Stages, each kept in FOLDER as it ends: tokenizers, VAE, reward (a CLIP trained contrastively), flow (the FLUX transformer with
its two text encoders), and `card.json` with the figures of the whole. The captions of the flow are followed only partly:
attributes of a training picture are redrawn with the probabilities of `REDRAW`, so that reinforcement has something to do. The
validation and test captions are never shown to the flow. Wants transformers 5; what it writes is read by 4 and 5 alike.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from . import shapes

TOKENS = 16
# Colour and background are redrawn most: a picture is then sharp and wrong, where a redrawn shape leaves a blend of two.
REDRAW = shapes.Redraw(size=0.15, colour=0.3, shape=0.1, place=0.15, background=0.3)


@dataclass
class Bank:
    """Every combination of attributes, drawn `copies` times: pictures [N * copies, 3, 64, 64] float32 in -1..1."""

    attributes: list[shapes.Attributes]
    copies: int
    pictures: torch.Tensor

    @classmethod
    def drawn(cls, copies: int = 1, rng: random.Random | None = None) -> Bank:
        """With `rng` each picture has its own jitter: augmentation for the VAE and the reward. The flow learns the exact ones."""
        attributes = shapes.every()
        arrays = [np.asarray(shapes.draw(a, rng)) for a in attributes for _ in range(copies)]
        return cls(attributes, copies, torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1)

    def rows(self, wanted: list[shapes.Attributes], rng: random.Random) -> torch.Tensor:
        """A random picture's row for each of the wanted attributes."""
        index = {a: i for i, a in enumerate(self.attributes)}
        return torch.tensor([index[a] * self.copies + rng.randrange(self.copies) for a in wanted])


def schedule(optimizer: torch.optim.Optimizer, steps: int, decay: float = 0.5) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up over 2 % of the steps, constant, then linear to zero over the last `decay` share."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / (0.02 * steps + 1), max(0.0, (steps - i) / (decay * steps)))
    )


class Log:
    """A line every `every` steps: step, mean loss since the last line, seconds."""

    def __init__(self, stage: str, steps: int, every: int = 100):
        self.stage, self.steps, self.every, self.start, self.losses = stage, steps, every, time.time(), []

    def __call__(self, step: int, loss: torch.Tensor) -> None:
        self.losses.append(loss.item())
        if (step + 1) % self.every == 0:
            print(f"{self.stage} {step + 1}/{self.steps} loss {np.mean(self.losses):.4f} {time.time() - self.start:.0f} s", flush=True)
            self.losses.clear()


# -- tokenizers -----------------------------------------------------------------------------------------------------


def make_clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE, its merges learned from the captions, so that each caption word is one token."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(
        (a.caption for a in shapes.every()),
        trainers.BpeTrainer(vocab_size=4000, end_of_word_suffix="</w>", special_tokens=[], show_progress=False),
    )
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = dict.fromkeys([*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), start, end])
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, model_max_length=TOKENS)


def make_t5_tokenizer() -> T5TokenizerFast:
    """A T5 (Unigram) tokenizer of the caption words; other words become <unk>."""
    words = sorted({w for a in shapes.every() for w in a.caption.split()})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0), *((f"▁{w}", -2.0) for w in words)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=TOKENS)


def token_ids(tokenizer, captions: list[str]) -> torch.Tensor:
    """[N, TOKENS] int64."""
    return tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


# -- VAE ------------------------------------------------------------------------------------------------------------


def train_vae(bank: Bank, steps: int, seed: int) -> AutoencoderKL:
    """4x downsampling, 8 latent channels; fully convolutional, so that it trains on 32x32 crops."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(32, 48, 64), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=16,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, sample_size=shapes.PICTURE_SIZE,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    rate, log = schedule(optimizer, steps, 0.6), Log("vae", steps)
    for step in range(steps):
        rows = torch.randint(len(bank.pictures), (48,))
        y, x = torch.randint(0, 9, (2, 48)) * 4
        crops = torch.stack([bank.pictures[r, :, b: b + 32, a: a + 32] for r, a, b in zip(rows, x, y)])
        posterior = vae.encode(crops).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.pow(2) + posterior.var - 1 - posterior.logvar).mean()
        loss = F.mse_loss(decoded, crops) + 0.3 * F.l1_loss(decoded, crops) + 3e-4 * kl
        apply(loss, [optimizer], [rate], vae.parameters())
        log(step, loss.detach())
    latents = encode(vae, bank.pictures[:: bank.copies])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Posterior means, [N, 8, 16, 16], not scaled."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(64)])


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in pictures.split(64)])
    return -10 * torch.log10(F.mse_loss(decoded.clamp(-1, 1) / 2, pictures / 2)).item()


# -- reward ---------------------------------------------------------------------------------------------------------


def train_reward(bank: Bank, tokenizer: CLIPTokenizer, steps: int, seed: int) -> CLIPModel:
    """Contrastive (arXiv 2103.00020), half of each batch a neighbour of the other half: one attribute differs."""
    torch.manual_seed(seed)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = CLIPModel(CLIPConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=TOKENS, **ends),
        vision_config=dict(hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                           image_size=shapes.PICTURE_SIZE, patch_size=8),
        projection_dim=64,
    ))
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1.5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rate, log = schedule(optimizer, steps), Log("reward", steps)
    for step in range(steps):
        half = rng.sample(bank.attributes, 48)
        batch = list(dict.fromkeys([*half, *(_neighbour(a, rng) for a in half)]))
        output = model(input_ids=token_ids(tokenizer, [a.caption for a in batch]),
                       pixel_values=_augmented(bank.pictures[bank.rows(batch, rng)]), return_loss=True)
        apply(output.loss, [optimizer], [rate], model.parameters())
        model.logit_scale.data.clamp_(max=4.0)
        log(step, output.loss.detach())
    return model.eval()


def _neighbour(attributes: shapes.Attributes, rng: random.Random) -> shapes.Attributes:
    values = [getattr(attributes, name) for name in ("size", "colour", "shape", "place", "background")]
    k = rng.randrange(len(values))
    values[k] = rng.choice([v for v in shapes.VALUES[k] if v != values[k]])
    return shapes.Attributes(*values)


def _augmented(pictures: torch.Tensor) -> torch.Tensor:
    """Some blur and noise, so that the reward reads the soft pictures of a young policy too."""
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(len(pictures), 1, 1, 1).mul(2).sub(1).clamp(min=0)
    noise = torch.rand(len(pictures), 1, 1, 1) * 0.15
    return torch.lerp(pictures, blurred, share) + noise * torch.randn_like(pictures)


@torch.no_grad()
def cosine(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """[N] cosine similarity of pictures [N, 3, 64, 64] in -1..1 with their captions."""
    output = model(input_ids=token_ids(tokenizer, captions), pixel_values=pictures)
    return (output.image_embeds * output.text_embeds).sum(-1)


# -- flow -----------------------------------------------------------------------------------------------------------


def make_flow(clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast, vae: AutoencoderKL, reward: CLIPModel, seed: int) -> FluxPipeline:
    """A new transformer and T5; the CLIP text encoder begins as the reward's, which tells the captions apart already."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=32, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=False, axes_dims_rope=(4, 14, 14),
    )
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(clip_tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TOKENS, bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id, pad_token_id=clip_tokenizer.pad_token_id,
    ))
    clip.load_state_dict(reward.text_model.state_dict())
    t5 = T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                                 dropout_rate=0.0, feed_forward_proj="gated-gelu"))
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, clip, clip_tokenizer, t5, t5_tokenizer, transformer)


def train_flow(pipe: FluxPipeline, bank: Bank, steps: int, seed: int, fast: bool, keep=lambda step, pipe: None) -> FluxPipeline:
    """Rectified flow matching (arXiv 2403.03206, eq. 14) with logit-normal sigmas; returns the moving average.

    The blocks' matrices are trained with Muon (arXiv 2502.16982), in a third of the steps that AdamW takes here; the rest with AdamW.
    """
    rng, captions = random.Random(seed), [shapes.parse(c) for c in shapes.splits()["train"]]
    torch.manual_seed(seed)
    vae = pipe.vae
    latents = (encode(vae, bank.pictures) - vae.config.shift_factor) * vae.config.scaling_factor
    latents = pipe._pack_latents(latents, len(latents), 8, 16, 16)
    trained = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).train()
    average = copy.deepcopy(trained).eval().requires_grad_(False)
    ids = pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32), torch.zeros(TOKENS, 3)
    matrices = [p for name, p in pipe.transformer.named_parameters() if p.ndim == 2 and "blocks" in name]
    rest = [p for p in trained.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, 1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, 2e-3, betas=(0.9, 0.99), weight_decay=0.01),
    ]
    rates, log = [schedule(optimizer, steps) for optimizer in optimizers], Log("flow", steps)
    forward = torch.compile(pipe.transformer) if fast else pipe.transformer
    index = {a: i for i, a in enumerate(bank.attributes)}
    clip_ids, t5_ids = (token_ids(t, [a.caption for a in bank.attributes]) for t in (pipe.tokenizer, pipe.tokenizer_2))
    for step in range(steps):
        asked = [rng.choice(captions) for _ in range(64)]
        x0 = latents[bank.rows([REDRAW(a, rng) for a in asked], rng)]
        sigma = torch.sigmoid(0.4 + 1.2 * torch.randn(len(x0)))
        noise = torch.randn_like(x0)
        rows = torch.tensor([index[a] for a in asked])
        velocity = forward(
            hidden_states=torch.lerp(x0, noise, sigma[:, None, None]), timestep=sigma,
            encoder_hidden_states=pipe.text_encoder_2(t5_ids[rows])[0],
            pooled_projections=pipe.text_encoder(clip_ids[rows]).pooler_output,
            img_ids=ids[0], txt_ids=ids[1], return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, noise - x0)
        apply(loss, optimizers, rates, trained.parameters())
        beta = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            for a, b in zip(average.parameters(), trained.parameters()):
                a.lerp_(b, 1 - beta)
        log(step, loss.detach())
        if (step + 1) % 500 == 0 or step + 1 == steps:
            pipe.register_modules(transformer=average[0], text_encoder=average[1], text_encoder_2=average[2])
            keep(step + 1, pipe)
            pipe.register_modules(transformer=trained[0], text_encoder=trained[1], text_encoder_2=trained[2])
    pipe.register_modules(transformer=average[0], text_encoder=average[1], text_encoder_2=average[2])
    return pipe


def apply(loss: torch.Tensor, optimizers: list[torch.optim.Optimizer], rates: list, parameters) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer, rate in zip(optimizers, rates):
        optimizer.step()
        rate.step()
        optimizer.zero_grad()


# -- the whole ------------------------------------------------------------------------------------------------------


def sample(pipe, captions: list[str], steps: int, seed: int) -> np.ndarray:
    """[N, 64, 64, 3] float, 0..1, by the pipeline itself, without guidance."""
    parts = []
    length = {"max_sequence_length": TOKENS} if isinstance(pipe, FluxPipeline) else {}
    for k in range(0, len(captions), 32):
        generator = torch.Generator().manual_seed(seed + k)
        parts.append(pipe(captions[k: k + 32], height=64, width=64, num_inference_steps=steps, guidance_scale=0.0,
                          generator=generator, output_type="np", **length).images)
    return np.concatenate(parts)


def figures(pipe, reward: CLIPModel, seed: int = 7, steps: int = 8) -> dict[str, float]:
    """How the pictures of the base stand between true pictures and true pictures under shuffled captions (validation captions)."""
    pipe.set_progress_bar_config(disable=True)
    captions, rng = shapes.splits()["validation"], random.Random(seed)
    true = np.stack([np.asarray(shapes.draw(shapes.parse(c), rng)) / 255 for c in captions])
    made = sample(pipe, captions, steps, seed)

    def mean(pictures: np.ndarray, texts: list[str]) -> float:
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() * 2 - 1
        return cosine(reward, pipe.tokenizer, pixels, texts).mean().item()

    ceiling, floor, base = mean(true, captions), mean(true, captions[1:] + captions[:1]), mean(made, captions)
    return {"reward_true": ceiling, "reward_shuffled": floor, "reward_base": base,
            "base_of_scale": (base - floor) / (ceiling - floor),
            "agreement_base": float(np.mean([shapes.agreement(p, c) for p, c in zip(made, captions)]))}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write policy/, reward/, prompts/ and card.json to")
    parser.add_argument("--vae-steps", type=int, default=800)
    parser.add_argument("--reward-steps", type=int, default=1500)
    parser.add_argument("--flow-steps", type=int, default=3000)
    parser.add_argument("--compile", action="store_true", help="compile the transformer: faster, where a C++ compiler is installed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    minutes, start, bank = {}, time.time(), Bank.drawn(8, random.Random(options.seed))
    clip_tokenizer, t5_tokenizer = make_clip_tokenizer(), make_t5_tokenizer()
    for name, captions in shapes.splits().items():
        path = options.output / "prompts" / f"shapes_{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(captions) + "\n", encoding="utf-8", newline="\n")

    vae = train_vae(bank, options.vae_steps, options.seed)
    card = {"vae_psnr_db": psnr(vae, bank.pictures[5:: 151])}
    print(card, flush=True)
    minutes["vae"], start = (time.time() - start) / 60, time.time()
    reward = train_reward(bank, clip_tokenizer, options.reward_steps, options.seed)
    minutes["reward"], start = (time.time() - start) / 60, time.time()
    save_reward(reward, clip_tokenizer, options.output / "reward")

    def keep(step: int, pipe: FluxPipeline) -> None:
        """Writes the policy so far in fp16, so that an early look is possible."""
        print({"step": step, **figures(pipe, reward)}, flush=True)
        copy.deepcopy(pipe).to(torch.float16).save_pretrained(options.output / "policy")
        make_portable(options.output / "policy")

    pipe = make_flow(clip_tokenizer, t5_tokenizer, vae, reward, options.seed)
    pipe = train_flow(pipe, Bank.drawn(), options.flow_steps, options.seed, options.compile, keep)
    minutes["flow"] = (time.time() - start) / 60
    card |= figures(pipe, reward) | {"minutes": minutes, "torch": torch.__version__,
                                     "steps": [options.vae_steps, options.reward_steps, options.flow_steps]}
    (options.output / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(card)


def save_reward(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": shapes.PICTURE_SIZE, "width": shapes.PICTURE_SIZE}
    CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)


def make_portable(policy: Path) -> None:
    """What transformers 5 saves, in the form that transformers 4 reads too: that is what many ComfyUI environments have."""
    weights = policy / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in tensors.items()},
              weights, metadata={"format": "pt"})
    index = policy / "model_index.json"
    components = json.loads(index.read_text())
    components |= {"tokenizer": ["transformers", "CLIPTokenizerFast"], "tokenizer_2": ["transformers", "T5TokenizerFast"]}
    index.write_text(json.dumps(components, indent=2) + "\n")
    for path in policy.glob("tokenizer*/tokenizer_config.json"):
        settings = json.loads(path.read_text())
        settings.pop("extra_special_tokens", None)  # a list here, and transformers 4 takes a dictionary
        path.write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
