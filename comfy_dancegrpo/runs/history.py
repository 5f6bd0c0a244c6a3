"""What a run's pictures looked like on its way: small JPEGs in `pictures/`, at 8 to 16 points of the run, however long it becomes.

A point is every `stride`-th iteration, from the first on; the stride doubles when the points become too many. Beside them, of each Evaluate
node, some pairs from before and after. Names are made of numbers alone: whoever reads takes none from the JSON. Reading imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import replacing
from ..workflow.host import host
from .folder import RunFolder, write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ..grpo.update import UpdateStats
    from .evaluate import Evaluation

POINTS = 16  # at most
SAMPLES = 6  # of the first group, spread over its ranks
PAIRS = 8  # of an evaluation, spread over its prompts
SIZE = 192  # pixels of a picture's longer side, at most
LARGEST = 2**20  # bytes of a file that is read back: ours have some 10 KB
_POINT, _PAIRS = re.compile(r"[0-9]{7,12}\.json"), re.compile(r"evaluate-[0-9A-Za-z_.-]{1,80}\.json")


def stride(iteration: int) -> int:
    """The smallest power of two that makes at most `POINTS` of the iterations up to this one."""
    found = 1
    while (iteration - 1) // found + 1 > POINTS:
        found *= 2
    return found


def keep(folder: RunFolder, iteration: int, stats: UpdateStats) -> list[Image]:
    """At a point: writes some of the first group's pictures, best first, and returns them. Where the disk will not take them, that is said, and no more."""
    step = stride(iteration)
    if (iteration - 1) % step:
        return []
    try:
        found = _first_group(stats)
        _write(folder, f"{iteration:07d}", {"iteration": iteration, "prompt": str(found["prompt"]), "scores": found["scores"]}, found["pictures"])
        for path in _named(folder.pictures, _POINT):
            if (int(path.stem) - 1) % step:
                _remove(path)
        return found["pictures"]
    except OSError as error:
        host().say(f"iteration {iteration}: pictures for the report could not be kept ({error}); training goes on")
        return []


def keep_pairs(folder: RunFolder, node_id: str, evaluation: Evaluation) -> None:
    """Writes some pictures of an Evaluate node, before and after, with their scores by its first reward."""
    scores, count = evaluation.comparisons[0], len(evaluation.prompts)
    picked = [i * count // min(PAIRS, count) for i in range(min(PAIRS, count))]
    told = {"reward": scores.reward, "prompts": [str(evaluation.prompts[i]) for i in picked],
            "before": [scores.before[i].item() for i in picked], "after": [scores.after[i].item() for i in picked]}
    pictures = [_small(of[i]) for i in picked for of in (evaluation.before, evaluation.after)]
    try:
        _write(folder, "evaluate-" + re.sub(r"[^0-9A-Za-z_.-]", "-", node_id)[:80], told, pictures)
    except OSError as error:
        host().say(f"Evaluate: pictures for the report could not be kept ({error})")


def read(folder: RunFolder) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The points, by iteration, and the evaluations, each with its JPEGs in bytes as "pictures"; what is damaged is left out."""
    points = sorted(filter(None, map(_read, _named(folder.pictures, _POINT))), key=lambda point: point.get("iteration", 0))
    return points, list(filter(None, map(_read, _named(folder.pictures, _PAIRS))))


def _first_group(stats: UpdateStats) -> dict[str, Any]:
    scores = stats.advantages.scores
    rollout = scores.rollout
    first = [i for i, group in enumerate(rollout.groups.tolist()) if group == 0]
    ranked = sorted(first, key=lambda i: -scores.total[i].item())
    count = min(SAMPLES, len(ranked))
    picked = [ranked[k * (len(ranked) - 1) // max(1, count - 1)] for k in range(count)]  # the best and the worst are among them
    return {"prompt": rollout.prompts[first[0]], "scores": [scores.total[i].item() for i in picked],
            "pictures": [_small(rollout.every_picture[i]) for i in picked]}


def _small(picture: Tensor) -> Image:
    from .pictures import to_image

    image = to_image(picture)
    image.thumbnail((SIZE, SIZE))
    return image


def _write(folder: RunFolder, name: str, told: dict[str, Any], pictures: Iterable[Image]) -> None:
    for place, picture in enumerate(pictures):
        with replacing(folder.pictures / f"{name}-{place}.jpg") as beside:
            picture.save(beside, "JPEG", quality=85)
    write_atomically(folder.pictures / f"{name}.json", json.dumps(told) + "\n")


def _named(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name)) if folder.is_dir() else []


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    for place in range(SAMPLES):
        path.with_name(f"{path.stem}-{place}.jpg").unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        count = len(told["scores"]) if "scores" in told else 2 * len(told["prompts"])
        pictures = [_jpeg(path.with_name(f"{path.stem}-{place}.jpg")) for place in range(min(count, 2 * PAIRS))]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {**told, "pictures": pictures}


def _jpeg(path: Path) -> bytes:
    """Raises `ValueError` for a file that is none: a run's folder may have come from a stranger, and links in it lead anywhere."""
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if not data.startswith(b"\xff\xd8\xff") or len(data) > LARGEST:
        raise ValueError("not a small JPEG")
    return data
