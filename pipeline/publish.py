"""Where a finished store goes: into a folder, by a rename, or to a URL, its root last. Refused early where something else is in the way."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import IchorError, StoreError
from pipeline.files import aside, left_aside, only_one, remove_folder, replace_folder, restore_folder
from pipeline.progress import Progress
from pipeline.storage import URL, open_storage
from pipeline.store import FORMAT

ROOT = "zarr.json"

SENDING = ".being-sent-by-ichor"
"""Lies beside a store while it is being sent: who finds it and no root may begin anew."""

SENT_TOGETHER, SENT_AT_ONCE = 64, 16
"""Files between two looks of the progress bar, and how many of them are under way: one by one, each would cost the storage's
latency, 20 to 50 ms, which is 20 minutes for RSNA's 25,000 shards."""


class Target:
    """Where the store goes.

    Args:
        store: a folder or a URL; None for `data/store.zarr`.
        data: the folder of the stages' outputs.
    """

    def __init__(self, store: str | None, data: Path) -> None:
        self.url = store if store and URL.match(store) else None
        # of a URL the name is that of the folder from which it is sent; a link leads to the disk that is meant
        self.final = (data / "wip" / "store.zarr" if self.url else Path(store or data / "store.zarr")).resolve()
        self.temporary = aside(self.final, "new")
        """On the same file system, so that it can be renamed."""
        self.is_own = store is None

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep others away for the time of the block, and clear away what a killed run left.

        Raises:
            StoreError: something that is no store is there, or it cannot be written there.
            IchorError: another run is at it.
        """
        if self.url:
            _claim_url(self.url)
        else:
            _require_target(self.final)
        self.final.parent.mkdir(parents=True, exist_ok=True)
        lock = self.final.with_name(f".{self.final.name}.lock")
        others = only_one(lock, "preprocess", where=self.final, otherwise="or give another --store", is_kept=False)
        with nullcontext() if self.is_own or self.url else others:
            restore_folder(self.final)
            self._clear()
            try:
                yield
            finally:
                self._clear()

    def publish(self) -> None:
        """Put the store that was made at `temporary` in its place."""
        if self.url:
            system, path = open_storage(self.url)
            send_store(self.temporary, self.url, system=system, target=path)
        else:
            replace_folder(self.temporary, self.final)

    def _clear(self) -> None:
        for path in left_aside(self.final, "new"):
            remove_folder(path)


def _require_target(path: Path) -> None:
    """Refuse to put a store in the place of something else.

    Raises:
        StoreError: there is a file, or a folder with other things in it than a store.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    with suppress(OSError):
        if _is_ours((path / ROOT).read_bytes()):
            return
    raise _occupied(path)


def _claim_url(url: str) -> None:
    """Refuse to send a store into the place of something else, and see that it can be written there."""
    with _writing(url):
        system, target = open_storage(url)
        if "/" not in target.strip("/"):
            raise StoreError(
                f"--store {url}: a whole bucket; give the name of a store in it, such as {url.rstrip('/')}/store.zarr"
            )
        root = system.cat_file(f"{target}/{ROOT}") if system.exists(f"{target}/{ROOT}") else None
        is_free = system.exists(f"{target}/{SENDING}") or not system.exists(target)
        if not (is_free if root is None else _is_ours(root)):
            raise _occupied(url)
        system.pipe_file(f"{target}/{SENDING}", b"")


def send_store(folder: Path, url: str, *, system: Any, target: str) -> None:
    """Copy a whole store to a URL, its root metadata last: until then it cannot be opened.

    Args:
        folder: the store.
        url: for the messages, such as ``s3://bucket/store.zarr``.
        system: its storage, a file system as fsspec has them.
        target: the URL's path in it; what lies there beside the store's arrays stays.

    Raises:
        StoreError: it cannot be written there.
    """
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    with _writing(url):
        if system.exists(f"{target}/{ROOT}"):
            system.rm_file(f"{target}/{ROOT}")
        # of an array that now holds nothing but its fill value, even the one chunk would be stale
        arrays = "|".join(re.escape(path.name) for path in folder.iterdir() if path.is_dir())
        of_store = re.compile(rf"{re.escape(target)}/({arrays})/(zarr\.json|c[./0-9]*)")
        stale = {name for name in system.find(target) if of_store.fullmatch(name)}
        stale -= {f"{target}/{path}" for path in paths}
        if stale:
            system.rm(sorted(stale))
        with Progress(len(paths), what="sending", unit="files") as progress:
            first = [path for path in paths if path != ROOT]
            for group in [*(first[at : at + SENT_TOGETHER] for at in range(0, len(first), SENT_TOGETHER)), [ROOT]]:
                names = [f"{target}/{path}" for path in group]
                system.put([str(folder / path) for path in group], names, batch_size=SENT_AT_ONCE)
                progress.advance(len(group))
        if system.exists(f"{target}/{SENDING}"):
            system.rm_file(f"{target}/{SENDING}")


@contextmanager
def _writing(url: str) -> Iterator[None]:
    """Say in words what storage that cannot be written says in a family of errors of its own."""
    try:
        yield
    except IchorError:
        raise
    except Exception as error:
        raise StoreError(
            f"--store {url}: cannot be written ({type(error).__name__}: {' '.join(str(error).split())[:200]}); check the name, "
            f"the credentials and the endpoint (AWS_ENDPOINT_URL)"
        ) from None


def _is_ours(root: bytes) -> bool:
    with suppress(ValueError, KeyError, TypeError):
        return bool(json.loads(root)["attributes"]["format"] == FORMAT)
    return False


def _occupied(where: Path | str) -> StoreError:
    return StoreError(
        f"--store {where}: something that is no store is there, and would be replaced; give the name of a new one"
    )
