"""Prompts: from a text, or from a .txt, .jsonl or .csv file; each with a reference picture where the task has one."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import RunError
from .workflow.host import host, inside

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SUFFIXES = (".txt", ".jsonl", ".csv")


@dataclass(frozen=True)
class Reference:
    """A reference picture (to be edited, or a video's first frame). name: its path, or where else it is from. key: tells contents apart, without
    reading them. content: its sha256, where that is known already."""

    name: str
    key: str
    read: Callable[[], Image] = field(compare=False, repr=False)
    content: str = ""

    @classmethod
    def of_file(cls, path: Path) -> Reference:
        def read() -> Image:
            import PIL.Image

            with PIL.Image.open(path) as image:
                return image.convert("RGB")
        status = path.stat()
        return cls(str(path), f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}", read)

    @classmethod
    def of_pixels(cls, pixels: Tensor) -> Reference:
        """Of a picture [H, W, C] in 0..1, at least RGB; kept in 8 bits."""
        rounded = (pixels[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy()
        content = hashlib.sha256(repr(rounded.shape).encode() + rounded.tobytes()).hexdigest()

        def read() -> Image:
            import PIL.Image

            return PIL.Image.fromarray(rounded)
        return cls("of the IMAGE wire", content, read, content)

    def digest(self) -> str:
        """sha256 of its bytes: the same wherever it lies. Raises `RunError` where it cannot be read."""
        if self.content:
            return self.content
        try:
            return hashlib.sha256(Path(self.name).read_bytes()).hexdigest()
        except OSError as error:
            raise RunError(f"the reference picture {self.name} cannot be read: {error.strerror}") from None

    def image(self) -> Image:
        """RGB. Raises `RunError` where it cannot be read."""
        try:
            return self.read()
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises of broken files
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(f"the reference picture {self.name} cannot be read: {reason}") from None


class Prompt(str):
    """A prompt's text, with its reference picture or None; two are equal when both are."""

    picture: Reference | None

    def __new__(cls, text: str, picture: Reference | None = None) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.picture = picture
        return prompt

    def with_text(self, text: str) -> Prompt:
        return Prompt(text, self.picture)

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) and self.picture == getattr(other, "picture", None)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return str.__hash__(self)


@dataclass(frozen=True)
class PromptList:
    """Prompts in order; `name` is where they come from."""

    prompts: tuple[str, ...]
    name: str = "text"


def folders() -> list[Path]:
    """Where prompt files are looked for: the input folder, then those that ship with the package."""
    from .embedded import PROMPTS

    return [host().input_folder, PROMPTS]


def find(name: str) -> Path:
    """Raises `RunError` naming the folders searched, also for a name that leaves them."""
    for folder in folders():
        path = inside(folder, name)
        if path and path.is_file():
            return path
    raise RunError(f'input "file": found {name!r}, which is in none of the folders searched ({", ".join(map(str, folders()))})')


def read(name: str) -> list[Prompt]:
    """The prompts of a file: a line each (.txt), the "prompt" of each object (.jsonl), the column "prompt" (.csv).

    An "image" beside the prompt is the path of its reference picture, looked for beside the prompt file, then in the input folder.
    Raises `RunError`, one line: the file is missing, not of these kinds, not UTF-8, malformed (with its line), or empty, or names
    a picture that is not there.
    """
    path = find(name)
    if path.suffix.lower() not in SUFFIXES:
        raise RunError(f'input "file": found {name!r}, accepted: a file that ends in {", ".join(SUFFIXES)}')
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RunError(f'input "file": {path} is not UTF-8 (byte {error.start})') from None
    parse = {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv}[path.suffix.lower()]
    try:
        prompts = [Prompt(p.strip(), _reference(image, path.parent)) for p, image in parse(text) if p.strip()]
    except (ValueError, csv.Error) as error:
        raise RunError(f'input "file": {path}: {error}') from None
    if not prompts:
        raise RunError(f'input "file": {path} has no prompt in it')
    return prompts


def _reference(image: str, beside: Path) -> Reference | None:
    if not image.strip():
        return None
    for folder in (beside, host().input_folder):
        path = inside(folder, image.strip())
        if path and path.is_file():
            return Reference.of_file(path)
    raise ValueError(f'found the "image" {image!r}, which is in none of the folders searched ({beside}, {host().input_folder})')


def _txt(text: str) -> list[tuple[str, str]]:
    return [(line, "") for line in _lines(text)]


def _lines(text: str) -> list[str]:
    """Not `str.splitlines`: that breaks at U+2028 and its like too, which a JSON string may hold as they are."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _jsonl(text: str) -> list[tuple[str, str]]:
    prompts = []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            raise ValueError(f"line {number} is not JSON") from None
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
            raise ValueError(f'line {number}: accepted: an object with a text "prompt"')
        if not isinstance(value.get("image", ""), str):
            raise ValueError(f'line {number}: accepted: the path of a picture as "image"')
        prompts.append((value["prompt"], value.get("image", "")))
    return prompts


def _csv(text: str) -> list[tuple[str, str]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if "prompt" not in (rows.fieldnames or ()):
        raise ValueError(f'found the columns {rows.fieldnames}, accepted: one named "prompt"')
    return [(row["prompt"] or "", row.get("image") or "") for row in rows]


def pictured(prompts: list[str], images: Tensor) -> list[Prompt]:
    """The prompts with these pictures [B, H, W, C]: one for all that have none of their own, or one for each in order.

    Raises `RunError` for another number of pictures.
    """
    if len(images) not in (1, len(prompts)):
        raise RunError(f'input "image": found {len(images)} pictures, accepted: one for all, or {len(prompts)}, one for each prompt')
    references = [Reference.of_pixels(image) for image in images]
    return [prompt if getattr(prompt, "picture", None) else Prompt(prompt, references[i % len(references)]) for i, prompt in enumerate(prompts)]
