"""New studies through trained networks: found, repaired, ordered, windowed and looked at by the functions that made the training.

This is the one module on both sides of the wall: what index and preprocess make of DICOM goes, study by study, to the networks.
A network knows only what it was trained on. A study that is something else is refused by name; a person may override that, and
the result then says so.
Axes: N slices, S slices of a study, R rows, C columns, W windows, L labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from pipeline.answer import ANYWAY, NO_POINTS, PREDICTED, REFUSED, TOLD, SliceFile, Study, Suspects, explain_marks, say
from pipeline.cluster import run_tasks
from pipeline.config import Config, SequenceConfig, Source, without_folders
from pipeline.convert import SliceReader, StudyResult, StudyTask, count_parts, make_shards, shard_path
from pipeline.device import choose_precision
from pipeline.errors import SourceError
from pipeline.files import remove_folder, written_whole
from pipeline.gradcam import explain_slices
from pipeline.head import BONE_HU
from pipeline.index import HEADER_COLUMNS, classify, read_header_table
from pipeline.inference import predict
from pipeline.labels import ANY, LABELS, SUBTYPES, UNKNOWN
from pipeline.loader import Batch, BatchName, Loader, SliceDataset, name_batches
from pipeline.manifest import EXCLUDED, REASONS, kept
from pipeline.operating import CALIBRATED, OperatingPoints
from pipeline.pixels import PixelFault
from pipeline.place import Place
from pipeline.preprocess import SLICES_PER_TASK, Plan
from pipeline.progress import Progress
from pipeline.purpose import GIVEN, NOT_GIVEN, NOT_TOLD
from pipeline.reader import SliceReader as ShardReader
from pipeline.reader import shard_name
from pipeline.sequence import StudyFeatures, predict_sequence
from pipeline.series import FURTHER_MM
from pipeline.sheet import SHORT, draw_suspects
from pipeline.source import FILE_COLUMNS, find_files
from pipeline.survey import SCOPE
from pipeline.trained import FoldNetworks, Model

BEYOND = 1.25
"""How far outside the range of the training studies a study may still lie: a quarter is less than augmentation and tilted heads make of it."""

FEWEST_SLICES = 8
"""Fewer are no head: at 5 mm they cover 40 of its 150 mm."""

CAVITY_MM2, CAVITY_SLICES = 3000.0, 3
"""Soft tissue that bone encloses, in so many slices: the brain. Measured: 16,000 to 18,600 in the largest slice of a real head
and of twelve phantoms, in half of the slices and more; 1,100 in a phantom of plastic. Bodies and necks enclose less: ribs and
vertebrae are no closed ring, and a vertebra's canal has 300."""

SOFT_HU = (-50.0, 150.0)

CONTRAST = "contrast medium was given; trained on non-contrast CT"
MADE_UP = "the model learnt from phantoms: what it says means nothing for a patient"

EVEN = 8
"""Batches are of a multiple of so many slices: oneDNN sums in another order where N is odd. Beside training's batches of 32, batches
of 24 and 16 then give the same logits bit for bit, of 23 and 25 others by 1e-5, which is up to 2.5e-6 of a probability."""

SUSPECTS = 12
"""Slices on a study's sheet."""

PNG_LEVEL = 3
"""Of a sheet: takes 0.05 s, Pillow's own 6 takes 0.1 s, and the file is no larger (378 kB, 414 kB)."""

# ---- what a model is not for


def list_faults(slices: pd.DataFrame, scope: Mapping[str, Sequence[float] | None]) -> list[str]:
    """Why a model is not for a study, by the headers of its slices: a sentence each."""
    faults = [f"{len(slices)} slices, fewer than {FEWEST_SLICES}"] if len(slices) < FEWEST_SLICES else []
    values = slices.iloc[0].to_dict() | {"slice_spacing_mm": slices["gap_mm"].median()}
    for name, meaning in SCOPE.items():
        value, trained = float(values[name]), scope[name]
        if trained and not np.isnan(value) and not trained[0] / BEYOND <= value <= trained[1] * BEYOND:
            faults.append(f"{meaning} {value:.2f} mm, trained on {trained[0]:.2f} to {trained[1]:.2f}")
    return faults


