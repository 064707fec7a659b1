"""Free the disk of work that the current store does not use.

Removes kept shards that the store does not use, and stores left by stopped runs; what such a run would go on from stays.
`make prune` also has DVC forget cached outputs of other revisions of this workspace.
"""

import argparse
from contextlib import ExitStack

from pipeline.errors import StoreError
from pipeline.files import human_bytes, only_one, remove_folder
from pipeline.store import Store
from stages.common import door


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--all",
        action="store_true",
        help="also what a stopped run would go on from: checkpoints, studies of the phantom",
    )


def main(arguments: argparse.Namespace) -> None:
    wip = arguments.data / "wip"
    try:
        used = set(Store(arguments.data / "store.zarr").per_study["fingerprint"].tolist())
    except StoreError:
        used = set()
    freed = 0
    with ExitStack() as locks:
        locks.enter_context(only_one(wip / "preprocess.lock", "preprocess"))
        shards = (wip / "shards").glob("*") if used or arguments.all else []  # without a store, all are a stopped run's
        for path in shards:
            if path.name.split(".")[0] not in used:
                freed += path.stat().st_size if path.stat().st_nlink == 1 else 0
                path.unlink()
        folders = [*wip.glob("store-*.zarr"), *arguments.data.glob(".store.zarr.*.old")]
        if arguments.all:
            for lock in (wip / "train").glob("fold-*.lock"):
                locks.enter_context(only_one(lock, "training"))
            folders += [*wip.glob("phantom-*"), *(path for path in (wip / "train").glob("fold-*") if path.is_dir())]
        for folder in folders:
            freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            remove_folder(folder)
    print(f"{wip}: {human_bytes(freed)} freed")


if __name__ == "__main__":
    door(main, __doc__, add_arguments)
