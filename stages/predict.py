"""Read new studies with trained networks: slices, studies, a picture of each, and a Kaggle submission if asked.

python -m stages.predict STUDY                              a folder, a file, a zip, a glob or a URL, of one or many studies
python -m stages.predict A B --model data/train/fold-0      one fold alone, not the mean of all
python -m stages.predict TEST --submission s.csv --sample stage_2_sample_submission.csv
python -m stages.predict STUDY --dicom                      also a Structured Report and captures, for an archive of pictures

Writes into --out: predictions.csv (slices), studies.csv (each study's highest), predictions.json (both, the model's digests, and
what became of every file) and sheets/ (the most suspicious slices, and where the network saw it); with --dicom also
dicom/NUMBER/ (report.dcm and capture-*.dcm, NUMBER as in sheets/), the one output that has the patient's name in it. Probabilities
are the network's own and, by the operating points that evaluation fitted for the same run, calibrated and called. Image size, crop,
windows and all else come from the model; --params says only which of a study's series is read, in how many processes, and on which
device.

A study that the model was not trained for is refused by name: no head in it, not axial, too few slices, contrast medium, or
pixels or slices of another size. Exit codes: 0 all studies predicted; 1 a fault that the message names; 2 wrong arguments;
3 some study was refused.
Research software, not a medical device.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import pandas as pd
import torch

from pipeline.answer import (
    REFUSED,
    Study,
    describe_result,
    explain_marks,
    read_sample,
    say,
    slice_table,
    study_table,
    submission,
)
from pipeline.config import Config, load_config
from pipeline.dicom_out import remove_studies, write_study
from pipeline.errors import IchorError, SourceError, UsageError
from pipeline.files import only_one, write_bytes, write_json
from pipeline.labels import ANY, LABELS, SUBTYPES
from pipeline.manifest import account, describe_account
from pipeline.operating import OperatingPoints, find_operating_points, read_operating_points, shorten_path
from pipeline.predict import identify, index_studies, predict_studies
from pipeline.sheet import SHORT
from pipeline.trained import Model, find_models, read_model
from stages.common import door

SOME_REFUSED = 3
SHEETS = "[0-9]*-*.png"
TABLES = ("predictions.csv", "studies.csv", "predictions.json")
STOPPED = "stopped; sheets of the studies that were read are written, tables are not; run the same command again, from the start"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folders, files, zips, globs or URLs of studies")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="RUN",
        help="a model.pt, or a folder of folds, averaged (default: those of train.folds in <data>/train)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), metavar="FOLDER", help="where to write (default: %(default)s)"
    )
    parser.add_argument(
        "--operating-points",
        type=Path,
        metavar="FILE",
        help="temperatures and thresholds that stages.evaluate fitted (default: those of the model's run)",
    )
    parser.add_argument("--no-heat", action="store_true", help="no Grad-CAM on the sheets")
    parser.add_argument("--dicom", action="store_true", help="also DICOM objects; they carry the patient's name")
    parser.add_argument("--submission", type=Path, metavar="FILE", help="also write ID,Label, six rows an image")
    parser.add_argument("--sample", type=Path, metavar="CSV", help="with --submission: take its rows, in its order")
    parser.add_argument(
        "--anyway", action="store_true", help="predict also what would be refused; the output's warnings then say why"
    )
    parser.add_argument("--json", action="store_true", help="print predictions.json")


def main(arguments: argparse.Namespace) -> None:
    if arguments.sample and not arguments.submission:
        raise UsageError("--sample says how the rows of --submission FILE are ordered; give that too")
    if arguments.submission and arguments.submission.is_dir():
        raise UsageError(f"--submission {arguments.submission}: a folder is there; give the name of a file")
    if arguments.sample:
        read_sample(arguments.sample)  # a wrong one is told now, not when all is predicted
    config = load_config(arguments.params)
    paths = (
        find_models(arguments.model) if arguments.model else find_models(arguments.data / "train", config.train.folds)
    )
    model = read_model(paths, device=config.train.device, store=arguments.data / "store.zarr")
    points = _find_points(arguments.operating_points, paths[0], model)
    with contextlib.redirect_stdout(sys.stderr):  # what index says is no part of the answer
        manifest = index_studies(arguments.paths, config)
    lock = only_one(
        arguments.out / ".lock", "predict", where=arguments.out, otherwise="or give another --out", is_kept=False
    )
    with lock:
        _predict(arguments, config, manifest, model, points)


def _predict(
    arguments: argparse.Namespace, config: Config, manifest: pd.DataFrame, model: Model, points: OperatingPoints
) -> None:
    started_s = time.monotonic()
    sheets = arguments.out / "sheets"
    # of an earlier run: a stopped one leaves nothing that looks like its own
    for old in (*sheets.glob(SHEETS), *(arguments.out / name for name in TABLES)):
        old.unlink(missing_ok=True)
    remove_studies(arguments.out / "dicom")
    unwritten: list[str] = []
    try:
        found = predict_studies(
            manifest,
            model,
            config,
            paths=arguments.paths,
            sheets=sheets,
            anyway=arguments.anyway,
            points=points,
            heat=not arguments.no_heat,
        )
        if arguments.dicom:
            found = _write_dicom(found, model, arguments.out / "dicom", unwritten)
        # without the pictures, which a thousand studies would fill the memory with
        studies = sorted((study._replace(suspects=None) for study in found), key=lambda study: study.uid)
    except torch.OutOfMemoryError:
        raise IchorError("predict: the device's memory is full; set train.device to cpu") from None
    seconds = time.monotonic() - started_s
    accounting = account(manifest)
    result = describe_result(studies, model, accounting, points=points)
    slices = slice_table(studies, model)
    tables = (slices, study_table(studies, model))
    for name, table in zip(TABLES, tables, strict=False):
        write_bytes(arguments.out / name, table.to_csv(index=False).encode())
    write_json(arguments.out / TABLES[-1], result)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        print(describe_account(accounting))
        hint = "" if arguments.anyway else " (--anyway predicts them too, where a slice can be used)"
        _show(studies, model, points, hint=hint, done=f"{seconds:.1f} s; {arguments.out}")
    if arguments.submission:
        rows = submission(slices, arguments.sample, anyway=arguments.anyway)
        write_bytes(arguments.submission, rows.to_csv(index=False).encode())
    if unwritten:
        raise SourceError(
            f"no DICOM objects of {len(unwritten)} study(ies), all else is written: {'; '.join(unwritten)}"
        )
    if any(study.status == REFUSED for study in studies):
        sys.exit(SOME_REFUSED)


def _write_dicom(found: Iterable[Study], model: Model, folder: Path, unwritten: list[str]) -> Iterator[Study]:
    """The studies as they come, each with its DICOM objects written; why not, if not, goes into `unwritten`."""
    made = datetime.now()
    for study in found:
        if study.table is not None:
            try:
                write_study(folder / study.sheet.split("-")[0], study, model, made=made)
            except SourceError as error:
                unwritten.append(f"study {study.uid}: {error}")
        yield study


def _find_points(given: Path | None, model_path: Path, model: Model) -> OperatingPoints:
    path = given or find_operating_points(model_path)
    if path is None:
        return OperatingPoints(
            why_not=f"{shorten_path(model_path)}: its run has no operating points; run `python -m stages.evaluate`, or give --operating-points FILE"
        )
    return read_operating_points(path, identity=identify(model))


def _show(studies: Sequence[Study], model: Model, points: OperatingPoints, *, hint: str, done: str) -> None:
    order = [LABELS[ANY], *SUBTYPES]
    print(f"{'':16}{''.join(f'{SHORT.get(name, name):>8} ' for name in order)} slice   study")
    for study in studies:
        cells = "".join(f"{_align(say(study, name)):>9}" for name in order if study.table is not None)
        where = "" if study.table is None else f"{(study.suspicious_slice or 0) + 1}/{study.slices}"
        print(f"{study.status:16}{cells or ' ' * 54} {where:8}{study.uid}")
        for warning in study.warnings:
            print(f"{'':18}{warning}")
    print(f"{explain_marks(points)}{': ' if points.why_not else ''}{points.why_not}")
    slices = sum(study.slices for study in studies if study.table is not None)
    refused = sum(study.status == REFUSED for study in studies)
    print(
        f"{len(studies) - refused:,} studies ({slices:,} slices) predicted by {len(model.folds)} fold(s), {refused:,} refused"
        f"{hint if refused else ''}, {done}"
    )


def _align(text: str) -> str:
    """With the last digit where it is without a mark."""
    return text if text.endswith(("*", ")")) else f"{text} "


if __name__ == "__main__":
    door(main, __doc__, add_arguments, stopped=STOPPED)
