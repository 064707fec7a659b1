"""Free the disk of work that the current store does not use.

Removes kept shards that the store does not use, and stores left by stopped runs; what such a run would go on from stays.
`make prune` also has DVC forget cached outputs of other revisions of this workspace.
"""

import argparse
import json
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

from pipeline.convert import shard_path
from pipeline.errors import StoreError
from pipeline.files import human_bytes, left_aside, only_one, remove_folder, restore_folder
from pipeline.store import Store
from stages.common import door


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--all",
        action="store_true",
        help="also what a stopped run would go on from: checkpoints, studies of the phantom",
    )


def main(arguments: argparse.Namespace) -> None:
    wip, store = arguments.data / "wip", (arguments.data / "store.zarr").resolve()
    freed = 0
    with ExitStack() as locks:
        locks.enter_context(only_one(wip / "preprocess.lock", "preprocess"))
        restore_folder(store)
        try:
            used = Counter(Store(store).per_study["content"].tolist())
        except StoreError:
            used = Counter()
        if used or arguments.all:  # without a store, all are a stopped run's
            kept = _find_used(wip / "shards", used)
            for path in (wip / "shards").glob("*"):
                if path.name.split(".")[0] not in kept:
                    freed += path.stat().st_size if path.stat().st_nlink == 1 else 0
                    path.unlink()
        folders = [*left_aside(store, "new"), *left_aside(wip / "store.zarr", "new")]
        folders += left_aside(store, "old") if used else []  # else it may be all that is left of a store
        if arguments.all:
            locks.enter_context(only_one(wip / "phantom.lock", "phantom", is_kept=False))
            for lock in (wip / "train").glob("fold-*.lock"):
                locks.enter_context(only_one(lock, "training"))
            folders += [*wip.glob("phantom-*"), *(path for path in (wip / "train").glob("fold-*") if path.is_dir())]
        for folder in folders:
            freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            remove_folder(folder)
    print(f"{wip}: {human_bytes(freed)} freed")


def _find_used(shards: Path, used: Counter[str]) -> set[str]:
    """The fingerprints that the store was made of. Other code may have made the same pixels under another fingerprint: then it is
    the one whose shard is a name of the store's own file, or else the latest."""

    def rank(record: Path) -> tuple[int, int]:
        shard = shard_path(shards, record.stem, 0)
        return shard.stat().st_nlink if shard.exists() else 0, record.stat().st_mtime_ns

    left, found = used.copy(), set()
    for record in sorted(shards.glob("*.json"), key=rank, reverse=True):
        content = _content_of(record)
        if left[content] > 0:
            left[content] -= 1
            found.add(record.stem)
    return found


def _content_of(record: Path) -> str:
    """What stands for the pixels of a finished study; nothing where the record is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(record.read_bytes())["content"])
    return ""


if __name__ == "__main__":
    door(main, __doc__, add_arguments)
