"""Train folds of the CNN on the store, and predict each one's held-out patients.

Reads <data>/store.zarr; writes <data>/train/fold-K/: model.pt, predictions.parquet, history.csv, summary.json. Checkpoints
are kept in <data>/wip/train, so that a stopped run goes on where it was.
"""

import argparse

import torch

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.files import only_one, remove_folder, write_bytes, write_json, write_parquet, written_whole
from pipeline.store import Store
from pipeline.trainer import train_fold
from stages.common import door


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fold", type=int, metavar="K", help="train this fold alone (default: all of train.folds)")


def main(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.params)
    store = Store(arguments.data / "store.zarr")
    if arguments.fold is not None and not 0 <= arguments.fold < config.folds.count:
        raise ConfigError(
            f"--fold {arguments.fold}: folds.count = {config.folds.count} makes folds 0 to {config.folds.count - 1}"
        )
    wip = arguments.data / "wip" / "train"
    for fold in config.train.folds if arguments.fold is None else [arguments.fold]:
        with only_one(wip / f"fold-{fold}.lock", f"training of fold {fold}"):
            result = train_fold(config, store, fold, wip=wip)
            folder = arguments.data / "train" / f"fold-{fold}"
            with written_whole(folder / "model.pt") as temporary:
                torch.save(
                    {
                        "weights": result.weights,
                        "windows": list(store.windows),
                        "image_size": store.image_size,
                        **result.summary,
                    },
                    temporary,
                )
            write_parquet(folder / "predictions.parquet", result.predictions)
            write_bytes(folder / "history.csv", result.history.to_csv(index=False).encode())
            write_json(folder / "summary.json", result.summary)
            for checkpoints in wip.glob(f"fold-{fold}-*"):
                remove_folder(checkpoints)  # the fold is done; training it again shall mean training
        print(
            f"fold {fold}: best epoch {result.summary['best_epoch']} of {result.summary['epochs']}, validation loss {result.summary['best_valid_loss']:.4f}, {result.summary['seconds']:.0f} s; {folder}"
        )


if __name__ == "__main__":
    door(main, __doc__, add_arguments)
