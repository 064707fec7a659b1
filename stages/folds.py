"""Deal the patients to folds, and prove that none is on both sides.

Reads <data>/store.zarr, of which patients and labels matter and pixels do not; writes <data>/folds/folds.csv (one row a study:
patient key, study, fold, labels) and summary.json (digest, counts of every fold, what the check found).
"""

import argparse

from pipeline.config import load_config
from pipeline.folds import deal_folds, describe_folds, write_folds
from pipeline.store import Store
from stages.common import door


def main(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.params)
    store = Store(arguments.data / "store.zarr")
    folder = arguments.data / "folds"
    summary = write_folds(folder, deal_folds(config, store), config=config, store=store)
    print(describe_folds(summary))
    print(f"fold table: {folder / 'folds.csv'}")


if __name__ == "__main__":
    door(main, __doc__)
