"""Written whole, synced, renamed into place: the one way that anything here reaches its final name."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd

from pipeline.errors import IchorError


@contextmanager
def written_whole(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, sync it and rename it to `path`.

    A DVC output may be a read-only hard link into its cache: renaming over it replaces the name and leaves the cache be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # of this process alone: on a cluster two workers may make one study, and in containers have one process id
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        if synced:
            sync(temporary)
        os.replace(temporary, path)
        if synced:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes | memoryview, *, synced: bool = True) -> None:
    """Write a file whole or not at all; not `synced`, a power cut may take it or leave it torn."""
    with written_whole(path, synced=synced) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, in the order given; whole or not at all."""
    write_output(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    """Write a table without its index; whole or not at all; equal tables give equal bytes."""
    write_output(path, table.to_parquet(index=False, compression="zstd"))


def write_output(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all; a full disk is said in words."""
    try:
        write_bytes(path, content)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise disk_full(path.parent, len(content), path.name) from None


def sync(path: Path) -> None:
    """Have the disk hold a file, or a folder's list of names, before anything depends on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems have nothing of the kind for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def aside(final: Path, kind: str) -> Path:
    """A name beside `final` for a ``new`` or ``old`` one, for as long as this process needs it."""
    return final.with_name(f".{final.name}.{os.getpid()}.{kind}")


def left_aside(final: Path, kind: str) -> list[Path]:
    """What killed runs left under such names, the latest last."""
    found = final.parent.glob(f".{glob.escape(final.name)}.[0-9]*.{kind}")
    return sorted(found, key=lambda path: path.lstat().st_mtime_ns)


def replace_folder(new: Path, final: Path) -> None:
    """Put the whole folder `new` in the place of `final`, which may exist; it stays where that fails."""
    final.parent.mkdir(parents=True, exist_ok=True)
    old = aside(final, "old")
    try:
        if final.exists():
            os.replace(final, old)
        os.replace(new, final)
    except BaseException:  # a signal among them
        if old.exists() and not final.exists():
            os.replace(old, final)
        raise
    sync(final.parent)
    for path in left_aside(final, "old"):  # one that was killed here before may have left its own
        remove_folder(path)


def restore_folder(final: Path) -> None:
    """Give back what a run that was killed within `replace_folder` had put aside. Only for who knows that nobody else is at work."""
    left = left_aside(final, "old")
    if left and not final.exists():
        os.replace(left[-1], final)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove files that killed runs left under temporary names. Only for who knows that nobody else is at work there."""
    for path in folder.glob(pattern):
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder if it is there, or a link to one; its files may be read-only, as DVC leaves them."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
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


def is_disk_full(error: OSError) -> bool:
    """Whether there was no space left, or none that this user may have."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full(folder: Path, needed_bytes: float, what: str) -> IchorError:
    """The error of a run that filled the disk where `folder` is."""
    return IchorError(
        f"{folder}: the disk is full; {what} needs about {human_bytes(needed_bytes)}, "
        f"{human_bytes(shutil.disk_usage(folder).free)} are free; free some space and run the same command again: "
        f"what is finished is kept"
    )


def human_bytes(count: float) -> str:
    """A number of bytes for people: 1.4 GB, 312 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


@contextmanager
def only_one(
    lock: Path, what: str, *, where: Path | None = None, otherwise: str = "or give --data", is_kept: bool = True
) -> Iterator[None]:
    """Let one process at a time do `what`; the lock goes with the process, however it ends.

    Args:
        lock: a file; two folders above it is what is locked.
        what: said in the message.
        where: what is locked instead.
        otherwise: what else than to wait.
        is_kept: whether the lock's file stays.

    Raises:
        IchorError: another one is at it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_kept and not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                raise BlockingIOError  # it is that of a run which has just removed its own
        except (BlockingIOError, FileNotFoundError):
            raise IchorError(
                f"{lock}: another {what} is running on {where or lock.parent.parent}; wait for it {otherwise}"
            ) from None
        except OSError as error:
            raise IchorError(
                f"{lock}: this file system gives no locks ({error.strerror}), so that two runs could not be kept apart; mount it with "
                f"locks (Lustre: -o flock) or put it on another one with --data"
            ) from None
        try:
            yield
        finally:
            if not is_kept:
                lock.unlink(missing_ok=True)
