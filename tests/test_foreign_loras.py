"""LoRAs in the names that others give them, brought to ours: what each layer does to an input is what the file's layers do to it.

Which layer of diffusers is which of a model's own, and which of its rows, is told by ComfyUI's own tables (tests/data/comfyui_lora_keys.json).
"""

import json
import re
from fractions import Fraction

import families as tiny_families
import pytest
import torch
from comfy_dancegrpo import policies
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.grpo.noise import generator
from comfy_dancegrpo.lora import families, files, foreign
from comfy_dancegrpo.lora.adapter import Adapter, LoraSettings
from comfy_dancegrpo.workflow.host import Host, use
from record_comfyui_keys import RECORD
from safetensors.torch import save_file

RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))
FAMILY = {family.title: family for family in families.FAMILIES}
WIDTHS = {"sd1": ("Stable Diffusion 1", 768), "sdxl": ("SDXL", 2048), "sd3": ("Stable Diffusion 3", 1536), "flux": ("FLUX.1", 3072)}
OF_UNETS = ("proj_in", "proj_out", "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn2.to_out.0", "transformer_blocks.0.ff.net.0.proj")
SPELLINGS = {  # what stands before a name, whether its dots become underscores, and its matrices
    "kohya": ("lora_unet_", True, ("lora_down", "lora_up")),
    "ComfyUI": ("diffusion_model.", False, ("lora_A", "lora_B")),
}
RANK, ALPHA = 3, 6.0


def of_class(family):
    module, name = policies.FAMILIES[family.pipelines[0]]
    return policies._class(module, name)


def native_of(recorded, family):
    """{diffusers' layer: (the model's own, first row, rows, of a height of 1)} of those that are trained; in the last block of FLUX.1's."""
    found = {}
    for ours, (own, *part) in RECORDED[recorded]["layers"].items():
        ends = [f".{end}" for end in OF_UNETS] if re.search(r"attentions\.\d+$", ours) else [""]
        for end in ends:
            found[ours.replace(".N.", ".18.") + end] = own.replace(".N.", ".18.") + end, *(map(Fraction, part or ("0", "1")))
    patterns = of_class(family).lora_targets.values()
    return {ours: told for ours, told in found.items() if any(re.fullmatch(pattern, ours) for pattern in patterns)}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("recorded", WIDTHS)
def test_native_names_are_the_layers_that_comfyui_says(recorded, spelling):
    title, width = WIDTHS[recorded]
    (before, flat, (down, up)), native = SPELLINGS[spelling], native_of(recorded, FAMILY[title])
    heights = {own: 1 for own, *_ in native.values()}
    for own, _, rows in native.values():
        heights[own] = max(heights[own], rows.denominator)
    tensors, does, x = {}, {}, torch.randn(width, generator=generator("x"))
    for own, height in heights.items():
        a, b = torch.randn(RANK, width, generator=generator("a", own)), torch.randn(height * width, RANK, generator=generator("b", own))
        name = before + (own.replace(".", "_") if flat else own)
        tensors |= {f"{name}.{down}.weight": a, f"{name}.{up}.weight": b, f"{name}.alpha": torch.tensor(ALPHA)}
        does[own] = b @ (a @ x) * (ALPHA / RANK)
    lora = foreign.parse(tensors, {})
    assert [family.title for family in families.recognise(lora.widths)] == [title]
    found = foreign.read(lora, FAMILY[title])
    assert {name.rpartition(".lora_")[0] for name in found} == native.keys()
    for ours, (own, first, rows) in native.items():
        height = heights[own] * width
        expected = does[own][int(first * height):int((first + rows) * height)]
        torch.testing.assert_close(found[f"{ours}.lora_B.weight"] @ (found[f"{ours}.lora_A.weight"] @ x), expected)
    assert len(native) >= 18


