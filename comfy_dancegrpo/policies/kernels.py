"""By which kernels a policy's denoisers compute: diffusers' attention backends, and torch.compile of their repeated blocks. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .. import processes
from ..errors import RunError

if TYPE_CHECKING:
    import torch

    from .base import Policy

DEFAULT = "default"
# those of diffusers' AttentionBackendName that may have a backward pass and whose code is on this machine: not Sage's, and not the Hub's
BACKENDS = (DEFAULT, "native", "flash", "flash_varlen", "flex", "xformers", "_native_flash", "_native_efficient", "_native_cudnn", "_native_math", "_flash_3", "_flash_varlen_3")
_GRAPHS = 64  # torch.compile's limit for one function, of 8: a block is compiled by adapter, batch size, and whether its input has a gradient


def choose_attention(policy: Policy, name: str) -> None:
    """The denoisers' attention from now on, in rollout and training alike. Raises `RunError`, one line, where the family or this machine cannot have it."""
    if name == DEFAULT:
        return
    found = f'input "attention_backend": found {name!r}'
    if name not in BACKENDS:
        raise RunError(f"{found}, accepted: {', '.join(map(repr, BACKENDS))}")
    for denoiser in policy.denoisers.values():
        if not any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in denoiser.modules()):
            raise RunError(f"{found}, accepted by {policy.name!r}: {DEFAULT!r}, since {type(denoiser).__name__} does not let it be chosen")
    try:
        from diffusers.models.attention_dispatch import attention_backend

        _try_attention(name, policy.device, policy.dtype)
        for denoiser in policy.denoisers.values():
            with attention_backend("native"):  # which brings back, behind it, what other models of this process have
                denoiser.set_attention_backend(name)
    except Exception as error:  # of packages that are missing, kernels that no GPU of this kind has, ...
        raise RunError(f"{found}, which cannot be had on {policy.device.type} in {str(policy.dtype).removeprefix('torch.')}: {_first_line(error)}; "
                       f"accepted: {DEFAULT!r}, or another that can be trained through") from error


def _try_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises what it fails by, with its backward pass."""
    import torch
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    with torch.inference_mode(False), torch.enable_grad():
        query, key, value = (torch.ones(1, 128, 2, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        with attention_backend(name):
            dispatch_attention_fn(query, key, value).sum().backward()
    if any(tensor.grad is None for tensor in (query, key, value)):
        raise RuntimeError("it has no backward pass")


def compile_blocks(policy: Policy, backend: str | Callable = "inductor") -> None:
    """Compiles the blocks that the denoisers repeat, each for every batch size of its own; `Policy.predict` then calls one function in rollout and training.

    backend: of torch.compile. Raises `RunError`, one line, where the family or this machine cannot have it.
    """
    import torch

    found = 'input "compile": found true'
    if processes.sharded() or processes.team_size() > 1:
        raise RunError(f"{found}, accepted where processes share the weights or the tokens of a sample: false")
    for denoiser in policy.denoisers.values():
        if not getattr(denoiser, "_repeated_blocks", None):
            raise RunError(f"{found}, accepted by {policy.name!r}: false, since diffusers names no blocks of {type(denoiser).__name__} to be compiled")
    try:
        with torch.inference_mode(False):
            torch.compile(lambda x: x * 2 + 1, backend=backend, dynamic=False)(torch.ones(8, device=policy.device))
    except Exception as error:  # no compiler, no Triton, a Python that is too new, ...
        raise RunError(f"{found}, which cannot be had on {policy.device.type} here: {_first_line(error)}; accepted: false") from error
    limits, name = torch._dynamo.config, "cache_size_limit"
    setattr(limits, name, max(getattr(limits, name), _GRAPHS))
    for denoiser in policy.denoisers.values():
        denoiser.compile_repeated_blocks(backend=backend, dynamic=False)
    policy.compiled = True


def forget(policy: object) -> None:
    """Drops what was compiled, for sizes that will not come again."""
    if getattr(policy, "compiled", False):
        import torch

        torch._dynamo.reset()


def _first_line(error: Exception) -> str:
    error = getattr(error, "inner_exception", error)  # where torch.compile tells which backend it came from
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)
