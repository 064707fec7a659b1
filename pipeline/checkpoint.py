"""Checkpoints that are whole or not there: written under another name, synced, renamed; the newest readable one counts."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.config import differences
from pipeline.errors import CheckpointError
from pipeline.files import write_output

MODEL_FORMAT = 1
"""Of model.pt; raise it when one of the old form would be misread."""

KEEP = 2
"""The newest, and one more should the newest be damaged."""


def save_checkpoint(folder: Path, step: int, content: dict[str, Any]) -> None:
    """Write `content` (tensors, numbers, texts, lists, dicts) as the checkpoint of `step`, and drop the oldest."""
    write_tensors(folder / f"step-{step:09d}.pt", content)
    for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
        old.unlink()


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values, to be read by ``torch.load(weights_only=True)``; whole or not at all.

    By way of memory: torch's own writer answers a full disk with an error that doesn't say so.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_output(path, buffer.getbuffer())


def load_newest(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest whole checkpoint of a folder, or None.

    Args:
        folder: where checkpoints lie.
        identity: what the checkpoint must have been made from; compared key by key.

    Raises:
        CheckpointError: it was made from other parameters or another store.
    """
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # on damaged bytes torch.load raises what it stumbles on: struct.error, AssertionError ...
            print(f"{path}: damaged, passed over", file=sys.stderr)  # the one before it is whole
            continue
        found_identity = {name: content["identity"].get(name) for name in identity}
        for key, (found, expected) in differences(found_identity, identity).items():
            raise CheckpointError(
                f"{path}: made with {key} = {found!r}, this run has {expected!r}; remove {folder} to start anew"
            )
        return content
    return None