def test_the_names_that_comfyui_has_for_hunyuan_video_in_memory():
    """The record tells both of its names for a layer."""
    native = RECORDED["hunyuan_video"]["layers"]
    pairs = {ours.replace(".N.", ".19."): own.replace(".N.", ".19.") for ours, (own,) in native.items() if ours.startswith(("double_blocks", "single_blocks"))}
    a, b = torch.randn(RANK, 32), torch.randn(3 * 32, RANK)

    def read(names):
        tensors = {f"diffusion_model.{name}.lora_{side}.weight": value for name in names for side, value in (("A", a), ("B", b))}
        return foreign.read(foreign.parse(tensors, {}), FAMILY["HunyuanVideo"])

    first, second = read(pairs), read(pairs.values())
    assert len(pairs) >= 10 and first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_rows_that_the_last_block_of_sd3_has_in_another_order():
    """Shift and scale there, scale and shift in diffusers."""
    a, b = torch.randn(2, 8), torch.randn(16, 2)
    name = "diffusion_model.joint_blocks.23.context_block.adaLN_modulation.1"
    found = foreign.read(foreign.parse({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, {}), FAMILY["Stable Diffusion 3"])
    assert torch.equal(found["transformer_blocks.23.norm1_context.linear.lora_B.weight"], torch.cat([b[8:], b[:8]]))


def test_a_fused_layer_of_several_is_taken_apart_again():
    """As trainers write it that train the parts: each part gets its own matrices back."""
    parts = [(torch.randn(2, 3072), torch.randn(3072, 2)) for _ in range(3)]
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": torch.cat([a for a, _ in parts]), f"{name}.lora_up.weight": torch.block_diag(*(b for _, b in parts))}
    found = foreign.read(foreign.parse(tensors, {}), FAMILY["FLUX.1"])
    for part, (a, b) in zip(("to_q", "to_k", "to_v"), parts):
        assert torch.equal(found[f"transformer_blocks.0.attn.{part}.lora_A.weight"], a) and torch.equal(found[f"transformer_blocks.0.attn.{part}.lora_B.weight"], b)


# -- the families under test, each with a LoRA on all that it trains ---------------------------------------------------------
CASES = ("sd15-pndm", "sdxl-euler", "sd3.5", "flux-dev", "flux-2-klein", "hunyuan-video", "qwen-image", "z-image", "wan-2.1-i2v", "ltx", "ltx-2")


def loaded(name):
    case = next(case for case in tiny_families.cases() if case.name == name)
    pipeline = case.build()
    return policies._class(*policies.FAMILIES[type(pipeline).__name__])(case.name, pipeline, torch.float32), case.targets


@pytest.fixture(scope="module", params=CASES)
def trained(request):
    """A policy, the choice of its layers that is trained, and random matrices of each: {layer: (A, B)}."""
    policy, targets = loaded(request.param)
    return policy, targets, matrices(policy, targets)


def matrices(policy, targets):
    adapter = Adapter(policy, LoraSettings(RANK, RANK, targets))
    tensors = {name: torch.randn(p.shape, generator=generator(name)) for name, p in adapter.parameters.items()}
    adapter.remove()
    return {name.removesuffix(".lora_A.weight"): (a, tensors[name.replace(".lora_A.", ".lora_B.")]) for name, a in tensors.items() if ".lora_A." in name}


def spelt(layers, name, a=".lora_A.weight", b=".lora_B.weight", alpha=ALPHA):
    found = {}
    for layer, (down, up) in layers.items():
        found |= {name(layer) + a: down.contiguous(), name(layer) + b: up.contiguous()}
        if alpha is not None:
            found[name(layer) + ".alpha"] = torch.tensor(alpha)
    return found


def diffusers_prefix(policy):
    return "unet." if hasattr(policy.pipeline, "unet") else "transformer."


def in_todays_diffusers(policy, layers):
    prefix = diffusers_prefix(policy)
    told = {f"{prefix}lora_alpha": 1.0, f"{prefix}r": RANK, f"{prefix}alpha_pattern": {layer: ALPHA for layer in layers}}
    return spelt(layers, lambda layer: prefix + layer, alpha=None), {"lora_adapter_metadata": json.dumps(told)}


def in_diffusers_of_old(policy, layers):
    prefix, tensors = diffusers_prefix(policy), {}
    for layer, (down, up) in layers.items():
        name = re.sub(r"(attn[12]?)\.(to_[qkv]|to_out)(\.0)?$", r"\1.processor.\2_lora", layer) if prefix == "unet." else layer
        name += "" if name.endswith("_lora") else ".lora"
        tensors |= {f"{prefix}{name}.down.weight": down, f"{prefix}{name}.up.weight": up * (ALPHA / RANK)}
    return tensors, {}


NAMES = {
    "diffusers with alpha": lambda policy, layers: (spelt(layers, lambda layer: diffusers_prefix(policy) + layer), {}),
    "diffusers with its metadata": in_todays_diffusers,
    "diffusers of old": in_diffusers_of_old,
    "kohya": lambda policy, layers: (spelt(layers, lambda layer: "lora_unet_" + layer.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"), {}),
    "peft": lambda policy, layers: (spelt(layers, lambda layer: "base_model.model." + layer, ".lora_A.default.weight", ".lora_B.default.weight"), {}),
    "ComfyUI": lambda policy, layers: (spelt(layers, lambda layer: "diffusion_model." + layer), {}),
}


class Saying(Host):
    def __init__(self):
        super().__init__()
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.mark.parametrize("names", NAMES)
def test_it_is_loaded_whole_with_alpha_folded_in(trained, names, tmp_path):
    policy, targets, layers = trained
    tensors, notes = NAMES[names](policy, layers)
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 4), "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(4, 2)}
    save_file({name: value.contiguous() for name, value in (tensors | text).items()}, tmp_path / "theirs.safetensors", metadata=notes)
    with use(Saying()) as host:
        snapshot = files.load(tmp_path / "theirs.safetensors", policy)
    assert snapshot.settings == LoraSettings(RANK, float(RANK), targets) and snapshot.policy == policy.name
    assert snapshot.tensors.keys() == {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    for layer, (a, b) in layers.items():
        assert torch.equal(snapshot.tensors[f"{layer}.lora_A.weight"], a) and torch.equal(snapshot.tensors[f"{layer}.lora_B.weight"], b * (ALPHA / RANK))
    assert host.lines == ["theirs.safetensors: 1 layers of text encoders are left out (lora_te_text_model_encoder_layers_0_mlp_fc1): they are not trained"]


def test_a_lora_of_another_family_is_named_in_one_line(trained, tmp_path):
    policy, _, _ = trained
    family = families.of_pipeline(policy.pipeline_class.__name__)
    of_wan = {"diffusion_model.blocks.0.self_attn.q": (torch.ones(2, 8), torch.ones(8, 2))}
    of_qwen = {"transformer.transformer_blocks.0.img_mod.1": (torch.ones(2, 8), torch.ones(8, 2))}
    wrong, title = (of_qwen, "Qwen-Image") if family.title == "Wan" else (of_wan, "Wan")
    refused(tmp_path, policy, spelt(wrong, lambda layer: layer), f" is one of {title} ({next(iter(wrong))}), accepted: one of {family.title}")


def refused(folder, policy, tensors, line, notes=None):
    save_file(tensors, folder / "wrong.safetensors", metadata=notes)
    with use(Saying()), pytest.raises(RunError) as error:
        files.load(folder / "wrong.safetensors", policy)
    assert line in str(error.value) and str(folder / "wrong.safetensors") in str(error.value) and "\n" not in str(error.value)


# -- what is no LoRA of the policy, on the embedded one ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def embedded():
    return policies.load("embedded")


Q = "transformer.transformer_blocks.0.attn.to_q"
PAIR = {f"{Q}.lora_A.weight": torch.ones(2, 128), f"{Q}.lora_B.weight": torch.ones(128, 2)}
WRONG = {
    "DoRA": ({f"{Q}.dora_scale": torch.ones(128)}, f"has DoRA in 1 of its keys ({Q}.dora_scale), accepted: a plain LoRA"),
    "LoKr": ({f"{Q}.lokr_w1": torch.ones(2, 2), f"{Q}.lokr_w2": torch.ones(2, 2)}, "has LoKr in 2 of its keys"),
    "whole weights": ({"diffusion_model.txt_in.diff": torch.ones(2)}, "has whole weights in 1 of its keys"),
    "a model": ({"transformer_blocks.0.attn.to_q.weight": torch.ones(2, 2)}, "has weights that are no LoRA's in 1 of its keys"),
    "half of a pair": ({f"{Q[:-1]}k.lora_A.weight": torch.ones(2, 128)}, f"is damaged: the two matrices of {Q[:-1]}k do not belong together"),
    "alpha alone": ({f"{Q[:-1]}k.alpha": torch.ones(())}, f"is damaged: it has alpha of {Q[:-1]}k, and not the matrices"),
    "a layer too many": ({"transformer.flu.lora_A.weight": torch.ones(2, 128), "transformer.flu.lora_B.weight": torch.ones(128, 2)},
                         "has 1 layers that are none of FLUX.1's (transformer.flu), accepted: one of FLUX.1"),
    "a layer that is not trained": ({"transformer.x_embedder.lora_A.weight": torch.ones(2, 128), "transformer.x_embedder.lora_B.weight": torch.ones(128, 2)},
                                    "does not fit this policy: there is no place for 'x_embedder.lora_A.weight'"),
    "one layer by two names": ({"lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight": torch.ones(2, 128),
                                "lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight": torch.ones(128, 2)}, "has 1 layers that are none of FLUX.1's"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_it_cannot_take_is_one_line(what, embedded, tmp_path):
    more, line = WRONG[what]
    refused(tmp_path, embedded, PAIR | more, line)


def test_text_encoders_alone_and_unknown_families_are_one_line(embedded, tmp_path):
    pair = {".lora_down.weight": torch.ones(2, 4), ".lora_up.weight": torch.ones(4, 2)}
    refused(tmp_path, embedded, {"lora_te_a" + end: value for end, value in pair.items()}, "is of text encoders alone, which are not trained")
    refused(tmp_path, embedded, {"some_thing" + end: value for end, value in pair.items()}, "is of a family that is not known (some_thing), accepted: one of FLUX.1")


# -- two experts -----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def experts():
    return loaded("wan-2.2-a14b")


@pytest.mark.parametrize(("given", "lines"), [
    (("fast.safetensors",), ["fast.safetensors is for one model, and the policy has two experts: it is taken for both"]),
    (("fast_HIGH.safetensors", "fast_LOW.safetensors"), []),
    (("wan2.2_low_noise_fast.safetensors",), ["is for the expert of low noise, and wan2.2_high_noise_fast.safetensors is not beside it"]),
    (("of both.safetensors",), []),
], ids=["one for both", "one each", "one alone", "both in one"])
def test_files_for_the_two_experts_of_wan(experts, given, lines, tmp_path):
    policy, targets = experts
    layers = matrices(policy, targets)
    high = {layer: pair for layer, pair in layers.items() if not layer.startswith("transformer_2.")}
    low = {layer.removeprefix("transformer_2."): pair for layer, pair in layers.items() if layer.startswith("transformer_2.")}
    both = {f"{'' if layer.startswith('transformer_2.') else 'transformer.'}{layer}": pair for layer, pair in layers.items()}
    for name in given:
        own = both if name == "of both.safetensors" else low if "low" in name.lower() else high
        save_file(spelt(own, lambda layer: layer if own is both else "lora_unet_" + layer.replace(".", "_")), tmp_path / name)
    with use(Saying()) as host:
        found = files.load(tmp_path / given[0], policy).tensors
    assert len(host.lines) == len(lines) and all(line in said for line, said in zip(lines, host.lines))
    for layer, (_, b) in layers.items():
        second = layer.startswith("transformer_2.")
        expected = torch.zeros_like(b) if given == ("wan2.2_low_noise_fast.safetensors",) and not second else \
            high[layer.removeprefix("transformer_2.")][1] * (ALPHA / RANK) if given == ("fast.safetensors",) else b * (ALPHA / RANK)
        assert torch.equal(found[f"{layer}.lora_B.weight"], expected)


# -- diffusers' own loader, of the same files ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["sd15-pndm", "flux-dev", "qwen-image", "z-image", "wan-2.1-i2v"])
def test_diffusers_makes_the_same_of_it(name, tmp_path):
    """Of the names that each family's LoRAs are mostly published in."""
    policy, targets = loaded(name)
    layers = matrices(policy, targets)
    path = tmp_path / "theirs.safetensors"
    kohya = "lora_unet_" if name in ("sd15-pndm", "qwen-image", "z-image") else None
    if kohya:
        tensors, _ = NAMES["kohya"](policy, layers)
    elif name == "wan-2.1-i2v":
        from comfy_dancegrpo.lora.layouts import wan

        layers = {layer: pair for layer, pair in layers.items() if layer.startswith("blocks.")}
        own = {next(iter(wan.to_file({f"{layer}.lora_A.weight": a}))).removesuffix(".lora_A.weight"): (a, b) for layer, (a, b) in layers.items()}
        tensors = spelt(own, lambda layer: layer, ".lora_down.weight", ".lora_up.weight")
    else:
        tensors, _ = NAMES["diffusers with alpha"](policy, layers)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    ours = files.load(path, policy).tensors
    before = {name: p.clone() for name, p in policy.denoiser.named_parameters()}
    policy.pipeline.load_lora_weights(path)
    policy.pipeline.fuse_lora(components=[diffusers_prefix(policy).rstrip(".")])
    after = {name.replace(".base_layer.", "."): p for name, p in policy.denoiser.named_parameters() if ".lora_" not in name}
    for layer in layers:
        a, b = (ours[f"{layer}.lora_{side}.weight"].flatten(1) for side in "AB")
        torch.testing.assert_close(after[f"{layer}.weight"] - before[f"{layer}.weight"], (b @ a).reshape(before[f"{layer}.weight"].shape), atol=1e-4, rtol=1e-4)
