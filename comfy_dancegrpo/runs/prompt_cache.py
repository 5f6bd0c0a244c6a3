"""Encoded prompts: in memory for as long as a run lasts, and on disk for the next ones."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..atomic import replacing
from ..grpo.protocol import Conditioning, Size
from ..policies.base import Policy
from ..workflow.host import host

FOLDER = "prompt_cache"  # in the output folder
IN_MEMORY = 4 * 2**30  # bytes of encoded prompts that are kept in main memory: a thousand of FLUX.1


class PromptCache:
    """Of one policy. On disk a prompt is a file, named after all that its encoding depends on: the model's files (paths, sizes, times),
    dtype, text, picture, size of the sample, and the versions of the libraries. A file that is damaged is made anew.

    In memory are at most `limit` bytes beside the prompts of the call under way, the latest used ones; nothing of what is on disk. `held` counts them.
    """

    def __init__(self, policy: Policy, limit: int = IN_MEMORY):
        self._policy, self.held = policy, 0
        self._limit = 0 if policy.prompt_cache == "disk" else limit
        self._memory: dict[tuple[str, Size], Conditioning] = {}  # the longest unused first
        self._folder = host().output_folder / FOLDER if policy.prompt_cache == "disk" else None
        self._identity = _identity(policy) if self._folder else ""

    def get(self, prompts: Iterable[str], size: Size, upcoming: Iterable[str] = ()) -> Conditioning:
        """A row a prompt, on the policy's device. Each is encoded alone, once: its encoding does not depend on which others came with it.

        Where one must be encoded, so are the `upcoming` ones, as far as there is room: the text encoders are brought to an accelerator the fewer times.
        """
        prompts = tuple(prompts)
        self._policy.check(prompts)
        wanted = {(prompt, size) for prompt in prompts}
        for prompt in prompts:
            if (prompt, size) in self._memory:
                self._memory[prompt, size] = self._memory.pop((prompt, size))  # the latest used
        if missing := self._missing(prompts, size):
            upcoming = () if self._policy.device.type == "cpu" else tuple(upcoming)
            ahead = self._missing(upcoming, size)
            kept = wanted if self._folder is not None else wanted | {(prompt, size) for prompt in upcoming}
            last = 0
            with torch.no_grad(), self._policy.encoding():
                for prompt in dict.fromkeys([*missing, *ahead]):
                    if self._folder is None and (prompt, size) not in wanted and not self._make_room(kept, last):
                        break
                    found = self._policy.condition([prompt], size).tensors
                    last = self._keep(prompt, size, {name: value.cpu() for name, value in found.items()})
                    self._write(prompt, size)
        self._make_room(wanted)
        joined = Conditioning.join([self._memory[prompt, size] for prompt in prompts])
        return Conditioning({name: value.to(self._policy.device) for name, value in joined.tensors.items()})

    def _missing(self, prompts: Iterable[str], size: Size) -> list[str]:
        """Those that are neither in memory nor on disk; what is on disk is in memory afterwards."""
        return [prompt for prompt in dict.fromkeys(prompts) if (prompt, size) not in self._memory and not self._read(prompt, size)]

    def _keep(self, prompt: str, size: Size, tensors: dict[str, Tensor]) -> int:
        """Its bytes."""
        self._memory[prompt, size] = Conditioning(tensors)
        self.held += (added := _bytes(self._memory[prompt, size]))
        return added

    def _make_room(self, kept: set[tuple[str, Size]], more: int = 0) -> bool:
        """Lets go of the longest unused, though none of those kept. Whether there is now room for so many bytes more."""
        for key in [key for key in self._memory if key not in kept]:
            if self.held + more <= self._limit:
                break
            self.held -= _bytes(self._memory.pop(key))
        return self.held + more <= self._limit

    # -- on disk ------------------------------------------------------------------------------------------------------
    def _path(self, prompt: str, size: Size) -> Path:
        picture = getattr(prompt, "picture", None)
        key = json.dumps([self._identity, str(prompt), picture.key if picture else None, str(size)])
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _read(self, prompt: str, size: Size) -> bool:
        if self._folder is None or not (path := self._path(prompt, size)).is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                whole = (file.metadata() or {}).get("sha256") == _digest(tensors)
        except (SafetensorError, OSError):
            whole = False
        if not whole:
            host().say(f"the encoded prompt {path} is damaged; it is made anew")
            return False
        self._keep(prompt, size, tensors)
        return True

    def _write(self, prompt: str, size: Size) -> None:
        if self._folder is None:
            return
        tensors = {name: value.contiguous() for name, value in self._memory[prompt, size].tensors.items()}
        try:
            with replacing(self._path(prompt, size), f".{platform.node()}-{os.getpid()}") as beside:  # another process, of another machine too, may write the same prompt
                save_file(tensors, beside, metadata={"sha256": _digest(tensors)})
        except (SafetensorError, OSError) as error:  # a full disk; or, on Windows, another process reads the file
            host().say(f"an encoded prompt could not be kept in {self._folder}: {' '.join(str(error).split())}")


def encode(policy: Policy, prompts: Iterable[str], size: Size) -> Conditioning:
    """The prompts of one call, a row each."""
    return PromptCache(policy).get(prompts, size)


def _bytes(conditioning: Conditioning) -> int:
    return sum(value.nbytes for value in conditioning.tensors.values())


def _digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {list(tensors[name].shape)} {tensors[name].dtype}".encode())
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy() if tensors[name].numel() else b"")
    return found.hexdigest()


def _identity(policy: Policy) -> str:
    """Tells a policy's encoders from all others."""
    files = [file for source in policy.sources for file in (sorted(source.rglob("*")) if source.is_dir() else [source]) if file.is_file()]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    versions = [__version__, torch.__version__, diffusers.__version__, transformers.__version__]
    return json.dumps([type(policy).__name__, str(policy.dtype), policy.device.type, *versions, stats])