def shows_brain(coarse_hu: npt.NDArray[np.floating], *, side_mm: float) -> bool:
    """Whether bone encloses soft tissue of a brain's size in some slices.

    Args:
        coarse_hu: float32 [slice, row, column] in HU, as `pipeline.head.find_head` takes it.
        side_mm: side of that field of view.
    """
    pixel_mm2 = (side_mm / coarse_hu.shape[1]) ** 2
    return sum(_cavity_pixels(one) * pixel_mm2 >= CAVITY_MM2 for one in coarse_hu) >= CAVITY_SLICES


def _cavity_pixels(coarse_hu: npt.NDArray[np.floating]) -> int:
    """Pixels of the largest piece of soft tissue that bone encloses in one slice, [row, column]."""
    outside = np.pad((coarse_hu > BONE_HU).astype(np.uint8), 1)  # the frame is outside, and is one piece
    cv2.floodFill(outside, None, (0, 0), 1)
    soft = (outside[1:-1, 1:-1] == 0) & (coarse_hu > SOFT_HU[0]) & (coarse_hu < SOFT_HU[1])
    _, pieces = cv2.connectedComponents(soft.astype(np.uint8), connectivity=4)
    return int(np.bincount(pieces.ravel())[1:].max(initial=0))


def _read_coarse(task: StudyTask) -> npt.NDArray[np.float32]:
    """The study's slices, as far as they can be read, in the size in which the head is looked for."""
    reader = SliceReader(image_size=task.image_size, windows=task.windows)
    coarse = []
    for container, facts in zip(task.containers, task.slices, strict=True):
        with suppress(PixelFault):  # it is named when it is read in earnest
            coarse.append(reader.read_coarse(container, facts, task.whole))
    return np.stack(coarse)


# ---- the studies


def index_studies(paths: Sequence[str], config: Config) -> pd.DataFrame:
    """The manifest of new studies, as `pipeline.index.build_manifest` makes it, but that all may be excluded.

    Raises:
        SourceError: a path does not exist or cannot be read, or there is no file.
    """
    config = config.model_copy(update={"source": Source(dicom=list(paths), labels=None)})
    none_known = pd.DataFrame(columns=[*FILE_COLUMNS, *HEADER_COLUMNS, "pixel_digest", "version"])
    try:
        files = find_files(config.source.entries)
    except SourceError as error:
        raise SourceError(str(error).replace("source.dicom: ", "").replace("set it to", "give")) from None
    manifest = classify(read_header_table(files, config, none_known), config)
    if not (manifest["study_uid"] != "").any():
        raise SourceError(f"{', '.join(paths)}: {len(files):,} files found, and none of them is a DICOM slice")
    return manifest


def identify(model: Model) -> dict[str, Any]:
    """What ties operating points to a model, as `pipeline.operating` compares it."""
    digests = sorted({str(fold.origin["folds_digest"]) for fold in model.folds if fold.origin["folds_digest"]})
    return {
        "store_digest": model.folds[0].origin["store_digest"],
        "folds_digest": "+".join(digests) or None,  # of several dealings: no evaluation has them
        "folds": sorted(fold.fold for fold in model.folds),
        "params": without_folders(model.params),
    }


