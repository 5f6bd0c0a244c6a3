"""The benchmark of scaling: what it computes on paper against other counts, of FLUX.1's numbers and of the bytes that two processes send."""

import sys
from pathlib import Path

import pytest
import torch
from spmd import in_processes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import scaling  # noqa: E402

WIDTH, HEAD, TEXT, POOLED, LATENT, DOUBLE, SINGLE = 3072, 128, 4096, 768, 64, 19, 38  # FLUX.1's


def linear(into, out, bias=True):
    return into * out + bias * out


def test_flux_has_as_many_numbers_as_its_layers_say():
    w = WIDTH
    embedders = linear(LATENT, w) + linear(TEXT, w) + 2 * (linear(256, w) + linear(w, w)) + linear(POOLED, w) + linear(w, w)
    double = 2 * linear(w, 6 * w) + 8 * linear(w, w) + 4 * HEAD + 2 * (linear(w, 4 * w) + linear(4 * w, w))
    single = linear(w, 3 * w) + linear(w, 4 * w) + linear(5 * w, w) + 3 * linear(w, w) + 2 * HEAD
    last = linear(w, 2 * w) + linear(w, LATENT)
    lora, whole = scaling.flux_modes(128, "attention")[0], embedders + DOUBLE * double + SINGLE * single + last
    assert lora.held == whole == 11_901_408_320
    assert lora.trained == 128 * 2 * w * (8 * DOUBLE + 3 * SINGLE) == 209_190_912


def test_a_lora_has_as_many_numbers_as_peft_gives_it():
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig

    from comfy_dancegrpo.policies.flux import Flux

    for targets in Flux.lora_targets:
        with torch.device("meta"):
            denoiser = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
                                              pooled_projection_dim=20, axes_dims_rope=(4, 6, 6))
            expected = scaling.lora_numbers(denoiser, 4, targets)
            denoiser.add_adapter(LoraConfig(r=4, target_modules=Flux.lora_targets[targets]))
        assert expected == sum(p.numel() for name, p in denoiser.named_parameters() if ".lora_" in name) > 0


def test_by_hand():
    """8 processes, all weights: a ring passes 7/8 of four bytes a number twice, for each of two optimizer steps; in parts each call gathers 7/8 of two."""
    work, rank, targets = scaling.flux_workflow()
    assert (work.samples, work.steps, work.micro_batch, work.weights, rank, targets) == (192, 16, 1, 2, 128, "attention")
    assert work.calls(8) == (16 + 24 * 15, 2 * 108) and work.calls(64) == (3 + 3 * 15, 2 * 14)  # 192 / 8 pictures of 16 groups; 9 of 15 steps trained
    whole, parts = scaling.Mode("", 1000, 1000, True, False), scaling.Mode("", 1000, 1000, True, True)
    pictures = 720 * 720 * 3 * 4 * 24
    assert scaling.traffic(whole, work, 8) == {"gradients": 2 * 7 / 8 * 4000 * 2, "weights": 0, "state": 0, "pictures": pictures}
    assert scaling.traffic(parts, work, 8) == {
        "gradients": 0, "weights": pytest.approx(7 / 8 * (2000 * (376 + 2 * 216) + 4000 * 216)), "state": 7 / 8 * 12000, "pictures": pictures}
    for row in scaling.paper()["rows"]:
        assert row["seconds"]["InfiniBand NDR 400"] == pytest.approx(sum(row["sent"].values()) / 50e9)
        assert (row["seconds"]["NVLink 4"] is None) == (row["processes"] == 64)


def test_two_processes_send_as_many_bytes_as_the_formulas_say(tmp_path):
    work = scaling.Work(2, 3, 3, 1.0, 2, 2, 64 * 64, weights=4)
    for found in in_processes(2, scaling.measure, tmp_path, scaling.asdict(work), 1, list(scaling.CASES)):
        for case, (kind, sharded) in scaling.CASES.items():
            one = found[case]
            mode = scaling.Mode(case, one["held"], one["trained"], kind == "full", sharded)
            expected, sent = scaling.traffic(mode, work, 2, tuple(one["calls"])), one["sent"]
            assert {name: sent.get(name, 0) for name in expected} == {name: pytest.approx(value) for name, value in expected.items()}
            assert [abs(a - b) <= 1 for a, b in zip(one["calls"], work.calls(2))] == [True, True]
            (seconds,), (within,) = one["seconds"], one["communication"]
            assert 0 < sum(within.values()) < seconds and within.keys() <= {"rest", "gradients", "weights", "state", "pictures"}
