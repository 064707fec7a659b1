"""Score the held-out predictions of the folds in train.folds, slice by slice and study by study; write the report.

Reads <data>/store.zarr and <data>/train/fold-K; writes into <data>/report: metrics.json (all figures), headline.json (the
few that tell two experiments apart), operating_points.json (temperatures and thresholds for reading new studies), roc.csv,
precision_recall.csv, reliability.csv and training.csv (curves), unlabelled.parquet (the folds' mean for studies without labels),
report.html and MODEL_CARD.md.
"""

import argparse
import json

from pipeline.card import render_card
from pipeline.config import load_config
from pipeline.curves import curve_table, precision_recall_table, reliability_table
from pipeline.errors import IchorError
from pipeline.evaluate import evaluate, training_table
from pipeline.files import write_bytes, write_json, write_parquet
from pipeline.flow import count_flow
from pipeline.provenance import describe_making
from pipeline.report import describe, render_report
from pipeline.results import average_folds
from pipeline.store import Store
from pipeline.survey import find_crop
from stages.common import door


def main(arguments: argparse.Namespace) -> None:
    folder = arguments.data / "report"
    if not arguments.show:
        _write(arguments)
    metrics_path = folder / "metrics.json"
    if not metrics_path.is_file():
        raise IchorError(f"{metrics_path}: no scores yet; run `python -m stages.evaluate` (or `dvc repro`) first")
    try:
        print(describe(json.loads(metrics_path.read_bytes())))
    except (ValueError, KeyError, TypeError):
        raise IchorError(
            f"{metrics_path}: not the scores of an evaluation; run `python -m stages.evaluate` again"
        ) from None
    print(f"report: {folder / 'report.html'}")


def _write(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.params)
    store = Store(arguments.data / "store.zarr")
    # as it was made: params.yaml may say something else by now
    stored = {"image_size": store.image_size, "windows": dict(store.windows), "crop": find_crop(store)}
    config = config.model_copy(update={"preprocess": config.preprocess.model_copy(update=stored)})
    done = evaluate(config, store, train=arguments.data / "train")
    summaries = [fold.summary for fold in done.folds]
    flow = count_flow(config, store, data=arguments.data, folds_digest=summaries[0]["folds_digest"])
    page = render_report(
        config,
        metrics=done.metrics,
        curves=done.curves,
        precision_recall=done.precision_recall,
        reliability=done.reliability,
        summaries=summaries,
        histories=[fold.history for fold in done.folds],
        pictures=done.pictures,
        without_heat=done.without_heat,
        windows=store.windows,
        accounting=store.attributes.get("accounting"),
        flow=flow,
        making=describe_making(config),
        store_digest=store.digest,
    )
    card = render_card(config, store, metrics=done.metrics, summaries=summaries, flow=flow)
    folder = arguments.data / "report"
    write_json(folder / "metrics.json", done.metrics)
    # without what the data cannot give: DVC passes over null, and would show fewer figures than the file has
    headline = {name: value for name, value in done.metrics["headline"].items() if value is not None}
    write_json(folder / "headline.json", headline)
    write_json(folder / "operating_points.json", done.operating_points)
    write_parquet(folder / "unlabelled.parquet", average_folds(done.folds))
    tables = {
        "roc": curve_table(done.curves),
        "precision_recall": precision_recall_table(done.precision_recall),
        "reliability": reliability_table(done.reliability),
        "training": training_table(done.folds),
    }
    for name, table in tables.items():
        write_bytes(folder / f"{name}.csv", table.to_csv(index=False).encode())
    write_bytes(folder / "report.html", page.encode())
    write_bytes(folder / "MODEL_CARD.md", card.encode())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--show", action="store_true", help="print the scores computed before, and compute nothing")


if __name__ == "__main__":
    door(main, __doc__, add_arguments)