def predict_studies(
    manifest: pd.DataFrame,
    model: Model,
    config: Config,
    *,
    paths: Sequence[str],
    sheets: Path,
    anyway: bool,
    points: OperatingPoints = NO_POINTS,
    heat: bool = True,
) -> Iterator[Study]:
    """What the model says of each study, as they get ready; the refused ones first.

    Args:
        manifest: of `index_studies`.
        model: of `read_model`.
        config: how many processes convert; all else is the model's.
        paths: those of `index_studies`.
        sheets: folder for a picture of each study.
        anyway: predict also what would be refused.
        points: the model's, of `read_operating_points`.
        heat: whether the suspects get heat maps.
    """
    config = _as_trained(config, model, paths)
    slices = kept(manifest).reset_index(drop=True)
    yield from _refuse_empty(manifest, slices)
    if slices.empty:
        return
    with TemporaryDirectory(prefix="ichor-") as folder:
        plan = Plan(slices, config, Path(folder))
        told = [_ask_headers(plan, slices, number, model) for number in range(len(plan))]
        chosen = [number for number in range(len(plan)) if anyway or not told[number].faults]
        for number in sorted(set(range(len(plan))) - set(chosen)):
            yield _refuse(told[number], told[number].faults)
        numbers = {name: number for number, name in enumerate(plan.fingerprints)}
        with Progress(sum(map(plan.count_slices, chosen)), what="predict", unit="slices") as progress:
            for result in _convert(plan, chosen, config):
                number = numbers[result.fingerprint]
                made = _Made(plan.task(number), result, told[number])
                sheet = _sheet_path(sheets, number, made.uid)
                yield _finish(made, model, points, sheet=sheet, anyway=anyway, heat=heat)
                progress.advance(len(made.told.slices))


def _as_trained(config: Config, model: Model, paths: Sequence[str]) -> Config:
    """The parameters with the model's own image size, crop and windows, for these paths."""
    preprocess = {"image_size": model.image_size, "crop": model.crop, "windows": model.windows, "scheduler": None}
    return config.model_copy(
        update={
            "source": Source(dicom=list(paths), labels=None),
            "preprocess": config.preprocess.model_copy(update=preprocess),
        }
    )


def _refuse_empty(manifest: pd.DataFrame, slices: pd.DataFrame) -> Iterator[Study]:
    """Studies of which no file is a usable axial CT slice."""
    rest = manifest[(manifest["study_uid"] != "") & ~manifest["study_uid"].isin(set(slices["study_uid"]))]
    for uid, files in rest.groupby("study_uid", sort=True):
        reasons = "; ".join(f"{count} × {REASONS[code][1]}" for code, count in files["reason"].value_counts().items())
        yield Study(str(uid), REFUSED, [f"no usable axial CT slice: {reasons}"], 0)


class _Told(NamedTuple):
    """What a study's headers tell."""

    slices: pd.DataFrame
    """Of the manifest."""
    faults: list[str]
    contrast: bool | None

    @property
    def uid(self) -> str:
        return str(self.slices["study_uid"].iloc[0])


def _ask_headers(plan: Plan, slices: pd.DataFrame, number: int, model: Model) -> _Told:
    of_study = slices.iloc[slice(*plan.bounds[number])]
    contrast = {GIVEN: True, NOT_GIVEN: False, NOT_TOLD: None}[int(of_study["contrast"].max())]
    return _Told(of_study, [*list_faults(of_study, model.scope), *([CONTRAST] if contrast else [])], contrast)


def _list_files(task: StudyTask) -> list[SliceFile]:
    return [
        SliceFile(Place(container, one.size, one.stamp, one.method, one.offset, one.packed_size), one.frame)
        for container, one in zip(task.containers, task.slices, strict=True)
    ]


def _refuse(told: _Told, warnings: list[str]) -> Study:
    return Study(told.uid, REFUSED, warnings, len(told.slices), contrast=TOLD[told.contrast])


def _convert(plan: Plan, chosen: Sequence[int], config: Config) -> Iterator[StudyResult]:
    """The studies' shards, by the function that makes the training's, in as many processes."""
    slices = sum(map(plan.count_slices, chosen))
    workers = 0 if slices <= SLICES_PER_TASK else config.preprocess.workers  # not worth starting processes for
    tasks = ([plan.task(number)] for number in chosen)
    for results in run_tasks(make_shards, tasks, workers=workers, scheduler=None, describe=lambda _: "a study"):
        yield from results


def _sheet_path(sheets: Path, number: int, uid: str) -> Path:
    """A name that no identifier can turn into another folder's."""
    return sheets / f"{number:04d}-{re.sub(r'[^A-Za-z0-9._-]', '_', uid)}.png"


