"""A policy's transformer as a MODEL of ComfyUI, LoRAs for it, and the two compared: what Apply Policy LoRA is tested with."""

import dataclasses

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch


class FluxModel:
    """ComfyUI's own Flux with the weights of the policy's diffusers transformer, by ComfyUI's own key map."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "build", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"policy": ("DANCEGRPO_POLICY",)}}

    def build(self, policy):
        c = policy.denoiser.config
        config = comfy.supported_models.FluxSchnell({
            "image_model": "flux", "in_channels": c.in_channels // 4, "out_channels": c.in_channels // 4, "patch_size": 2,
            "vec_in_dim": c.pooled_projection_dim, "context_in_dim": c.joint_attention_dim, "mlp_ratio": 4.0, "theta": 10000,
            "hidden_size": c.num_attention_heads * c.attention_head_dim, "num_heads": c.num_attention_heads, "depth": c.num_layers,
            "depth_single_blocks": c.num_single_layers, "axes_dim": list(c.axes_dims_rope), "qkv_bias": True,
            "guidance_embed": c.guidance_embeds, "dtype": torch.float32})
        config.manual_cast_dtype = None
        left = {name: value.clone() for name, value in policy.denoiser.state_dict().items()}
        model = config.get_model({})
        model.diffusion_model.load_state_dict(comfy.model_detection.convert_diffusers_mmdit(left), strict=True)
        assert left == {}, f"no place for {sorted(left)}"
        model.eval()
        devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
        return (comfy.model_patcher.ModelPatcher(model, *devices),)


class RandomLora:
    """A LORA as Loop End gives it, both of its factors large, on every layer that a policy of this family can train."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("DANCEGRPO_LORA",), "build", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"policy": ("DANCEGRPO_POLICY",), "of": (["this policy", "another family", "another size"],)}}

    def build(self, policy, of):
        from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings

        settings = LoraSettings(rank=4, alpha=10.0, targets="all linear layers")
        adapter = Adapter(policy, settings)
        draw = torch.Generator().manual_seed(0)
        tensors = {name: torch.randn(p.shape, generator=draw) * 0.1 for name, p in adapter.parameters.items()}
        adapter.remove()
        if of == "another family":
            tensors = {name.replace("transformer_blocks", "joint_blocks"): value for name, value in tensors.items()}
        if of == "another size":
            tensors = {name: value[:, :-8] if ".lora_A." in name else value for name, value in tensors.items()}
        return (_snapshot(policy, tensors, settings),)


class RandomWeights:
    """All weights of a full fine-tuning as Loop End gives them, each moved by as much again as it has."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("DANCEGRPO_LORA",), "build", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"policy": ("DANCEGRPO_POLICY",), "of": (["this policy", "another family", "another size"],)}}

    def build(self, policy, of):
        from comfy_dancegrpo.lora.full import FullSettings

        trained = FullSettings().attach(policy)
        draw = torch.Generator().manual_seed(0)
        tensors = {name: p.detach() + torch.randn(p.shape, generator=draw) * p.detach().std(correction=0) for name, p in trained.parameters.items()}
        snapshot = trained.snapshot(tensors, 1, False, None, ())
        trained.remove()
        if of == "another family":
            tensors = {name.replace("norm_out", "norm_end"): value for name, value in tensors.items()}
        if of == "another size":
            tensors["proj_out.bias"] = torch.cat([tensors["proj_out.bias"]] * 2)
        return (dataclasses.replace(snapshot, tensors=tensors),)


def _snapshot(policy, tensors, settings):
    from comfy_dancegrpo.lora.adapter import LoraSnapshot

    known = {"tensors": tensors, "settings": settings, "policy": policy.name, "layout": policy.lora_layout, "iterations": 1,
             "averaged": False, "folder": None}
    assert known.keys() == {f.name for f in dataclasses.fields(LoraSnapshot)} - {"prompts", "source"}
    return LoraSnapshot(**known)


class Compare:
    """The largest difference between one denoising step of a MODEL and of the policy with a LORA (or without), and the picture itself."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = ("INT",), "compare", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"policy": ("DANCEGRPO_POLICY",), "model": ("MODEL",)}, "optional": {"lora": ("DANCEGRPO_LORA",), "after": ("INT",)}}

    def compare(self, policy, model, lora=None, after=0):
        from comfy_dancegrpo.lora.adapter import applied

        c, draw, sigma = policy.denoiser.config, torch.Generator().manual_seed(1), torch.tensor([0.7, 0.2])
        height, width, words = 4, 6, 5  # of patches, and of a text
        latents = torch.randn(2, c.in_channels // 4, height * 2, width * 2, generator=draw)
        text = torch.randn(2, words, c.joint_attention_dim, generator=draw)
        pooled = torch.randn(2, c.pooled_projection_dim, generator=draw)
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        with torch.no_grad():
            theirs = model.model.apply_model(latents, sigma, c_crossattn=text, y=pooled)
            ids = policy.pipeline._prepare_latent_image_ids(2, height, width, latents.device, latents.dtype)

            def velocity():
                packed = policy.pipeline._pack_latents(latents, *latents.shape)
                made = policy.denoiser(hidden_states=packed, timestep=sigma, encoder_hidden_states=text, pooled_projections=pooled,
                                       txt_ids=torch.zeros(words, 3), img_ids=ids, return_dict=False)[0]
                return policy.pipeline._unpack_latents(made, height * 16, width * 16, 8)

            if lora is None:
                ours = latents - sigma.view(2, 1, 1, 1) * velocity()
            else:
                with applied(policy, lora):
                    ours = latents - sigma.view(2, 1, 1, 1) * velocity()
        assert ours.shape == theirs.shape
        return {"ui": {"difference": [(ours - theirs).abs().max().item()], "drawn": theirs.flatten().tolist()}, "result": (0,)}


NODE_CLASS_MAPPINGS = {"TestFluxModel": FluxModel, "TestRandomLora": RandomLora, "TestRandomWeights": RandomWeights, "TestCompare": Compare}
