"""Policies from the files that people have: hub ids in the cache, single files in their models' own names, separate VAEs and text encoders."""

import json
import re
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModelWithProjection

import native
import tiny
from comfy_dancegrpo import nodes, policies
from comfy_dancegrpo.embedded import POLICY
from comfy_dancegrpo.errors import RunError
from comfy_dancegrpo.policies import quantization, recognise
from comfy_dancegrpo.policies.places import Parts
from comfy_dancegrpo.workflow.host import Host, use
from families import ltx, ltx2, qwen_image, stable_diffusion, wan, z_image


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError(f"a network was asked: {arguments}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(AssertionError, match="a network was asked"):  # or the tests below would say nothing
        socket.create_connection(("127.0.0.1", 9))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A models folder, with an empty Hugging Face cache beside it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with use(Host(models=tmp_path / "models", output=tmp_path / "output")):
        yield tmp_path / "models"


def write(tensors, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def without(folder, *components):
    """Takes the weights out of a diffusers folder's components."""
    for component in components:
        for file in (folder / component).glob("*.safetensors"):
            file.unlink()


def flux(folder, *lacking):
    shutil.copytree(POLICY, folder)
    without(folder, *lacking)
    return folder


def assert_same_weights(policy, pipeline):
    for name, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            ours, theirs = policy.pipeline.components[name].state_dict(), module.state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[key]) and not value.is_meta for key, value in ours.items()), name


# -- hub ids ------------------------------------------------------------------------------------------------------------------
def cache(tmp_path, name="someone/tiny-flux", revision="0123abc"):
    repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    return repository / "snapshots" / revision


def test_a_hub_id_is_found_in_the_cache_alone(models, tmp_path):
    assert 'found \'someone/tiny-flux\', which is in none' in policies.problem("someone/tiny-flux")
    assert "; nothing is downloaded by itself: hf download someone/tiny-flux" in policies.problem("someone/tiny-flux")
    flux(cache(tmp_path))
    cache(tmp_path, "someone/no-pipeline").mkdir(parents=True)
    assert policies.available() == [*policies.EMBEDDED, "someone/tiny-flux"]
    choices = nodes.NODE_CLASS_MAPPINGS["DanceGRPOLoadPolicy"].INPUT_TYPES()["required"]["policy"][0]
    assert "someone/tiny-flux" in choices and policies.problem("someone/tiny-flux") is None
    assert_same_weights(policies.load("someone/tiny-flux"), policies.load("embedded").pipeline)
    assert "none of the folders" in policies.problem("../hub")


def test_a_download_that_broke_off_is_one_line(models, tmp_path):
    folder = flux(cache(tmp_path))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert policies.problem("someone/tiny-flux").endswith(f"and {folder / 'transformer'} has no .safetensors file")
    with pytest.raises(RunError, match="transformer has no .safetensors file"):
        policies.load("someone/tiny-flux")


# -- single files -------------------------------------------------------------------------------------------------------------
DENOISERS = {"wan": (wan.wan21, native.wan), "ltx": (ltx.ltx, native.ltx), "z_image": (z_image.z_image, native.z_image),
             "qwen_image": (qwen_image.qwen_image, native.qwen_image)}


@pytest.mark.parametrize("family", DENOISERS)
def test_a_denoiser_in_its_own_names_with_the_rest_from_a_folder(models, family):
    build, convert = DENOISERS[family]
    pipeline = build()
    pipeline.save_pretrained(models / "diffusers" / "rest")
    without(models / "diffusers" / "rest", "transformer")
    flux(models / "diffusers" / "another")
    write(convert(pipeline.transformer.state_dict()), models / "diffusion_models" / "below" / f"{family}.safetensors")
    name = f"below/{family}.safetensors"
    assert name in policies.available() and policies.problem(name) is None
    assert "has no .safetensors file" in policies.problem("rest")  # by itself it is no policy
    assert_same_weights(policies.load(name), pipeline)