class _Made(NamedTuple):
    """A study whose shards are made."""

    task: StudyTask
    result: StudyResult
    told: _Told

    @property
    def uid(self) -> str:
        return self.told.uid

    @property
    def notes(self) -> list[str]:
        """What is amiss, but no reason to refuse."""
        codes = pd.Series([code for code in self.result.faults.values() if REASONS[code][0] == EXCLUDED], dtype=object)
        holes = int((self.told.slices["spacing"] == "hole").sum())
        beyond_mm = float(self.told.slices["beyond_mm"].max())
        return [
            *(f"{count} slices left out: {REASONS[code][1]}" for code, count in codes.value_counts().items()),
            *([f"slices seem to be missing at {holes} place(s)"] if holes else []),
            *([f"another series shows {beyond_mm:.0f} mm more of it"] if beyond_mm > FURTHER_MM else []),
        ]


def _list_pixel_faults(made: _Made, count: int) -> list[str]:
    """Why a model is not for a study, by the pixels of its `count` slices that could be read."""
    few = count < FEWEST_SLICES <= len(made.told.slices)  # else the headers have said so
    has_brain = shows_brain(_read_coarse(made.task), side_mm=made.task.whole.side_mm)
    return [
        *([f"{count} slices that can be read, fewer than {FEWEST_SLICES}"] if few else []),
        *([] if has_brain else ["no head found: no skull around a brain"]),
    ]


def _finish(made: _Made, model: Model, points: OperatingPoints, *, sheet: Path, anyway: bool, heat: bool) -> Study:
    """Look at the pixels, and refuse or predict."""
    told = made.told
    slices = told.slices[np.array(made.result.kept)].reset_index(drop=True)
    if slices.empty:
        return _refuse(told, [*told.faults, *made.notes])
    with _open_shards(made, len(slices), model) as reader:
        faults = [*told.faults, *_list_pixel_faults(made, len(slices))]
        warnings = [*faults, *made.notes]
        if faults and not anyway:
            return _refuse(told, warnings)
        warnings += [MADE_UP] if model.phantom else []
        table = points.extend(_tabulate(slices, _ask_folds(reader, slices, model)))
        suspects = _find_suspects(reader, table, model, heat=heat)
    status = ANYWAY if faults else PREDICTED
    files = [one for one, is_kept in zip(_list_files(made.task), made.result.kept, strict=True) if is_kept]
    study = Study(
        made.uid,
        status,
        warnings,
        len(slices),
        table,
        sheet.name,
        TOLD[told.contrast],
        points,
        suspects=suspects,
        files=files,
    )
    _draw(study, suspects, model, path=sheet)
    return study


@contextmanager
def _open_shards(made: _Made, count: int, model: Model) -> Iterator[ShardReader]:
    """A reader of the one study, as of a store's; its shards are gone afterwards."""
    folder = made.task.shards / made.task.fingerprint
    folder.mkdir()
    try:
        for part in range(count_parts(count)):
            shard_path(made.task.shards, made.task.fingerprint, part).rename(folder / shard_name(0, part))
        shape = (model.image_size, model.image_size, len(model.windows))
        yield ShardReader(folder, study_uids=np.array([made.uid]), num_slices=np.array([count]), shape=shape)
    finally:
        remove_folder(folder)


def _ask_folds(reader: ShardReader, slices: pd.DataFrame, model: Model) -> npt.NDArray[np.float32]:
    """The folds' mean probabilities [S, L], as `pipeline.results.average_folds` takes it."""
    count = len(slices)
    where_S2 = np.stack([np.zeros(count, np.int64), np.arange(count)], axis=1)
    labels_SL = np.full((count, len(LABELS)), UNKNOWN, np.int8)
    dataset = SliceDataset(reader, where_S2, labels_SL, neighbours=model.params["neighbours"])
    loader = Loader(dataset, workers=0, pin=model.device.type == "cuda")
    batches = list(loader.batches(_name_even_batches(count, model.params["batch_size"])))
    position_mm = slices["position_mm"].to_numpy(np.float32)
    logits = [_ask_fold(fold, batches, position_mm, model) for fold in model.folds]
    mean_SL: npt.NDArray[np.float32] = torch.from_numpy(np.stack(logits)).sigmoid().numpy().mean(axis=0)
    return mean_SL


