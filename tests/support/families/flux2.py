import dataclasses

import numpy as np
import tiny
from comfy_dancegrpo.grpo.protocol import Size
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from . import PROMPTS, Case, pictured

# comfy.utils.flux_to_diffusers, since it knows FLUX.2
KEYS = (r"transformer\.transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out)\.lora_[AB]\.weight",
        r"transformer\.transformer_blocks\.\d+\.(ff|ff_context)\.linear_(in|out)\.lora_[AB]\.weight",
        r"transformer\.single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)\.lora_[AB]\.weight")
MISTRAL = ("{% for message in messages %}[{{ message.role }}]{% for part in message.content %}{{ part.text }}{% endfor %}"
           "[/{{ message.role }}]{% endfor %}")
QWEN = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


def parts(guidance_embeds):
    vae = tiny.seeded(AutoencoderKLFlux2, block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1,
                      down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.5, 1.5)
    transformer = tiny.seeded(Flux2Transformer2DModel, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                              num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance_embeds)
    return {"vae": vae, "transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)}


def flux2():
    """The pipeline takes the outputs of its text encoder's layers 10, 20 and 30."""
    tokenizer = tiny.byte_bpe([SYSTEM_MESSAGE, *PROMPTS], ("<pad>", "[system]", "[/system]", "[user]", "[/user]"), chat_template=MISTRAL)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8, "image_size": 32,
              "patch_size": 16, "model_type": "pixtral"}
    config = Mistral3Config(text_config={"model_type": "mistral", **tiny.decoder_config(tokenizer, width=16, layers=30)}, vision_config=vision)
    return Flux2Pipeline(**parts(True), tokenizer=tokenizer, text_encoder=tiny.seeded(Mistral3ForConditionalGeneration, config))


def klein(distilled=False):
    """The pipeline takes the outputs of its text encoder's layers 9, 18 and 27."""
    tokenizer = tiny.byte_bpe(PROMPTS, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), chat_template=QWEN)
    config = Qwen3Config(**tiny.decoder_config(tokenizer, width=16, layers=27))
    return Flux2KleinPipeline(**parts(False), tokenizer=tokenizer, text_encoder=tiny.seeded(Qwen3ForCausalLM, config), is_distilled=distilled)


def draw(pipeline, asked):
    """One picture a call, its reference seen in the size of what is drawn."""
    height, width = asked.size.height, asked.size.width
    found = []
    for prompt, latents in zip(asked.prompts, asked.latents):
        picture = getattr(prompt, "picture", None)
        found.append(pipeline(
            image=picture and pipeline.image_processor.resize(picture.image(), height, width), prompt=str(prompt), latents=latents[None],
            height=height, width=width, num_inference_steps=asked.steps, guidance_scale=asked.guidance_scale, output_type="np").images)
    return np.concatenate(found)


DEV = Case("flux-2-dev", flux2, KEYS, draw, odd=Size(64, 56), targets="attention and feed-forward")
KLEIN = dataclasses.replace(DEV, name="flux-2-klein", build=klein)
CASES = [
    DEV, dataclasses.replace(DEV, name="flux-2-dev-edit", prompts=pictured()),
    KLEIN, dataclasses.replace(KLEIN, name="flux-2-klein-edit", prompts=pictured()),
    dataclasses.replace(KLEIN, name="flux-2-klein-distilled", build=lambda: klein(distilled=True), guidance_matters=False),
]