def test_a_whole_stable_diffusion_checkpoint_needs_no_weights_beside_it(models):
    pipeline = stable_diffusion.sd15()
    pipeline.save_pretrained(models / "diffusers" / "sd15")
    without(models / "diffusers" / "sd15", "unet", "vae", "text_encoder")
    write(native.stable_diffusion(pipeline), models / "checkpoints" / "v1.safetensors")
    assert_same_weights(policies.load("v1.safetensors"), pipeline)


def test_a_whole_ltx_2_checkpoint_needs_but_a_text_encoder_beside_it(models):
    pipeline = ltx2.ltx2()
    folder = models / "diffusers" / "ltx-2"
    pipeline.save_pretrained(folder)
    (models / "text_encoders").mkdir()
    shutil.move(folder / "text_encoder" / "model.safetensors", models / "text_encoders" / "gemma.safetensors")
    for component in ("transformer", "vae", "audio_vae", "vocoder", "connectors"):
        shutil.move(folder / component / "diffusion_pytorch_model.safetensors", models / f"{component}.safetensors")
    whole = native.ltx2(pipeline)
    write(whole, models / "checkpoints" / "whole.safetensors")
    parts = Parts(text_encoder="gemma.safetensors")
    assert "holds no text_encoder, and" in policies.problem("whole.safetensors") and policies.problem("whole.safetensors", parts) is None
    assert_same_weights(policies.load("whole.safetensors", parts=parts), pipeline)

    lacking = {name: value for name, value in whole.items() if not name.startswith("vocoder.")}
    write(lacking, models / "checkpoints" / "silent.safetensors")
    line = policies.problem("silent.safetensors", parts)
    assert line == (f'input "policy": {models / "checkpoints" / "silent.safetensors"} holds no vocoder, and {folder / "vocoder"} has no .safetensors file; '
                    'accepted: a diffusers folder with those weights at input "components"')
    assert inputs_named(line) <= {*LOAD_POLICY.INPUT_TYPES()["required"], *LOAD_POLICY.INPUT_TYPES()["optional"]}

    write(lacking | {"vocoder.of.another.version": torch.zeros(2)}, models / "checkpoints" / "newer.safetensors")
    with pytest.raises(RunError, match=r'^input "policy": the vocoder in .*newer.safetensors is not that of .*vocoder: '):
        policies.load("newer.safetensors", parts=parts)
    shutil.move(models / "vocoder.safetensors", folder / "vocoder" / "diffusion_pytorch_model.safetensors")
    assert_same_weights(policies.load("newer.safetensors", parts=parts), pipeline)


def test_a_file_in_diffusers_names_and_half_precision(models):
    folder = flux(models / "diffusers" / "flux")
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    without(folder, "transformer")
    write({name: value.half() for name, value in tensors.items()}, models / "diffusion_models" / "half.safetensors")
    policy = policies.load("half.safetensors", "bfloat16")
    assert {p.dtype for p in policy.denoiser.parameters()} == {torch.bfloat16}
    assert torch.equal(policy.denoiser.proj_out.weight, tensors["proj_out.weight"].half().bfloat16())


def test_of_two_folders_the_one_that_fits_is_taken_and_another_choice_is_refused(models):
    pipeline = wan.wan21()
    pipeline.save_pretrained(models / "diffusers" / "fits")
    other = wan.wan21()
    other.transformer = wan.transformer(num_layers=1)
    other.save_pretrained(models / "diffusers" / "a-smaller-one")
    write(native.wan(pipeline.transformer.state_dict()), models / "diffusion_models" / "wan.safetensors")
    assert policies.load("wan.safetensors").sources[1].name == "fits"
    with pytest.raises(RunError, match=r"fits no folder of its family \(.*a-smaller-one: it has \d+ tensors more, such as blocks.1"):
        policies.load("wan.safetensors", parts=Parts(components="a-smaller-one"))
    flux(models / "diffusers" / "flux")
    assert policies.problem("wan.safetensors", Parts(components="flux")).endswith(
        "flux of FluxPipeline, accepted for wan.safetensors: a diffusers folder of WanPipeline or WanImageToVideoPipeline")


