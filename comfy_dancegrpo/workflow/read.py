"""Reads a saved workflow: the editor's JSON (version 0.4 or 1), the API format, or either from a PNG that ComfyUI wrote."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from comfy_dancegrpo.errors import WorkflowError

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class SavedWorkflow:
    """A workflow as it was saved.

    `format` is "ui" (the editor's graph) or "api" (`{id: {class_type, inputs}}`), `data` the parsed object, `source` the
    file's name for messages, and `raw` the JSON document's bytes (of a PNG: those of the text that was taken from it).
    """

    format: Literal["ui", "api"]
    data: dict[str, Any]
    source: str
    raw: bytes


def read_workflow(path_or_bytes: str | os.PathLike[str] | bytes) -> SavedWorkflow:
    """Reads a workflow from a file, or from a file's bytes.

    Raises WorkflowError, one line: no such file, not JSON (with line and column), not an object, not a workflow (with what
    was seen), an empty workflow, a PNG that holds none.
    """
    if isinstance(path_or_bytes, bytes):
        source, raw = "workflow", path_or_bytes
    else:
        source, raw = os.fspath(path_or_bytes), _read_file(Path(path_or_bytes))
    if raw.startswith(_PNG_SIGNATURE):
        raw = _text_of_png(raw, source)
    data = _parse(raw, source)
    return SavedWorkflow(_format_of(data, source), data, source, raw)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise WorkflowError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise WorkflowError(f"{path}: is a folder, accepted: a .json or .png file") from None
    except OSError as error:
        raise WorkflowError(f"{path}: cannot be read: {error.strerror or error}") from None


def _text_of_png(raw: bytes, source: str) -> bytes:
    """The "workflow" text, for the saved graph is the program; else the "prompt" that ComfyUI writes for API calls."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(raw)) as image:
            texts = dict(image.info)
    except UnidentifiedImageError:  # its words name an object of ours
        raise WorkflowError(f"{source}: not a readable PNG: it is damaged or cut off") from None
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for broken files and for oversized text
        raise WorkflowError(f"{source}: not a readable PNG: {error}") from None
    for key in ("workflow", "prompt"):
        text = texts.get(key)
        if isinstance(text, str) and text.strip() not in ("", "null", "{}"):
            return text.encode()
    raise WorkflowError(f"{source}: this PNG holds no workflow (no text named 'workflow' or 'prompt')")


def _parse(raw: bytes, source: str) -> dict[str, Any]:
    try:
        data = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise WorkflowError(f"{source}: neither UTF-8 text nor a PNG") from None
    except json.JSONDecodeError as error:
        raise WorkflowError(f"{source}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise WorkflowError(f"{source}: JSON nested too deeply") from None
    if not isinstance(data, dict):
        raise WorkflowError(f"{source}: not a workflow: found {_kind(data)}, accepted: an object")
    return data


def _format_of(data: dict[str, Any], source: str) -> Literal["ui", "api"]:
    if isinstance(data.get("nodes"), list):
        if not data["nodes"]:
            raise WorkflowError(f"{source}: the workflow is empty (it has no nodes)")
        return "ui"
    if not data:
        raise WorkflowError(f"{source}: the workflow is empty (it has no nodes)")
    if any(isinstance(node, dict) and "class_type" in node for node in data.values()):
        return "api"
    keys = ", ".join(repr(key) for key in list(data)[:5])
    raise WorkflowError(f"{source}: not a workflow: found an object with {keys}, accepted: the editor's format "
                        "(with 'nodes') or the API format (nodes with 'class_type')")


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