def _name_even_batches(count: int, most: int) -> list[BatchName]:
    """Batches of one size, a multiple of `EVEN`, about `most` each; the last slice again and again fills up the last."""
    batches = -(-count // most)
    size = EVEN * -(-count // (batches * EVEN))
    return name_batches(np.minimum(np.arange(batches * size), count - 1), batch_size=size)


def _ask_fold(
    fold: FoldNetworks, batches: list[Batch], position_mm: npt.NDArray[np.float32], model: Model
) -> npt.NDArray[np.float32]:
    """One fold's logits [S, L], as `pipeline.trainer.Trainer.see_slices` and `pipeline.fold` make them."""
    seen = [
        predict(
            network,
            batches,
            device=model.device,
            precision=choose_precision(model.params["precision"], model.device),
            flips=model.params["test_flips"],
            with_features=fold.sequence is not None,
        )
        for network in fold.networks
    ]
    count = len(position_mm)
    logits_SL: npt.NDArray[np.float32] = np.stack([one.logits_NL[:count] for one in seen]).mean(axis=0)
    if fold.sequence is None:
        return logits_SL
    study = StudyFeatures(
        features_NF=seen[-1].features_NF[:count],
        logits_NL=logits_SL,
        position_mm_N=position_mm,
        labels_NL=np.full(logits_SL.shape, UNKNOWN, np.int8),
        first_B=np.zeros(1, np.int64),
        count_B=np.array([count]),
    )
    config = SequenceConfig.model_validate(model.params["sequence"])
    return predict_sequence(fold.sequence, study, config=config, device=model.device)


def _tabulate(slices: pd.DataFrame, probabilities_SL: npt.NDArray[np.float32]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "slice": np.arange(len(slices)),
            "image_id": slices["image_id"].to_numpy(object),
            "position_mm": slices["position_mm"].to_numpy(np.float32),
            **{name: probabilities_SL[:, label] for label, name in enumerate(LABELS)},
        }
    )


def _find_suspects(reader: ShardReader, table: pd.DataFrame, model: Model, *, heat: bool) -> Suspects:
    """The slices with the highest probabilities of any bleed."""
    worst = np.sort(np.argsort(-table["any"].to_numpy(), kind="stable")[:SUSPECTS])
    labels = table.iloc[worst][list(SUBTYPES)].to_numpy().argmax(axis=1)
    heat_KRC = None
    if heat:
        heat_KRC = explain_slices(
            [network for fold in model.folds for network in fold.networks],
            reader,
            np.stack([np.zeros_like(worst), worst], axis=1),
            labels,
            neighbours=model.params["neighbours"],
            device=model.device,
        )
    return Suspects(worst, np.stack([reader.read(0, number) for number in worst.tolist()]), labels, heat_KRC)


def _draw(study: Study, suspects: Suspects, model: Model, *, path: Path) -> None:
    assert study.table is not None
    shown = study.table.iloc[suspects.slices]
    raw, calibrated = (shown[[name + ending for name in LABELS]].to_numpy(float) for ending in ("", CALIBRATED))
    best = np.where(np.isnan(calibrated), raw, calibrated)
    picture = draw_suspects(
        suspects.pixels_KRCW,
        windows=model.windows,
        probabilities=best[:, ANY].tolist(),
        captions=[f"{row.slice + 1}   {row.position_mm:.1f} mm" for row in shown.itertuples()],
        findings=[f"{SHORT[LABELS[k]]} {one[k]:.2f}" for one, k in zip(best, suspects.labels, strict=True)],
        heading=f"study {study.uid}: the {len(shown)} most suspicious of {len(study.table)} slices",
        subheading=f"{', '.join(f'{name} {say(study, name)}' for name in (LABELS[ANY], *SUBTYPES))}; {explain_marks(study.points)}",
        warnings=study.warnings,
        heat_KRC=suspects.heat_KRC,
    )
    with written_whole(path) as temporary:
        picture.save(temporary, "png", compress_level=PNG_LEVEL)