# -- separate parts -----------------------------------------------------------------------------------------------------------
def test_vae_and_text_encoder_files_take_the_place_of_the_policys_own(models):
    folder = flux(models / "diffusers" / "flux")
    pipeline = policies.load("embedded").pipeline
    vae = {name: value + 1 for name, value in pipeline.vae.state_dict().items()}
    write(native.vae(vae), models / "vae" / "ae.safetensors")
    t5 = {name: value + 1 for name, value in load_file(folder / "text_encoder_2" / "model.safetensors").items()}
    write(t5, models / "text_encoders" / "t5.safetensors")
    without(folder, "text_encoder_2", "vae")
    parts = Parts(vae="ae.safetensors", text_encoder_2="t5.safetensors")
    assert "has no .safetensors file" in policies.problem("flux") and policies.problem("flux", parts) is None
    policy = policies.load("flux", parts=parts)
    assert all(torch.equal(value, vae[name]) for name, value in policy.pipeline.vae.state_dict().items())
    loaded = policy.pipeline.text_encoder_2.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in t5.items() if name in loaded) and "shared.weight" in loaded
    assert set(policy.sources) >= {models / "vae" / "ae.safetensors", models / "text_encoders" / "t5.safetensors"}


def test_parts_of_another_shape_or_place_are_one_line(models):
    folder = flux(models / "diffusers" / "flux")
    shutil.copytree(folder / "text_encoder_2", models / "text_encoders")
    write({"decoder.conv_in.weight": torch.zeros(8, 3)}, models / "vae" / "odd.safetensors")
    for parts, said in ((Parts(text_encoder="model.safetensors"), 'input "text_encoder": found .*model.safetensors, which is not the CLIPTextModel of .*text_encoder: '),
                        (Parts(vae="odd.safetensors"), 'input "vae": found .*odd.safetensors, which is not the AutoencoderKL of .*vae: '),
                        (Parts(text_encoder_3="model.safetensors"), 'input "text_encoder_3": found .*, and the policy has no text_encoder_3; it has '),
                        (Parts(vae="no.safetensors"), 'input "vae": found .no.safetensors., which is in none of the folders searched')):
        with pytest.raises(RunError, match=said) as found:
            policies.load("flux", parts=parts)
        assert len(str(found.value).splitlines()) == 1


def assert_no_single_file_is_opened(monkeypatch):
    """What is asked in validation is told by headers."""
    monkeypatch.setattr("comfy_dancegrpo.policies.single_file.load_file", None)


def inputs_named(line):
    return set(re.findall(r'input "(\w+)"', line))


LOAD_POLICY = nodes.NODE_CLASS_MAPPINGS["DanceGRPOLoadPolicy"]


@pytest.fixture
def a14b(models):
    """Its two experts as files and a diffusers folder without theirs; beside it one of Wan 2.1, of the same shapes, which the first expert fits too."""
    pipeline = wan.wan22_a14b()
    pipeline.save_pretrained(models / "diffusers" / "wan-2.2")
    without(models / "diffusers" / "wan-2.2", "transformer", "transformer_2")
    wan.wan21().save_pretrained(models / "diffusers" / "wan-2.1")
    write(native.wan(pipeline.transformer.state_dict()), models / "diffusion_models" / "wan" / "high.safetensors")
    low = native.wan(pipeline.transformer_2.state_dict())
    write({f"model.diffusion_model.{name}": value for name, value in low.items()}, models / "diffusion_models" / "wan" / "low.safetensors")
    return pipeline


def test_both_experts_come_from_a_file_each(models, a14b):
    names = ["wan/high.safetensors", "wan/low.safetensors"]
    assert set(names) < set(LOAD_POLICY.INPUT_TYPES()["optional"]["transformer_2"][0])
    assert LOAD_POLICY.VALIDATE_INPUTS(names[0], transformer_2=names[1]) is True
    (policy,) = LOAD_POLICY().load(names[0], "float32", transformer_2=names[1])
    assert policy.sources[1].name == "wan-2.2"
    assert_same_weights(policy, a14b)
    assert len(policy.denoisers) == 2 and policy.boundary is not None
    a14b.transformer.save_pretrained(models / "diffusers" / "wan-2.2" / "transformer")
    assert "transformer_2 has no .safetensors file" in policies.problem("wan-2.2")
    assert_same_weights(policies.load("wan-2.2", parts=Parts(transformer_2=names[1])), a14b)  # a folder takes it alike


