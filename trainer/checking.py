"""`dancegrpo check-reward`: what a reward gives pictures here, beside what its makers published for them."""

from __future__ import annotations

import csv
import functools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from comfy_dancegrpo.errors import WorkflowError

VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".avi")


@dataclass(frozen=True)
class Published:
    """A row of a table of published scores.

    picture: its address or file name, of which the last part is compared with the names of files, endings left out. prompt: "" where it plays
    no part. score: None where the row gives a picture's prompt alone. weights: by which model; source: where the score is printed.
    """

    reward: str
    picture: str
    prompt: str = ""
    score: float | None = None
    weights: str = ""
    source: str = ""

    @property
    def stem(self) -> str:
        return PurePosixPath(urlsplit(self.picture).path).stem


@dataclass(frozen=True)
class Checked:
    """model: by which weights we scored it, as the user named them; "" for a reward without any, or whose weights are its own matter."""

    file: Path
    prompt: str
    ours: float
    published: Published | None
    model: str = ""

    @property
    def comparable(self) -> bool:
        """Whether the published score is of these weights, as far as names tell: of a hub id, a folder or a file the last part counts."""
        theirs = self.published.weights if self.published else ""
        return not (theirs and self.model) or _last(theirs) == _last(self.model)


def _last(weights: str) -> str:
    name = PurePosixPath(weights.replace("\\", "/")).name.lower()
    return re.sub(r"\.(safetensors|bin|pth?|ckpt)$", "", name)  # the same weights may lie in another form


def read(table: Path | None) -> list[Published]:
    """Of a .csv file with a header or a .jsonl file of objects, with the names of `Published`; of None the project's own. Raises WorkflowError."""
    path = table if table is not None else resources.files("comfy_dancegrpo.rewards") / "published_scores.csv"
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if str(path).endswith(".jsonl") else list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise WorkflowError(f"--published: found {path}, which cannot be read ({error}); accepted: a .csv or .jsonl file") from None
    return [_row(path, number, row) for number, row in enumerate(rows, 1)]


def _row(path, number: int, row: dict) -> Published:
    try:
        values = {name: str(row.get(name) or "") for name in ("reward", "picture", "prompt", "weights", "source")}
        score = row.get("score")
        found = Published(score=None if score in (None, "") else float(score), **values)
        if not found.stem or found.score is not None and not math.isfinite(found.score):
            raise ValueError
        return found
    except (AttributeError, TypeError, ValueError):
        raise WorkflowError(f"--published: {path}, row {number}: found {row!r}, accepted: reward, picture (an address or a file name), prompt, "
                            "score (a number), weights and source") from None


def check(name: str, files: Sequence[Path], prompt: str | None, table: Path | None, model: str, base: str, device: str) -> list[Checked]:
    """Scores the files, each with the prompts that the table has for it, or else with `prompt`. Raises WorkflowError before anything is loaded."""
    from comfy_dancegrpo import rewards

    rows = [row for row in read(table) if row.reward in (name, "")]
    if problem := rewards.problem(name, model, base, device):
        raise WorkflowError(problem)
    pairs = [(file, text, row) for file in files for text, row in _prompts(file, rows, prompt)]
    samples = {file: _sample(file) for file in dict.fromkeys(files)}
    at = functools.cache(lambda fps: rewards.load(name, model, base=base, device=device, batch_size=8, fps=fps))
    values = [float(at(samples[file][1])([samples[file][0]], [text])) for file, text, _ in pairs]
    told = model if rewards.known()[name].has_model else ""
    return [Checked(file, text, value, row, told) for (file, text, row), value in zip(pairs, values)]


def _prompts(file: Path, rows: Sequence[Published], prompt: str | None) -> list[tuple[str, Published | None]]:
    known = [(row.prompt, row) for row in rows if row.stem == file.stem and prompt in (None, row.prompt)]
    if known or prompt is not None:
        return known or [(prompt, None)]
    raise WorkflowError(f"{file}: found no prompt for it, accepted: --prompt TEXT (\"\" where the reward needs none), or a row of the table of "
                        f"published scores whose picture is called {file.stem!r}")


def _sample(file: Path):
    """A picture [H, W, 3] or a video [F, H, W, 3], in 0..1, and frames a second. Raises WorkflowError where the file is neither."""
    from PIL import Image

    from comfy_dancegrpo.rewards import FPS
    from comfy_dancegrpo.runs import pictures, video

    try:
        if file.suffix.lower() in VIDEOS:
            return video.read(file)
        with Image.open(file) as image:
            return pictures.to_tensor(image)[0], FPS
    except (OSError, ValueError) as error:
        raise WorkflowError(f"{file}: it cannot be read as a picture or a video ({error})") from None


def lines(found: Sequence[Checked]) -> Iterator[str]:
    """The table, and what stands behind the published numbers. Scores by other weights than ours have no difference."""
    yield f"{'ours':>10}  {'published':>10}  {'difference':>10}"
    for row in found:
        theirs = row.published.score if row.published else None
        difference = f"{row.ours - theirs:+10.4f}" if theirs is not None and row.comparable else ""
        yield f"{row.ours:10.4f}  {'' if theirs is None else f'{theirs:.4f}':>10}  {difference:>10}  {row.file.name}  {row.prompt}"
    with_scores = [row for row in found if row.published and row.published.score is not None]
    for weights, source, other in dict.fromkeys((r.published.weights, r.published.source, "" if r.comparable else r.model) for r in with_scores):
        why = f"; not compared with ours, which are by {other!r}: accepted as --model are the same weights, under their name" if other else ""
        yield f"published{f' for {weights}' if weights else ''}{f': {source}' if source else ''}{why}"
