import tiny
from comfy_dancegrpo.grpo.protocol import Size
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from . import Case, draw_video, draw_video_of_picture, pictured

SIZE, ODD = Size(32, 32, 5), Size(32, 40, 5)


class FirstOrder(FlowMatchEulerDiscreteScheduler):
    """Euler steps on another scheduler's sigmas and timesteps."""

    def __init__(self, other):
        super().__init__()
        self._other = other

    def set_timesteps(self, steps, device=None, **more):
        super().set_timesteps(steps, device=device)
        self._other.set_timesteps(steps, device=device, **more)
        self.sigmas, self.timesteps = self._other.sigmas, self._other.timesteps
        self.sigmas[0] = 1  # which UniPC's logarithms keep it 1e-6 from

    def step(self, output, timestep, sample, **more):
        return super().step(output, timestep.float(), sample, **more)  # it takes no integers, which the other's are


def text_encoder():
    config = UMT5Config(vocab_size=len(tiny.t5_tokenizer()), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    return tiny.seeded(UMT5EncoderModel, config, seed=1)


def vae(**more):
    config = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True], **more}
    return tiny.seeded(AutoencoderKLWan, seed=2, **config)


def transformer(seed: int = 3, **more):
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16, "text_dim": 32, "freq_dim": 32,
              "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32, **more}
    return tiny.seeded(WanTransformer3DModel, seed=seed, **config)


def parts(**more):
    return {"tokenizer": tiny.t5_tokenizer(), "text_encoder": text_encoder(), "vae": vae(), "transformer": transformer(),
            "scheduler": UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0), **more}


def wan21():
    return WanPipeline(**parts())


def wan22_a14b():
    return WanPipeline(**parts(transformer_2=transformer(seed=4)), boundary_ratio=0.875)


def wan22_ti2v():
    """The VAE's kind of TI2V-5B: residual, and 2x2 pixels at a time."""
    compact = vae(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)
    return WanPipeline(**parts(vae=compact), expand_timesteps=True)


def wan21_i2v():
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return WanImageToVideoPipeline(**parts(transformer=transformer(in_channels=36, image_dim=16, added_kv_proj_dim=24)),
                                   image_encoder=tiny.seeded(CLIPVisionModel, vision, seed=5), image_processor=processor)


def wan22_i2v():
    return WanImageToVideoPipeline(**parts(transformer=transformer(in_channels=36), transformer_2=transformer(seed=4, in_channels=36)),
                                   boundary_ratio=0.875)


def first_order(pipeline):
    if not isinstance(pipeline.scheduler, FirstOrder):
        pipeline.register_modules(scheduler=FirstOrder(pipeline.scheduler))


def draw(pipeline, asked):
    """[N, F, H, W, 3], or of one frame [N, H, W, 3]."""
    first_order(pipeline)
    videos = draw_video(pipeline, asked)
    return videos[:, 0] if asked.size.frames == 1 else videos


def draw_from_picture(pipeline, asked):
    """The pipeline takes one picture a call."""
    if not isinstance(pipeline, WanImageToVideoPipeline):  # TI2V-5B is published as a WanPipeline
        pipeline = WanImageToVideoPipeline(**pipeline.components, expand_timesteps=True)
    pipeline.set_progress_bar_config(disable=True)
    first_order(pipeline)
    return draw_video_of_picture(pipeline, asked)


def load_both(pipeline, paths):
    high, low = paths
    assert high.stem.endswith("_high_noise") and low.stem.endswith("_low_noise")
    pipeline.load_lora_weights(high)
    pipeline.load_lora_weights(low, load_into_transformer_2=True)


CASES = [
    Case("wan-2.1", wan21, "wan", draw, size=SIZE, odd=ODD),
    Case("wan-2.1-picture", wan21, "wan", draw, size=Size(32, 32), odd=Size(32, 40)),
    Case("wan-2.2-a14b", wan22_a14b, "wan", draw, size=SIZE, odd=ODD, load_lora=load_both),
    Case("wan-2.2-ti2v", wan22_ti2v, "wan", draw, size=Size(64, 64, 5), odd=Size(64, 80, 5)),
    Case("wan-2.2-ti2v-pictured", wan22_ti2v, "wan", draw_from_picture, pictured(), Size(64, 64, 5), Size(64, 80, 5)),
    Case("wan-2.1-i2v", wan21_i2v, "wan", draw_from_picture, pictured(), SIZE, ODD),
    Case("wan-2.2-i2v-a14b", wan22_i2v, "wan", draw_from_picture, pictured(), SIZE, ODD, load_lora=load_both),
]
