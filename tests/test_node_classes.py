"""What every node declares, and the ids and names that saved graphs depend on."""

import inspect

import pytest

from comfy_dancegrpo import nodes
from comfy_dancegrpo.workflow.schema import inputs_of

REGISTRY = {**nodes.HOST_CLASS_MAPPINGS, **nodes.NODE_CLASS_MAPPINGS}

# For ever: a saved graph holds widget values by their order and links by slot. New inputs and outputs go last (a required widget
# never goes before an old one); nothing is renamed, reordered or removed.
RECORDED = {
    # id: (required inputs, optional inputs, outputs by type)
    "DanceGRPOLoadPolicy": ("policy dtype", "vae text_encoder text_encoder_2 text_encoder_3 components prompt_cache guidance_scale_2 quantization attention_backend compile transformer_2 image_encoder", "DANCEGRPO_POLICY"),
    "DanceGRPOPromptSet": ("text file limit", "image", "DANCEGRPO_PROMPTS"),
    "DanceGRPOLoopStart": (
        "policy prompts run_name iterations prompts_per_iteration seed learning_rate weight_decay lora_rank lora_alpha lora_targets "
        "ema_decay micro_batch checkpoint_every on_existing", "warmup schedule lora optimizer gradient_checkpointing checkpoints_kept on_out_of_memory schedule_cycles processes schedule_power schedule_rules curriculum", "DANCEGRPO_LIVE_POLICY DANCEGRPO_PROMPTS INT"),
    "DanceGRPOGroupSample": (
        "policy prompts group_size steps transition eta shift guidance_scale width height initial_noise", "frames noise_steps window_size window_interval noise_share ode_solver eta_end", "DANCEGRPO_ROLLOUT IMAGE"),
    "DanceGRPOLoadReward": ("reward model batch_size", "base frames frame_score device fps offload", "DANCEGRPO_REWARD"),
    "DanceGRPOScore": ("rollout reward weight", "images scores", "DANCEGRPO_SCORES"),
    "DanceGRPORemoteReward": ("address reward batch_size connections timeout retries", "fps", "DANCEGRPO_REWARD"),
    "DanceGRPOJudgeReward": ("address model question low high connections timeout retries", "frames reference name", "DANCEGRPO_REWARD"),
    "DanceGRPOScoresFromNumbers": ("rollout numbers name weight", "scores", "DANCEGRPO_SCORES"),
    "DanceGRPOAdjustScores": ("scores operation threshold low high column", "", "DANCEGRPO_SCORES"),
    "DanceGRPOAdvantage": ("scores clamp", "combine best_of estimator min_advantage best_of_end", "DANCEGRPO_ADVANTAGES"),
    "DanceGRPOSample": ("policy prompts steps guidance_scale width height frames noise_seed samples_per_prompt", "lora", "IMAGE"),
    "DanceGRPOUpdate": ("policy advantages clip_range train_fraction optimizer_steps max_grad_norm", "max_skipped_steps objective clip_range_high kl_weight nft_beta", "DANCEGRPO_UPDATE"),
    "DanceGRPOLoopEnd": ("update", "", "DANCEGRPO_LORA DANCEGRPO_RUN"),
    "DanceGRPOLoopRunner": ("body", "", "DANCEGRPO_LORA DANCEGRPO_RUN"),
    "DanceGRPOEvaluate": (
        "policy lora prompts reward steps shift guidance_scale width height noise_seed samples_per_prompt batch_size grid_columns grid_rows",
        "reward_2 reward_3 frames", "IMAGE FLOAT STRING"),
    "DanceGRPOWatch": (
        "policy update prompts reward every max_drop patience below steps shift guidance_scale width height noise_seed samples_per_prompt batch_size",
        "reward_2 max_drop_2 reward_3 max_drop_3 frames", ""),
    "DanceGRPOPlotMetrics": ("run width height", "picture_statistics", "IMAGE"),
    "DanceGRPOSaveLora": ("lora filename", "", ""),
    "DanceGRPOSaveVideo": ("images fps filename_prefix", "", ""),
    "DanceGRPOApplyPolicyLora": ("model lora strength", "clip expert", "MODEL CLIP"),
    "DanceGRPOLoadLora": ("policy lora", "", "DANCEGRPO_LORA"),
    # ComfyUI's own, as it declares them
    "SaveImage": ("images filename_prefix", "", ""),
    "PreviewImage": ("images", "", ""),
    "LoadImage": ("image", "", "IMAGE MASK"),
    "PrimitiveInt": ("value", "", "INT"),
    "PrimitiveFloat": ("value", "", "FLOAT"),
    "PrimitiveString": ("value", "", "STRING"),
    "PrimitiveStringMultiline": ("value", "", "STRING"),
    "PrimitiveBoolean": ("value", "", "BOOLEAN"),
}
# the choices that saved graphs hold; more may come, none may go
CHOICES = {
    "DanceGRPOLoadPolicy.policy": {"embedded", "embedded_diffusion"},
    "DanceGRPOLoadPolicy.prompt_cache": {"memory", "disk"},
    "DanceGRPOLoadPolicy.quantization": {"none", "int8 (torchao)", "float8 (torchao)", "8-bit (bitsandbytes)", "nf4 (bitsandbytes)"},
    "DanceGRPOLoadPolicy.attention_backend": {"default", "native", "flash", "flash_varlen", "flex", "xformers", "_native_flash", "_native_efficient",
                                              "_native_cudnn", "_native_math", "_flash_3", "_flash_varlen_3"},
    "DanceGRPOLoadPolicy.dtype": {"float32", "bfloat16", "float16"},
    "DanceGRPOLoopStart.lora_targets": {"attention", "attention and feed-forward", "all linear layers", "modulation", "all weights (no LoRA)"},
    "DanceGRPOLoopStart.optimizer": {"adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "prodigy"},
    "DanceGRPOLoopStart.on_out_of_memory": {"stop", "halve"},
    "DanceGRPOLoopStart.on_existing": {"new", "resume", "restart"},
    "DanceGRPOLoopStart.schedule": {"constant", "inverse_sqrt", "linear", "cosine", "cosine_with_restarts", "polynomial", "piecewise_constant"},
    "DanceGRPOWatch.below": {"best", "start"},
    "DanceGRPOGroupSample.transition": {"dance_sde", "flow_grpo_sde", "cps", "ode", "ddim"},
    "DanceGRPOGroupSample.initial_noise": {"shared", "independent"},
    "DanceGRPOGroupSample.noise_steps": {"all", "window", "branch"},
    "DanceGRPOGroupSample.ode_solver": {"euler", "dpm++ 2m"},
    "DanceGRPOLoadReward.reward": {"aesthetic", "clip_score", "hps_v2", "pickscore", "hps_v3", "image_reward", "jpeg_size", "ocr", "shapes_agreement",
                                  *(f"video_align_{part}{raw}" for part in ("visual", "motion", "text", "overall") for raw in ("", "_raw"))},
    "DanceGRPOLoadReward.model": {"embedded"},
    "DanceGRPOLoadReward.base": {"published"},
    "DanceGRPOLoadReward.frame_score": {"mean", "worst"},
    "DanceGRPOAdjustScores.operation": {"threshold", "rank", "clip", "negate"},
    "DanceGRPOAdvantage.combine": {"normalise each, then sum", "sum, then normalise"},
    "DanceGRPOUpdate.objective": {"clipped", "grpo_guard", "reinforce", "diffusion_nft", "awm"},
    "DanceGRPOAdvantage.estimator": {"group", "group mean, batch std", "per-prompt history", "batch", "rank", "leave-one-out", "learned value"},
}
ENGINE_BUILT = {"DanceGRPOLoopStart", "DanceGRPOLoopRunner"}  # called by the loop, with what it made

every_node = pytest.mark.parametrize("name, cls", REGISTRY.items(), ids=REGISTRY)


def test_ids_and_names_are_the_recorded_ones():
    found = {name: tuple(" ".join(part) for part in (types.get("required", {}), types.get("optional", {}), cls.RETURN_TYPES))
             for name, cls in REGISTRY.items() for types in [cls.INPUT_TYPES()]}
    assert found == RECORDED


@pytest.mark.parametrize("where", CHOICES)
def test_recorded_choices_are_still_there(where):
    name, _, choice = where.partition(".")
    assert CHOICES[where] <= set(inputs_of(REGISTRY[name].INPUT_TYPES())[choice].choices)


@every_node
def test_inputs_say_what_they_are(name, cls):
    for item in inputs_of(cls.INPUT_TYPES()).values():
        where, options = f"{name}.{item.name}", item.options
        assert len(options.get("tooltip", "")) > 5, where
        if item.type in ("INT", "FLOAT") and item.is_widget:
            assert options["min"] <= options["default"] <= options["max"] and options["min"] < options["max"], where
            kind = int if item.type == "INT" else float
            assert all(isinstance(options[key], kind) for key in ("min", "default", "max")), where
        elif item.choices:
            assert options.get("default", item.choices[0]) in item.choices, where
        elif item.is_widget and item.choices is None:
            assert "default" in options, where


@every_node
def test_outputs_are_named_and_told(name, cls):
    types = cls.RETURN_TYPES
    assert len(getattr(cls, "RETURN_NAMES", types)) == len(getattr(cls, "OUTPUT_TOOLTIPS", types)) == len(types)
    assert cls.DESCRIPTION and cls.CATEGORY and (types or cls.OUTPUT_NODE)
    if name in nodes.NODE_CLASS_MAPPINGS and name != "DanceGRPOLoopRunner" and types:
        assert cls.RETURN_NAMES and all(cls.OUTPUT_TOOLTIPS)


@every_node
def test_the_function_takes_exactly_the_inputs(name, cls):
    types = cls.INPUT_TYPES()
    taken = inspect.signature(getattr(cls, cls.FUNCTION)).parameters
    rest = [p for p in taken.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    named = {n: p for n, p in taken.items() if p not in rest and n != "self"}
    declared = [n for kind in ("required", "optional", "hidden") for n in types.get(kind, {})]
    assert set(named) <= set(declared) and (set(named) == set(declared) or (rest and name in ENGINE_BUILT))
    assert not rest or name in ENGINE_BUILT
    assert all(named[n].default is not inspect.Parameter.empty for n in types.get("optional", {}) if not rest)  # the host leaves them out


def test_display_names_are_all_there_and_differ():
    names = nodes.NODE_DISPLAY_NAME_MAPPINGS
    assert names.keys() == nodes.NODE_CLASS_MAPPINGS.keys() and len(set(names.values())) == len(names)
    assert not nodes.NODE_CLASS_MAPPINGS.keys() & nodes.HOST_CLASS_MAPPINGS.keys()
