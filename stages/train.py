"""Train folds of the CNN on the store, and predict each one's held-out patients.

Reads <data>/store.zarr and <data>/folds; writes <data>/train/fold-K/: model.pt, predictions.parquet, unlabelled.parquet,
history.csv, summary.json. Checkpoints are kept in <data>/wip/train, so that a stopped run goes on where it was; live curves
in <data>/live. On several GPUs: torchrun --nproc-per-node 4 -m stages.train.
"""

import argparse

import torch

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.files import only_one, remove_folder, write_bytes, write_json, write_parquet, written_whole
from pipeline.fold import FoldResult, train_fold
from pipeline.folds import read_folds
from pipeline.processes import Processes
from pipeline.store import Store
from stages.common import door


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fold", type=int, metavar="K", help="train this fold alone (default: all of train.folds)")


def main(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.params)
    store = Store(arguments.data / "store.zarr")
    table = read_folds(arguments.data / "folds", store, config)
    if arguments.fold is not None and not 0 <= arguments.fold < config.folds.count:
        raise ConfigError(
            f"--fold {arguments.fold}: folds.count = {config.folds.count} makes folds 0 to {config.folds.count - 1}"
        )
    wip = arguments.data / "wip" / "train"
    processes = Processes.join()
    for fold in config.train.folds if arguments.fold is None else [arguments.fold]:
        # each host's first process holds the lock; the others share its work
        name = f"fold-{fold}" if processes.is_first else f"fold-{fold}.{processes.rank}"
        with only_one(wip / f"{name}.lock", f"training of fold {fold}"):
            live = arguments.data / "live"
            result = train_fold(config, store, fold, table, wip=wip, processes=processes, live=live)
            if result is not None:
                _write(arguments, store, fold, result)
    processes.leave()


def _write(arguments: argparse.Namespace, store: Store, fold: int, result: FoldResult) -> None:
    folder = arguments.data / "train" / f"fold-{fold}"
    with written_whole(folder / "model.pt") as temporary:
        torch.save(
            {
                "members": result.members,
                "sequence": result.sequence.weights if result.sequence else None,
                "windows": {name: window.model_dump() for name, window in store.windows.items()},
                "image_size": store.image_size,
                **result.summary,
            },
            temporary,
        )
    write_parquet(folder / "predictions.parquet", result.predictions)
    write_parquet(folder / "unlabelled.parquet", result.unlabelled)
    write_bytes(folder / "history.csv", result.history.to_csv(index=False).encode())
    write_json(folder / "summary.json", result.summary)
    for checkpoints in (arguments.data / "wip" / "train").glob(f"fold-{fold}-*"):
        remove_folder(checkpoints)  # the fold is done; training it again shall mean training
    summary = result.summary
    sequence = f", with the sequence model {result.sequence.best_loss:.4f}" if result.sequence else ""
    print(
        f"fold {fold}: best epoch {summary['best_epoch']} of {summary['epochs']}, validation loss "
        f"{summary['best_valid_loss']:.4f}{sequence}, {summary['seconds']:.0f} s; {folder}"
    )


if __name__ == "__main__":
    door(main, __doc__, add_arguments)
