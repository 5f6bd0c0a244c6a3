"""Statistics of pictures, on made ones where the answer is known."""

import json
import math

import pytest
import torch

from comfy_dancegrpo.runs import picture_statistics as statistics

ALONE = torch.zeros(1, dtype=torch.int64)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def comb(height, width, period, amplitude, axis=1):
    """Lines `period` pixels apart, on black."""
    lines = (torch.arange(width if axis == 1 else height) % period == 0) * amplitude
    return lines[None].expand(height, width) if axis == 1 else lines[:, None].expand(height, width)


def test_sharpness_is_the_variance_of_the_laplacian():
    grey = torch.zeros(12, 12)
    assert statistics.sharpness(grey) == 0
    grey[5, 6] = 1.0  # one white pixel: a Laplacian of -4 there and 1 at its four neighbours, of 10 x 10
    assert statistics.sharpness(grey) == pytest.approx(255**2 * ((16 + 4) / 100 - 0**2), rel=1e-5)
    ramp = torch.arange(12.0)[None].expand(12, 12) / 11
    assert statistics.sharpness(ramp) == pytest.approx(0, abs=1e-6)  # a slope is no edge


def test_sharpness_against_float64_pixel_by_pixel():
    grey = noise(9, 14).double().numpy()
    found = [grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x] for y in range(1, 8) for x in range(1, 13)]
    mean = sum(found) / len(found)
    wanted = 255**2 * sum((value - mean) ** 2 for value in found) / len(found)
    assert statistics.sharpness(noise(9, 14)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("colour, value", [((1, 0, 0), 1.0), ((0.5, 0.5, 0.5), 0.0), ((1, 1, 1), 0.0), ((0, 0, 0), 0.0), ((0.8, 0.4, 0.6), 0.5)])
def test_saturation_is_that_of_hsv(colour, value):
    import colorsys

    assert colorsys.rgb_to_hsv(*colour)[1] == pytest.approx(value)
    assert statistics.saturation(torch.tensor(colour).float().expand(4, 4, 3)) == pytest.approx(value)


@pytest.mark.parametrize("period, size", [(8, 64), (16, 96), (8, 67)])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_comb_stands_out_by_what_its_spectrum_says(period, size, axis):
    """Each multiple of 1/period has (amplitude / period * sum of the window)^2, over the power of rounding alone."""
    amplitude, length = 0.3, size // period * period
    floor = statistics.ROUNDING * 3 / 8 * length  # a Hann window's squares sum to 3/8 of its length, its values to 1/2
    decibels = 10 * math.log10(((amplitude / period * length / 2) ** 2 + floor) / floor)
    found = statistics.grid(comb(size, size, period, amplitude, axis), period)
    assert found == pytest.approx(decibels / 2, rel=0.02)  # the other axis has none


def test_the_grid_is_found_at_its_own_period_alone_and_in_a_picture_too():
    plain = noise(128, 128) * 0.2 + 0.4
    gridded = plain + comb(128, 128, 8, 0.1) + comb(128, 128, 8, 0.1, axis=0)
    assert abs(statistics.grid(plain, 8)) < 1 < 6 < statistics.grid(gridded, 8)
    assert abs(statistics.grid(plain + comb(128, 128, 7, 0.1), 8)) < 2


def test_pictures_without_a_grid_have_none():
    slope = torch.arange(64.0)[None].expand(64, 64) / 63
    disc = ((torch.arange(64.0)[:, None] - 30) ** 2 + (torch.arange(64.0) - 33) ** 2 < 15**2).float()
    assert abs(statistics.grid(torch.full((64, 64), 0.3), 8)) < 1e-3
    assert abs(statistics.grid(slope, 8)) < 1 and abs(statistics.grid(disc, 8)) < 3
    assert statistics.grid(noise(16, 16), 8) == 0  # two periods tell nothing


def test_near_duplicates_are_counted_by_pair_and_within_groups():
    first, second, third = noise(3, 40, 48, 3)
    pictures = [first, first + 0.005, second, third, first, first]
    groups = torch.tensor([0, 0, 0, 0, 1, 2])  # of 6 pairs one is alike; what is alike in another group is not compared
    assert statistics.near_duplicates(pictures, groups) == pytest.approx(1 / 6)
    assert statistics.near_duplicates([first, first], torch.tensor([0, 1])) == 0


@pytest.mark.parametrize("difference, alike", [(0.9, True), (1.1, False)])
def test_the_bound_of_near_duplicates_is_a_root_mean_square(difference, alike):
    first = torch.full((64, 64, 3), 0.5)
    shifted = first + difference * statistics.DUPLICATE
    assert statistics.near_duplicates([first, shifted], torch.zeros(2)) == float(alike)


def test_of_pictures_of_several_sizes_and_of_videos():
    pictures = [noise(64, 64, 3), noise(40, 48, 3)]
    found = statistics.of(pictures, torch.zeros(2), 8)
    assert found.keys() == statistics.NAMES.keys()
    one = [statistics.of([picture], ALONE, 8) for picture in pictures]
    assert found["saturation"] == pytest.approx((one[0]["saturation"] + one[1]["saturation"]) / 2)
    video = torch.stack([noise(64, 64, 3, seed=k) for k in range(5)])
    assert statistics.of([video], ALONE, 8) == statistics.of([video[2]], ALONE, 8)


def test_a_run_writes_them_of_each_iteration(cli, loop_only, saved, tiny_loop, tmp_path):
    assert cli("run", saved(loop_only), "--output", tmp_path, *tiny_loop).status == 0
    rows = [json.loads(line)["pictures"] for line in (tmp_path / "quickstart/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row.keys() for row in rows] == [statistics.NAMES.keys()] * 2
    assert rows[0] != rows[1] and all(math.isfinite(value) for row in rows for value in row.values())


def test_the_period_of_the_embedded_policy_is_its_patch():
    from comfy_dancegrpo import policies

    assert policies.load("embedded", "float32").patch() == 8  # a VAE of factor 4, packed by 2
