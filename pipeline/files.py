"""Written whole, synced, renamed into place: the one way that anything here reaches its final name."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.errors import IchorError


@contextmanager
def written_whole(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, sync it and rename it to `path`.

    A DVC output may be a read-only hard link into its cache: renaming over it replaces the name and leaves the cache be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if synced:
            sync(temporary)
        os.replace(temporary, path)
        if synced:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, *, synced: bool = True) -> None:
    """Write a file whole or not at all; not `synced`, a power cut may take it or leave it torn."""
    with written_whole(path, synced=synced) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, in the order given; whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    """Write a table without its index; whole or not at all; equal tables give equal bytes."""
    with written_whole(path) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd")


def sync(path: Path) -> None:
    """Have the disk hold a file, or a folder's list of names, before anything depends on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(new: Path, final: Path) -> None:
    """Put the whole folder `new` in the place of `final`, which may exist."""
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    sync(final.parent)
    remove_folder(old)


def remove_folder(path: Path) -> None:
    """Remove a folder if it is there; its files may be read-only, as DVC leaves them."""
    if path.exists():
        shutil.rmtree(path)


def require_free_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        IchorError: fewer than `needed_bytes` are free where `folder` is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise IchorError(
            f"{folder}: {what} needs about {human_bytes(needed_bytes)}, but {human_bytes(free_bytes)} are free; "
            f"free some space or give --data another disk"
        )


def human_bytes(count: float) -> str:
    """A number of bytes for people: 1.4 GB, 312 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


@contextmanager
def only_one(lock: Path, what: str) -> Iterator[None]:
    """Let one process at a time do `what`; the lock goes with the process, however it ends.

    Raises:
        IchorError: another one is at it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise IchorError(
                f"{lock}: another {what} is running on {lock.parent.parent}; wait for it or give --data"
            ) from None
        yield
