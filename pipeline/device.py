"""Where the network runs, and in which precision."""

from __future__ import annotations

import torch

from pipeline.errors import ConfigError


def choose_device(name: str, *, local_rank: int = 0) -> torch.device:
    """`auto` is a GPU if there is one, else the CPU.

    Args:
        name: `auto`, or torch's name of a device.
        local_rank: number of this process among those of its host, each of which takes a GPU of its own.

    Raises:
        ConfigError: the device is unknown or not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(
            f"train.device = {name!r}: cannot be used here, by process {local_rank + 1} of this host ({first_line}); set it to auto "
            f"or cpu, and start no more processes than there are GPUs"
        ) from None
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The type for autocast, or None for full precision: `auto` is bf16 on a GPU that has it."""
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if has_bf16 else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