def test_both_experts_are_quantised_each_as_it_is_opened(models, a14b, monkeypatch):
    """By a stand-in for the package that quantises."""
    done = []
    monkeypatch.setattr(quantization, "problem", lambda name: None)
    monkeypatch.setattr(quantization, "apply", lambda name, module: done.append((name, module)))
    policy = policies.load("wan/high.safetensors", parts=Parts(transformer_2="wan/low.safetensors"), quantized="int8 (torchao)")
    assert {id(module) for _, module in done} == {id(module) for module in policy.denoisers.values()} and {name for name, _ in done} == {"int8 (torchao)"}
    assert len(done) == 2


def test_an_expert_that_no_file_gives_is_told_before_any_is_opened(models, a14b, monkeypatch):
    folder = models / "diffusers" / "wan-2.2"
    shutil.rmtree(models / "diffusers" / "wan-2.1")
    assert_no_single_file_is_opened(monkeypatch)
    high = models / "diffusion_models" / "wan" / "high.safetensors"
    line = LOAD_POLICY.VALIDATE_INPUTS("wan/high.safetensors")
    assert line == (f'input "policy": {high} holds no transformer_2, and {folder / "transformer_2"} has no .safetensors file; '
                    'accepted: a file at input "transformer_2", or those weights')
    with pytest.raises(RunError) as found:
        policies.load("wan/high.safetensors")
    assert str(found.value) == line


def test_a_second_expert_that_does_not_belong_to_the_first_is_one_line(models, a14b, monkeypatch):
    folder = models / "diffusion_models"
    write(native.z_image(z_image.z_image().transformer.state_dict()), folder / "z.safetensors")
    write(native.wan(wan.transformer(num_layers=1).state_dict()), folder / "small.safetensors")
    (folder / "short.safetensors").write_bytes((folder / "wan" / "low.safetensors").read_bytes()[:-100])
    with pytest.raises(RunError, match=r'^input "transformer_2": found .*small.safetensors, which is not the WanTransformer3DModel of .*: it lacks \d+ of'):
        policies.load("wan/high.safetensors", parts=Parts(transformer_2="small.safetensors"))
    assert_no_single_file_is_opened(monkeypatch)
    for policy, second, said in (
            ("wan/high.safetensors", "z.safetensors", r'input "transformer_2": found .*z.safetensors, a file of ZImagePipeline, accepted: one of WanPipeline or WanI'),
            ("wan-2.1", "wan/low.safetensors", "input \"transformer_2\": found 'low.safetensors', and the policy has no transformer_2; it has "),
            ("embedded", "wan/low.safetensors", r'input "transformer_2": found .*low.safetensors, a file of WanPipeline or .*, accepted: one of FluxPipeline'),
            ("wan/high.safetensors", "short.safetensors", "short.safetensors is cut short"),
            ("wan/high.safetensors", "no.safetensors", 'input "transformer_2": found .no.safetensors., which is in none of the folders searched')):
        line = LOAD_POLICY.VALIDATE_INPUTS(policy, transformer_2=second)
        assert re.search(said, line) and len(line.splitlines()) == 1, line


