"""Statistics of a rollout's pictures, drawn beside its reward: what a policy that cheats its reward often changes first. Of videos the middle frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = {"sharpness": "sharpness", "saturation": "saturation", "grid": "grid artefacts", "near_duplicates": "near-duplicates"}
DUPLICATE = 0.02  # of the range 0..1: pictures whose root mean square difference is smaller look alike
THUMB = 32  # pixels, to which two pictures are reduced before they are compared: fine noise does not tell them apart
ROUNDING = 1 / 12 / 255**2  # variance of rounding to 8 bits: power below it is no artefact that anyone sees
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as OpenCV's grey


def of(pictures: Sequence[Tensor], groups: Tensor, period: int) -> dict[str, float]:
    """The means over pictures [H, W, 3] (videos [F, H, W, 3]) in 0..1; groups [N] int64 tells which belong together.

    period: pixels between the lines of a grid that the decoder or the denoiser's patches may leave.
    """
    stills = [picture if picture.ndim == 3 else picture[len(picture) // 2] for picture in pictures]
    grey = [luminance(still) for still in stills]
    return {
        "sharpness": _mean([sharpness(g) for g in grey]),
        "saturation": _mean([saturation(still) for still in stills]),
        "grid": _mean([grid(g, period) for g in grey]),
        "near_duplicates": near_duplicates(stills, groups),
    }


def luminance(picture: Tensor) -> Tensor:
    """[H, W] float32 in 0..1."""
    return (picture.float() * torch.tensor(LUMA)).sum(-1)


def sharpness(grey: Tensor) -> float:
    """Variance of the Laplacian (4 neighbours, borders left out), in grey levels of 0..255 squared."""
    centre = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * centre
    return (laplacian * 255).var(unbiased=False).item()


def saturation(picture: Tensor) -> float:
    """Mean of HSV's saturation, (max - min) / max of a pixel's channels; black has none."""
    high, low = picture.amax(-1), picture.amin(-1)
    return ((high - low) / high.clamp_min(1 / 255)).mean().item()


def grid(grey: Tensor, period: int) -> float:
    """How much the spectrum stands out at 1/period and its multiples, in decibels over the frequencies beside them, of rows and columns alike.

    About 0 for a picture without a grid, whatever it shows. 0 too where the picture is too small to tell (fewer than 4 periods).
    """
    found = [value for axis in (grey, grey.T) if (value := _stands_out(axis, period)) is not None]
    return _mean(found) if found else 0.0


def _stands_out(rows: Tensor, period: int) -> float | None:
    """Of the rows' mean power spectrum, for [R, L] with L a multiple of the period; None where L has too few."""
    length = rows.shape[1] // period * period
    first = length // period  # the bin of 1 / period
    if first < 4:
        return None
    window = torch.hann_window(length)  # else the edges of a picture, which do not meet, leak into every bin
    values = (rows[:, :length] - rows[:, :length].mean(1, keepdim=True)) * window
    power = torch.fft.rfft(values).abs().square().mean(0) + ROUNDING * window.square().sum()
    peaks = torch.arange(first, length // 2, first)  # below Nyquist, beyond which there is nothing to compare with
    beside = (power[peaks - 2] * power[peaks + 2]).sqrt()  # where the window's lobe ends; the geometric mean follows a falling spectrum
    return (10 * (power[peaks] / beside).log10()).mean().item() if len(peaks) else None


def near_duplicates(pictures: Sequence[Tensor], groups: Tensor) -> float:
    """Share of the pairs within groups whose pictures differ by less than `DUPLICATE`; 0 where there is no pair."""
    small = torch.stack([F.interpolate(p.float().movedim(-1, 0)[None], size=(THUMB, THUMB), mode="area")[0].flatten() for p in pictures])
    alike = pairs = 0
    for group in groups.unique():
        distances = torch.pdist(small[groups == group]) / small.shape[1] ** 0.5
        alike, pairs = alike + int((distances < DUPLICATE).sum()), pairs + len(distances)
    return alike / pairs if pairs else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
