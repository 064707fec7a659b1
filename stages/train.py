"""Train folds of the CNN on the store, and predict each one's held-out patients.

Reads <data>/store.zarr and <data>/folds; writes <data>/train/fold-K/: model.pt, predictions.parquet, unlabelled.parquet,
history.csv, summary.json. Checkpoints are kept in <data>/wip/train, so that a stopped run goes on where it was; live curves
in <data>/live. On several GPUs: torchrun --nproc-per-node 4 -m stages.train.
"""

import argparse
from contextlib import nullcontext

from pipeline.checkpoint import MODEL_FORMAT, write_tensors
from pipeline.config import Config, load_config
from pipeline.errors import IchorError, UsageError
from pipeline.files import only_one, remove_folder, write_bytes, write_json, write_parquet
from pipeline.fold import FoldResult, train_fold
from pipeline.folds import read_folds
from pipeline.processes import Processes
from pipeline.provenance import ROOT, find_machine, find_revision
from pipeline.store import Store
from pipeline.survey import find_crop, measure_scope
from stages.common import door


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fold", type=int, metavar="K", help="train this fold alone (default: all of train.folds)")


def main(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.params)
    store = Store(arguments.data / "store.zarr")
    table = read_folds(arguments.data / "folds", store, config)
    if arguments.fold is not None and not 0 <= arguments.fold < config.folds.count:
        raise UsageError(
            f"--fold {arguments.fold}: folds.count = {config.folds.count} makes folds 0 to {config.folds.count - 1}"
        )
    wip = arguments.data / "wip" / "train"
    processes = Processes.join()
    try:
        for fold in config.train.folds if arguments.fold is None else [arguments.fold]:
            # the first process holds the lock; the others share its work
            with (
                only_one(wip / f"fold-{fold}.lock", f"training of fold {fold}") if processes.is_first else nullcontext()
            ):
                live = arguments.data / "live"
                result = train_fold(config, store, fold, table, wip=wip, processes=processes, live=live)
                if result is not None:
                    _write(arguments, config, store, fold, result)
    except RuntimeError as error:
        if processes.count == 1:
            raise
        raise IchorError(
            f"process {processes.rank + 1} of {processes.count} lost the others ({str(error).splitlines()[0][:160]}); the first error "
            f"above says why"
        ) from None
    finally:
        processes.leave()


def _write(arguments: argparse.Namespace, config: Config, store: Store, fold: int, result: FoldResult) -> None:
    folder = arguments.data / "train" / f"fold-{fold}"
    summary = result.summary | {"revision": find_revision(ROOT), "machine": dict(find_machine())}
    content = {
        **summary,  # first: its own `sequence` is no weights
        "format": MODEL_FORMAT,
        "members": result.members,
        "sequence": result.sequence.weights if result.sequence else None,
        "windows": {name: window.model_dump() for name, window in store.windows.items()},
        "image_size": store.image_size,
        "crop": find_crop(store),
        "scope": measure_scope(store),
        "phantom": config.source.is_phantom,
    }
    write_tensors(folder / "model.pt", content)
    write_parquet(folder / "predictions.parquet", result.predictions)
    write_parquet(folder / "unlabelled.parquet", result.unlabelled)
    write_bytes(folder / "history.csv", result.history.to_csv(index=False).encode())
    write_json(folder / "summary.json", summary)
    # it is done; training it again shall mean training
    remove_folder(arguments.data / "wip" / "train" / f"fold-{fold}")
    pace = result.history.iloc[-1]
    sequence = f", with the sequence model {result.sequence.best_loss:.4f}" if result.sequence else ""
    print(
        f"fold {fold}: best epoch {summary['best_epoch']} of {summary['epochs']}, validation loss "
        f"{summary['best_valid_loss']:.4f}{sequence}, {summary['seconds']:.0f} s, {pace['slices_per_s']:.0f} slices/s, "
        f"{pace['wait_share']:.1%} of it waiting for data; {folder}"
    )


if __name__ == "__main__":
    door(main, __doc__, add_arguments)