def test_a_clip_vision_file_is_the_image_encoder(models, monkeypatch):
    """In the names of transformers' CLIP vision models with a projection, as ComfyUI's clip_vision files are."""
    pipeline = wan.wan21_i2v()
    pipeline.save_pretrained(models / "diffusers" / "rest")
    without(models / "diffusers" / "rest", "transformer", "image_encoder")
    write(native.wan(pipeline.transformer.state_dict()), models / "diffusion_models" / "i2v.safetensors")
    config = pipeline.image_encoder.config
    config.projection_dim = 8
    vision = tiny.seeded(CLIPVisionModelWithProjection, config, seed=7)
    vision.save_pretrained(models / "vision")
    (models / "clip_vision").mkdir()
    shutil.move(models / "vision" / "model.safetensors", models / "clip_vision" / "clip_vision_h.safetensors")
    assert "vision_model.embeddings.patch_embedding.weight" in load_file(models / "clip_vision" / "clip_vision_h.safetensors")
    with monkeypatch.context() as patched:
        assert_no_single_file_is_opened(patched)
        line = policies.problem("i2v.safetensors")
        assert inputs_named(line) == {"policy", "image_encoder"} and "holds no image_encoder, and" in line
    assert LOAD_POLICY.VALIDATE_INPUTS("i2v.safetensors", image_encoder="clip_vision_h.safetensors") is True
    (policy,) = LOAD_POLICY().load("i2v.safetensors", "float32", image_encoder="clip_vision_h.safetensors")
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (model(pixels, output_hidden_states=True).hidden_states[-2] for model in (policy.pipeline.image_encoder, vision))
    assert torch.equal(found, expected)
    assert models / "clip_vision" / "clip_vision_h.safetensors" in policy.sources  # by which kept encodings of prompts are told apart
    assert "and the policy has no image_encoder; it has" in policies.problem("embedded", Parts(image_encoder="clip_vision_h.safetensors"))


# -- bad files ----------------------------------------------------------------------------------------------------------------
def test_what_is_wrong_with_a_file_is_one_line(models):
    tensors = native.wan(wan.transformer().state_dict())
    folder = models / "diffusion_models"
    write(tensors, folder / "wan.safetensors")
    whole = (folder / "wan.safetensors").read_bytes()
    (folder / "short.safetensors").write_bytes(whole[:-100])
    (folder / "header.safetensors").write_bytes(whole[:50])
    (folder / "text.safetensors").write_text("not a tensor in it, whatever its name says")
    write({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, folder / "lora.safetensors")
    write({**tensors, "scaled_fp8": torch.zeros(2)}, folder / "scaled.safetensors")
    write({"vace_blocks.0.after_proj.bias": torch.zeros(2), **tensors}, folder / "vace.safetensors")
    for name, said in (("short", f"is cut short: it has {len(whole) - 100} bytes of {len(whole)}"), ("header", "is cut short: it ends within its header"),
                       ("text", "is no safetensors file"), ("lora", "of a family that is not known; seen: 1 tensors, such as lora_unet_x.lora_down.weight"),
                       ("scaled", "found quantised weights"), ("vace", "of a family that is not known"),
                       ("wan", "a file of WanPipeline or WanImageToVideoPipeline, and its configurations and tokenizers are nowhere; accepted: beside it")):
        line = policies.problem(f"{name}.safetensors")
        assert said in line and len(line.splitlines()) == 1, line
        with pytest.raises(RunError, match=".") as found:
            policies.load(f"{name}.safetensors")
        assert str(found.value) == line


def test_a_truncated_part_of_a_folder_is_one_line(models):
    folder = flux(models / "diffusers" / "flux")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"and {path} is cut short" in policies.problem("flux")


def test_a_folder_that_names_code_of_its_own_gives_no_configuration(models):
    pipeline = wan.wan21()
    pipeline.save_pretrained(models / "diffusers" / "wan")
    write(native.wan(pipeline.transformer.state_dict()), models / "diffusion_models" / "wan.safetensors")
    index = models / "diffusers" / "wan" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "vae": ["os", "system"]}))
    assert "found the library 'os'" in policies.problem("wan.safetensors")


@pytest.mark.parametrize("names, pipeline", [
    (["double_blocks.0.img_attn.norm.key_norm.scale", "vector_in.in_layer.weight"], "FluxPipeline"),
    (["model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias", "first_stage_model.decoder.conv_in.weight"], "StableDiffusion3Pipeline"),
    (["double_blocks.0.img_attn.norm.key_norm.scale", "single_stream_modulation.lin.weight"], "Flux2Pipeline"),
    (["model.model.txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias"], "HunyuanVideoPipeline"),
    (["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.0.x"], "StableDiffusionXLPipeline"),
])
def test_families_are_told_by_names_of_tensors(names, pipeline):
    """Their layouts are diffusers' to convert: those converters fix the published widths, which no test has the memory for."""
    assert recognise.pipelines(names, "file")[0] == pipeline
