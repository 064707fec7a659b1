"""Free the disk of unfinished work that the current store and the runs under way do not use.

Removes kept shards of other parameters, phantom studies and stores left by stopped runs; keeps checkpoints unless --all.
`make prune` also has DVC forget cached outputs of other revisions of this workspace.
"""

import argparse

from pipeline.errors import StoreError
from pipeline.files import human_bytes, only_one, remove_folder
from pipeline.store import Store
from stages.common import door


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="also remove checkpoints of unfinished training")


def main(arguments: argparse.Namespace) -> None:
    wip = arguments.data / "wip"
    try:
        used = set(Store(arguments.data / "store.zarr").per_study["fingerprint"].tolist())
    except StoreError:
        used = set()
    freed = 0
    with only_one(wip / "preprocess.lock", "preprocess"):
        for path in (wip / "shards").glob("*"):
            if path.name.split(".")[0] not in used:
                freed += path.stat().st_size if path.stat().st_nlink == 1 else 0
                path.unlink()
        stopped = [*wip.glob("store-*.zarr"), *wip.glob("phantom-*")]
        for folder in [*stopped, *([wip / "train"] if arguments.all else [])]:
            freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            remove_folder(folder)
    print(f"{wip}: {human_bytes(freed)} freed")


if __name__ == "__main__":
    door(main, __doc__, add_arguments)
