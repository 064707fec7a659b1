"""New studies get what training would have said of them, by the same bytes; what a model is not for is refused by name."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image
from scipy.special import expit, logit

import stages.predict
import stages.train
from pipeline.answer import (
    ANYWAY,
    PREDICTED,
    REFUSED,
    Study,
    describe_result,
    explain_marks,
    say,
    slice_table,
    study_table,
    submission,
)
from pipeline.config import Config, PhantomConfig, Window
from pipeline.errors import CheckpointError, LabelError, SourceError, UsageError
from pipeline.folds import deal_folds, write_folds
from pipeline.gradcam import explain_slices
from pipeline.held_out import Scored, to_studies
from pipeline.index import build_manifest
from pipeline.labels import LABELS, SUBTYPES, read_labels
from pipeline.operating import OperatingPoints, Point, read_operating_points
from pipeline.phantom.cohort import write_cohort
from pipeline.predict import MADE_UP, _sheet_path, identify, index_studies, list_faults, predict_studies, shows_brain
from pipeline.preprocess import preprocess
from pipeline.results import average_folds, read_fold
from pipeline.sheet import MARGIN_PX, POSITIVE, TILE_PX, blend_heat, draw_suspects
from pipeline.store import Store
from pipeline.survey import find_crop, measure_scope
from pipeline.trained import Model, find_models, read_model
from tests.conftest import REAL_DICOM, Cohort
from tests.test_head import FIELD_MM, Drawing

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR UI")

NAME = "Doe^Jane"


@dataclass
class Trained:
    """A phantom cohort, its store, and folds trained on it."""

    cohort: Cohort
    config: Config
    store: Store

    @property
    def folder(self) -> Path:
        return self.cohort.data / "train"

    def model(self, fold: int | None = None) -> Model:
        path = self.folder if fold is None else self.folder / f"fold-{fold}"
        return read_model(find_models(path), device="cpu", store=self.cohort.data / "store.zarr")

    def files(self, study: int) -> list[Path]:
        count = int(self.store.num_slices[study])
        return [self.cohort.dicom / f"{name}.dcm" for name in self.store.image_id[study, :count]]

    def copy(self, study: int, folder: Path) -> Path:
        """The study's files alone in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.files(study):
            shutil.copy2(path if path.exists() else path.with_suffix(""), folder / f"{path.stem}.dcm")
        return folder

    def predict(
        self, *paths: Path, out: Path, model: Model | None = None, anyway: bool = False, **more: Any
    ) -> dict[str, Study]:
        texts = [str(path) for path in paths]
        manifest = index_studies(texts, self.config)
        found = predict_studies(
            manifest, model or self.model(), self.config, paths=texts, sheets=out / "sheets", anyway=anyway, **more
        )
        return {study.uid: study for study in found}


def make_trained(folder: Path, folds: list[int], **changes: Any) -> Trained:
    """A dozen phantom studies, one patient's without labels, through the stages' own code."""
    cohort = Cohort(folder)
    written = folder / "written"
    write_cohort(
        PhantomConfig(studies=12, slices=[8, 10], size=128, seed=3), folder=written, wip=folder / "wip", workers=0
    )
    (written / "dicom").rename(cohort.dicom)
    cohort.labels = {name: row.tolist() for name, row in zip_rows(read_labels(written / "labels.csv"))}
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in cohort.dicom.iterdir()]
    unlabelled = min(str(header.PatientID) for header in headers)
    for header in headers:
        if header.PatientID == unlabelled:
            del cohort.labels[str(header.SOPInstanceUID)]
    values = {"folds__count": 3, "train__folds": folds, "train__epochs": 2, "train__batch_size": 16, **changes}
    params = cohort.write_params(**values)
    config = cohort.config(**values)
    manifest, _, _ = build_manifest(config)
    preprocess(config, manifest, data=cohort.data)
    store = Store(cohort.data / "store.zarr")
    write_folds(cohort.data / "folds", deal_folds(config, store), config=config, store=store)
    stages.train.main(argparse.Namespace(params=params, data=cohort.data, fold=None))
    return Trained(cohort, config, store)


def zip_rows(table: pd.DataFrame) -> Any:
    return zip(table.index, table.to_numpy(), strict=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(tmp_path_factory.mktemp("plain"), [0, 1])


def held_out(trained: Trained, fold: int) -> pd.DataFrame:
    return pd.read_parquet(trained.folder / f"fold-{fold}" / "predictions.parquet").set_index("image_id")


def together(studies: dict[str, Study]) -> pd.DataFrame:
    tables = [study.table for study in studies.values() if study.table is not None]
    return pd.concat(tables).set_index("image_id")


# ---- the same probabilities


def test_training_studies_get_their_training_time_probabilities(trained: Trained, tmp_path: Path) -> None:
    for fold in (0, 1):
        expected = held_out(trained, fold)
        studies = trained.predict(trained.cohort.dicom, out=tmp_path, model=trained.model(fold))
        assert {study.status for study in studies.values()} == {PREDICTED}
        found = together(studies).loc[expected.index]
        assert expected["any"].std() > 0.001, "a network that says the same of all would prove nothing"
        np.testing.assert_allclose(found[list(LABELS)], expected[list(LABELS)], rtol=0, atol=1e-6)


def test_so_they_do_with_every_option_that_shapes_a_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = {
        "kind": "gru",
        "width": 16,
        "layers": 1,
        "dropout": 0.0,
        "epochs": 20,
        "learning_rate": 0.01,
        "weight_decay": 0.0,
    }
    trained = make_trained(
        tmp_path,
        [0],
        preprocess__crop="head",
        preprocess__windows={"brain": {"centre": 40, "width": 80}},
        train__neighbours=0,
        train__snapshots=2,
        train__learning_rate=0.002,
        train__epochs=8,
        train__test_flips=True,
        train__sequence=sequence,
    )
    path = trained.folder / "fold-0" / "model.pt"
    expected = held_out(trained, 0)
    assert np.abs(expected["any"] - expected["cnn_any"]).max() > 1e-4, "the sequence model corrects nothing"
    content = torch.load(path, weights_only=True)
    assert len(content["members"]) == min(2, content["best_epoch"]) == 2, "both members are to predict"
    assert trained.model().crop == "head"
    found = together(trained.predict(trained.cohort.dicom, out=tmp_path)).loc[expected.index]
    np.testing.assert_allclose(found[list(LABELS)], expected[list(LABELS)], rtol=0, atol=1e-6)


def test_folds_are_averaged_as_evaluation_does(trained: Trained, tmp_path: Path) -> None:
    digest = trained.store.digest
    folds = [read_fold(trained.folder / f"fold-{k}", k, config=trained.config, store_digest=digest) for k in (0, 1)]
    expected = average_folds(folds).set_index("image_id")
    assert len(expected) >= 8
    studies = trained.predict(trained.cohort.dicom, out=tmp_path)
    np.testing.assert_allclose(together(studies).loc[expected.index, list(LABELS)], expected[list(LABELS)], atol=1e-6)
    study = studies[expected["study_uid"].iloc[0]]
    assert study.probabilities == pytest.approx(expected[list(LABELS)].max().to_dict(), abs=1e-6)
    assert study.suspicious_slice == int(expected["any"].argmax())


def test_folders_files_and_zips_say_the_same(trained: Trained, tmp_path: Path) -> None:
    folder = trained.copy(1, tmp_path / "study")
    files = sorted(folder.iterdir(), key=lambda path: hashlib.sha256(path.read_bytes()).digest())
    with zipfile.ZipFile(tmp_path / "study.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for path in files:
            packed.write(path, f"deep/{path.name}")
    (expected,) = trained.predict(folder, out=tmp_path / "a").values()
    for paths in ([tmp_path / "study.zip"], files):
        (found,) = trained.predict(*paths, out=tmp_path / "b").values()
        assert found.table is not None
        pd.testing.assert_frame_equal(found.table, expected.table, check_exact=True)
    image_id = trained.store.image_id[1]
    assert found.table["image_id"].tolist() == image_id[: len(found.table)].tolist()


def test_a_study_of_several_shards_is_read_whole(trained: Trained, tmp_path: Path) -> None:
    cohort = Cohort(tmp_path)
    image_ids = cohort.add_study(1, 70)
    (study,) = trained.predict(cohort.dicom, out=tmp_path, anyway=True).values()
    assert study.table is not None
    assert study.table["image_id"].tolist() == image_ids
    assert study.table[list(LABELS)].nunique().min() > 60, "each slice is its own"


# ---- refused


def test_what_the_model_was_not_trained_for_is_refused_by_name(trained: Trained, tmp_path: Path) -> None:
    few, coarse, localizer, coronal = (trained.copy(k, tmp_path / str(k)) for k in range(4))
    for path in sorted(few.iterdir())[3:]:
        path.unlink()
    alter(coarse, PixelSpacing=[4.0, 1.9])
    alter(localizer, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    alter(coronal, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    disks = Cohort(tmp_path / "disks")
    disks.add_study(1, 9, spacing_mm=1.9)
    good = trained.copy(4, tmp_path / "good")
    paths = (few, coarse, localizer, coronal, disks.dicom, good)
    studies = trained.predict(*paths, out=tmp_path)
    uids = [*trained.store.study[:4].tolist(), "ID_0000000001", trained.store.study[4]]
    assert [studies[uid].status for uid in uids] == [REFUSED] * 5 + [PREDICTED]
    told = ["; ".join(studies[uid].warnings) for uid in uids]
    assert "3 slices, fewer than 8" in told[0]
    assert "distance between rows 4.00 mm, trained on" in told[1]
    assert "distance between columns" not in told[1]
    assert told[2].startswith("no usable axial CT slice: ")
    assert told[2].endswith(" × a localizer")
    assert told[3].endswith(" × its plane is not axial")
    assert "distance between slices 5.00 mm" in told[4]
    assert told[5] == ""
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == [studies[uids[5]].sheet]


def test_anyway_predicts_them_and_says_so(trained: Trained, tmp_path: Path) -> None:
    disks = Cohort(tmp_path)
    disks.add_study(1, 9)
    (study,) = trained.predict(disks.dicom, out=tmp_path, anyway=True).values()
    assert study.status == ANYWAY
    assert study.warnings[-1] == "no head found: no skull around a brain"
    table = slice_table([study], trained.model())
    assert (table["warnings"] == "; ".join(study.warnings)).all()
    assert len(table) == 9


def test_a_study_with_contrast_is_refused_and_one_that_does_not_tell_is_not(trained: Trained, tmp_path: Path) -> None:
    given, without = trained.copy(0, tmp_path / "given"), trained.copy(1, tmp_path / "without")
    silent = trained.copy(2, tmp_path / "silent")
    alter(given, ContrastBolusAgent=NAME)
    alter(without, ContrastBolusAgent="None")
    fault = "contrast medium was given; trained on non-contrast CT"
    studies = trained.predict(given, without, silent, out=tmp_path / "out")
    told = [(studies[uid].status, studies[uid].warnings, studies[uid].contrast) for uid in trained.store.study[:3]]
    assert told == [(REFUSED, [fault], "given"), (PREDICTED, [], "none"), (PREDICTED, [], "not told")]
    (study,) = trained.predict(given, out=tmp_path / "out", anyway=True).values()
    assert (study.status, study.warnings) == (ANYWAY, [fault])


def test_a_model_of_phantoms_says_so_of_every_study(trained: Trained, tmp_path: Path) -> None:
    folder, files = trained.copy(2, tmp_path / "study"), find_models(trained.folder)
    content = torch.load(files[0], weights_only=True)
    torch.save(content | {"phantom": True}, tmp_path / "model.pt")
    made_up = read_model([tmp_path / "model.pt"], device="cpu", store=tmp_path)
    (study,) = trained.predict(folder, out=tmp_path / "out", model=made_up).values()
    assert (study.status, study.warnings) == (PREDICTED, [MADE_UP])
    assert describe_result([], made_up, {})["learnt_from_phantoms"] is True
    assert describe_result([], trained.model(), {})["learnt_from_phantoms"] is False


def test_a_slice_that_cannot_be_read_is_told_and_left_out(trained: Trained, tmp_path: Path) -> None:
    folder = trained.copy(5, tmp_path / "study")
    count = len(list(folder.iterdir()))
    victim = sorted(folder.iterdir())[0]
    dataset = pydicom.dcmread(victim)
    noise = np.random.default_rng(0).integers(0, 65536, (dataset.Rows, dataset.Columns)).astype("<u2")
    dataset.PixelData = noise.tobytes()
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.save_as(victim)
    (study,) = trained.predict(folder, out=tmp_path, anyway=True).values()
    assert "1 slices left out: its values are noise, or out of any scanner's range" in study.warnings
    assert study.slices == count - 1
    assert study.table is not None
    assert victim.stem not in set(study.table["image_id"])


def alter(folder: Path, **values: Any) -> None:
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        for name, value in values.items():
            setattr(dataset, name, value)
        dataset.save_as(path)


def test_a_range_is_the_stores_without_its_rarest_and_a_quarter_more(trained: Trained) -> None:
    scope = measure_scope(trained.store)
    spacing_mm = trained.store.per_study["row_spacing_mm"].astype(float)
    assert scope["row_spacing_mm"] == pytest.approx(np.quantile(spacing_mm, [0.005, 0.995]))
    assert scope["thickness_mm"] is None  # RSNA's form has none
    assert find_crop(trained.store) == "none"
    slices = pd.DataFrame({"row_spacing_mm": [0.5] * 8, "column_spacing_mm": 0.5, "gap_mm": 5.0, "thickness_mm": 5.0})
    trained_on = {"row_spacing_mm": [0.4, 0.6], "column_spacing_mm": [0.4, 0.6], "slice_spacing_mm": [4.0, 5.0]}
    assert list_faults(slices, {**trained_on, "thickness_mm": [4.0, 5.0]}) == []
    assert list_faults(slices, {**trained_on, "thickness_mm": [4.0, 4.01]}) == []  # 5.0 is within a quarter of it
    assert list_faults(slices, {**trained_on, "thickness_mm": [1.0, 3.9]}) == [
        "slice thickness 5.00 mm, trained on 1.00 to 3.90"
    ]
    assert list_faults(slices.assign(thickness_mm=np.nan), {**trained_on, "thickness_mm": [1.0, 3.9]}) == []
    assert list_faults(slices.assign(gap_mm=3.1), {**trained_on, "thickness_mm": None}) == [
        "distance between slices 3.10 mm, trained on 4.00 to 5.00"
    ]


def test_a_head_is_told_from_a_body_by_its_skull() -> None:
    head = Drawing().head().coarse()
    assert shows_brain(head, side_mm=FIELD_MM)
    trunk = Drawing(field_mm=400)
    trunk.fine_hu[:, trunk.radius((0, 0), (110, 160)) < 1] = 50  # no bone, as in a belly between ribs and pelvis
    trunk.fine_hu[:, trunk.radius((70, 0), (25, 25)) < 1] = 600  # but for a vertebra
    trunk.fine_hu[:, trunk.radius((90, 0), (10, 10)) < 1] = 30
    assert not shows_brain(trunk.coarse(), side_mm=400)
    opened = head.copy()
    opened[:, 64:, 60:64] = 30  # a gap in the skull of every slice
    assert not shows_brain(opened, side_mm=FIELD_MM)
    hollow = np.where((head > 0) & (head < 100), -1000, head)
    assert not shows_brain(hollow, side_mm=FIELD_MM)


@pytest.mark.skipif(not REAL_DICOM.is_dir(), reason="the real head CTs are not here")
def test_a_real_head_is_predicted_and_plastic_skulls_are_refused(trained: Trained, tmp_path: Path) -> None:
    any_spacing = dict.fromkeys(trained.model().scope)
    model = Model(**{**trained.model().__dict__, "scope": any_spacing})
    paths = [str(REAL_DICOM)]
    manifest = index_studies(paths, trained.config)
    found = predict_studies(manifest, model, trained.config, paths=paths, sheets=tmp_path, anyway=False)
    assert sorted((study.status, study.slices) for study in found) == [(PREDICTED, 28), (REFUSED, 12), (REFUSED, 28)]


# ---- what is written


def test_no_text_of_a_header_leaves_it(trained: Trained, tmp_path: Path, run_stage: Callable[..., Any]) -> None:
    folder = trained.copy(6, tmp_path / NAME)
    alter(
        folder,
        PatientName=NAME,
        PatientID=NAME,
        SeriesDescription=NAME,
        InstitutionName=NAME,
        PatientBirthDate="19700101",
    )
    for path in folder.iterdir():
        path.rename(path.with_name(f"{NAME}-{path.name}"))
    few = trained.copy(7, tmp_path / "few" / NAME)
    alter(few, PatientName=NAME, ContrastBolusAgent=NAME)
    for path in sorted(few.iterdir())[2:]:
        path.unlink()
    out = tmp_path / "out"
    arguments = ["--data", str(trained.cohort.data), "--out", str(out), str(folder), str(few)]
    ran = run_stage("predict", *arguments, params=trained.cohort.folder / "params.yaml")
    assert ran.code == 3, ran.err
    uid, refused = trained.store.study[6], trained.store.study[7]
    shown = [line.split() for line in ran.out.splitlines()]
    assert [line[0] for line in shown if line[-1:] == [uid]] == ["predicted"]
    assert [line for line in shown if line[-1:] == [refused]] == [["refused", refused]]
    assert "2 slices, fewer than 8" in ran.out
    assert "contrast medium was given" in ran.out
    assert "uncalibrated, without operating points: " in ran.out
    assert "its run has no operating points; run `python -m stages.evaluate`" in ran.out
    assert "1 studies (" in ran.out
    assert "1 refused (--anyway predicts them too, where a slice can be used)" in ran.out
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len(written) == 4
    contents = [path.read_bytes() for path in written]
    for content in [*contents, ran.out.encode(), ran.err.encode(), *(str(path.name).encode() for path in written)]:
        for secret in (NAME, "Doe", "19700101"):
            assert secret.encode() not in content
    with Image.open(next(path for path in written if path.suffix == ".png")) as picture:
        assert not picture.info
    check_tables(trained, out, uid, refused)


def check_tables(trained: Trained, out: Path, uid: str, refused: str) -> None:
    """CSVs and JSON agree, and name the model."""
    slices, studies = pd.read_csv(out / "predictions.csv"), pd.read_csv(out / "studies.csv").set_index("study_uid")
    result = json.loads((out / "predictions.json").read_bytes())
    digests = [hashlib.sha256((trained.folder / f"fold-{k}" / "model.pt").read_bytes()).hexdigest() for k in (0, 1)]
    assert [fold["sha256"] for fold in result["model"]["folds"]] == digests
    assert set(slices["model"]) == set(studies["model"]) == {"+".join(digest[:12] for digest in digests)}
    assert set(slices["study_uid"]) == {uid}
    assert studies.loc[[uid, refused], "status"].tolist() == [PREDICTED, REFUSED]
    assert studies.loc[refused, list(LABELS)].isna().all()
    of_json = {study["study_uid"]: study for study in result["studies"]}
    assert of_json[refused]["probabilities"] is None
    for name in LABELS:
        assert studies.loc[uid, name] == pytest.approx(slices[name].max(), abs=1e-7)
        assert of_json[uid]["probabilities"][name] == pytest.approx(slices[name].max(), abs=1e-7)
    assert [row["image_id"] for row in of_json[uid]["slices"]] == slices["image_id"].tolist()
    assert "slice thickness" in result["not_checked"][1]
    assert (of_json[uid]["contrast"], of_json[refused]["contrast"]) == ("not told", "given")
    assert set(of_json[uid]["calibrated"].values()) == set(of_json[uid]["called"].values()) == {None}
    assert of_json[uid]["slices"][0]["any_calibrated"] is of_json[uid]["slices"][0]["any_called"] is None
    assert slices[[f"{name}_called" for name in LABELS]].isna().all(axis=None)


def test_the_door_writes_a_submission_and_prints_json_alone(
    trained: Trained, tmp_path: Path, run_stage: Callable[..., Any]
) -> None:
    folder = trained.copy(2, tmp_path / "study")
    params = trained.cohort.folder / "params.yaml"
    points = write_points(
        tmp_path / "points.json", trained, slice={"any": point(2.0, 0.4)}, study={"any": point(3.0, 0.5)}
    )
    common = ["--data", str(trained.cohort.data), "--out", str(tmp_path / "out"), str(folder)]
    common += ["--operating-points", str(points)]
    sample = tmp_path / "sample.csv"
    sample.write_text("ID,Label\nID_nobody_any,0.5\n")
    ran = run_stage("predict", *common, "--json", "--submission", str(tmp_path / "s.csv"), params=params)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out) == json.loads((tmp_path / "out" / "predictions.json").read_bytes())
    slices = pd.read_csv(tmp_path / "out" / "predictions.csv", dtype=dict.fromkeys(LABELS, np.float32))
    rows = [line.split(",") for line in (tmp_path / "s.csv").read_text().splitlines()]
    assert rows[0] == ["ID", "Label"]
    assert [row[0] for row in rows[1:]] == [f"{image}_{name}" for image in slices["image_id"] for name in LABELS]
    values = np.array([row[1] for row in rows[1:]], np.float32).reshape(-1, len(LABELS))
    np.testing.assert_array_equal(values[:, :-1], slices[list(LABELS[:-1])].to_numpy())
    scaled = expit(logit(slices["any"].to_numpy(float)) / 2)
    np.testing.assert_allclose(values[:, -1], scaled, rtol=1e-5)  # where a temperature was fitted
    check_judged(json.loads(ran.out), slices, scaled)
    parser = argparse.ArgumentParser()
    stages.predict.add_arguments(parser)
    for arguments, fault, said in (
        (
            ["--submission", str(tmp_path / "t.csv"), "--sample", str(sample)],
            LabelError,
            "1 of its 1 rows have no prediction",
        ),
        (["--sample", str(sample)], UsageError, "give that too"),
        (["--model", "none"], CheckpointError, "none: no model"),
        (["--operating-points", str(sample)], CheckpointError, "sample.csv: not the operating points of an evaluation"),
    ):
        given = parser.parse_args([str(folder), "--out", str(tmp_path / "more"), *arguments])
        with pytest.raises(fault, match=said):
            stages.predict.main(argparse.Namespace(data=trained.cohort.data, params=params, **vars(given)))
    assert (tmp_path / "more" / "predictions.csv").exists()
    assert not (tmp_path / "t.csv").exists()


def check_judged(result: dict[str, Any], slices: pd.DataFrame, scaled: np.ndarray) -> None:
    """Slices and the study are scaled and called, each by its own operating point; a label without one is left as it is."""
    np.testing.assert_allclose(slices["any_calibrated"], scaled, rtol=1e-5)
    assert slices["any_called"].tolist() == (scaled >= 0.4).tolist()
    assert slices[["subdural_calibrated", "subdural_called"]].isna().all(axis=None)
    assert result["operating_points"]["study"]["any"] == {"temperature": 3.0, "threshold": 0.5}
    (study,) = result["studies"]
    expected = expit(logit(slices["any"].max()) / 3)
    assert study["calibrated"] == {**dict.fromkeys(LABELS), "any": pytest.approx(expected, abs=1e-6)}
    assert study["called"] == {**dict.fromkeys(LABELS), "any": bool(expected >= 0.5)}
    assert [row["any_called"] for row in study["slices"]] == slices["any_called"].tolist()


def point(temperature: float, threshold: float) -> dict[str, float]:
    return {"temperature": temperature, "threshold": threshold}


def write_points(path: Path, trained: Trained, **levels: Any) -> Path:
    """As `stages.evaluate` writes them for the fixture's two folds; of labels that are not named nothing was fitted."""
    nothing = {name: {"temperature": None, "threshold": None, "positives": 0, "negatives": 9} for name in LABELS}
    of_folds = {"folds_digest": trained.model().folds[0].origin["folds_digest"], "folds": [0, 1], "rule": "as it is"}
    written = {level: nothing | levels.get(level, {}) for level in ("slice", "study")}
    path.write_text(json.dumps({"store_digest": trained.store.digest, **of_folds, **written}))
    return path


def test_another_runs_operating_points_are_left_out_aloud(trained: Trained, tmp_path: Path) -> None:
    path = write_points(tmp_path / "points.json", trained, study={"any": point(3.0, 0.5)})
    used = read_operating_points(path, identity=identify(trained.model()))
    assert used.studies["any"] == (3.0, 0.5)
    params = {**trained.model().params, "epochs": 2}
    for alone, said in (
        (identify(trained.model(1)), r"\(folds \[0, 1\], the model's \[1\]\)"),
        (
            {**identify(trained.model()), "store_digest": "0" * 64},
            f"store_digest {trained.store.digest[:16]}, the model's 0{{16}}",
        ),
    ):
        found = read_operating_points(path, identity=alone)
        assert re.search(said, found.why_not)
        (study,) = trained.predict(trained.copy(3, tmp_path / "study"), out=tmp_path, points=found).values()
        assert study.status == PREDICTED
        assert set(study.calibrated.values()) == set(study.called.values()) == {None}
        result = describe_result([study], trained.model(), {}, points=found)
        assert result["operating_points"] == {"used": False, "why_not": found.why_not}
    told = json.loads(path.read_text()) | {"params": {**params, "epochs": 3}}
    path.write_text(json.dumps(told))
    assert "params.epochs 3, the model's 2" in read_operating_points(path, identity={"params": params}).why_not


def test_a_study_is_judged_by_its_highest_slice_as_evaluation_has_it(trained: Trained, tmp_path: Path) -> None:
    of_labels = {name: point(0.5 + k, 0.1 * k) for k, name in enumerate(LABELS)}
    path = write_points(tmp_path / "points.json", trained, study=of_labels)
    points = read_operating_points(path, identity=identify(trained.model()))
    folders = [trained.copy(k, tmp_path / str(k)) for k in (1, 2)]
    for study in trained.predict(*folders, out=tmp_path, points=points).values():
        assert study.table is not None
        raw_NL = study.table[list(LABELS)].to_numpy(float)
        unknown = np.full(raw_NL.shape, -1, np.int8)
        rows = np.zeros(len(raw_NL), np.int64)
        evaluated = to_studies(Scored(unknown, raw_NL, rows, rows.astype(str), rows)).probabilities_NL[0]
        for k, name in enumerate(LABELS):
            expected = expit(logit(evaluated[k]) / (0.5 + k))
            assert study.calibrated[name] == pytest.approx(expected, rel=1e-9)
            assert study.called[name] == (expected >= 0.1 * k)


def test_people_see_which_number_is_calibrated_and_which_reaches_its_operating_point() -> None:
    table = pd.DataFrame({name: [0.1, 0.9] for name in LABELS})
    fitted = {"any": Point(2.0, 0.74), "subdural": Point(2.0, 0.76)}
    points = OperatingPoints(studies=dict.fromkeys(LABELS, Point()) | fitted, origin={"file": "x"})
    study = Study("a", PREDICTED, [], 2, table, points=points)
    assert expit(logit(0.9) / 2) == pytest.approx(0.75)
    assert [say(study, name) for name in ("any", "subdural", "epidural")] == ["0.75*", "0.75", "(0.90)"]
    assert explain_marks(points).endswith("in brackets as the network says")
    without = study._replace(points=OperatingPoints(why_not="none"))
    assert {say(without, name) for name in LABELS} == {"0.90"}
    assert explain_marks(without.points) == "uncalibrated, without operating points"


def test_a_submission_takes_the_samples_rows_in_its_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.random((3, len(LABELS))).astype(np.float32)
    slices = OperatingPoints().extend(pd.DataFrame(values, columns=list(LABELS)))
    slices = slices.assign(image_id=["ID_a", "ID_b", "ID_c"])
    ids = [f"{image}_{name}" for image in slices["image_id"] for name in LABELS]
    expected = dict(zip(ids, values.ravel(), strict=True))
    order = [str(name) for name in rng.permutation(ids[3:])]
    sample = tmp_path / "sample.csv"
    sample.write_text("\n".join(["ID,Label", *(f"{name},0.5" for name in order)]) + "\n")
    rows = submission(slices, sample, anyway=False)
    assert list(rows.columns) == ["ID", "Label"]
    assert rows["ID"].tolist() == order
    assert rows["Label"].tolist() == [expected[name] for name in order]
    with sample.open("a") as file:
        file.write("ID_d_any,0.25\n")
    with pytest.raises(LabelError, match="1 of its 16 rows have no prediction, ID_d_any first"):
        submission(slices, sample, anyway=False)
    assert submission(slices, sample, anyway=True)["Label"].iloc[-1] == 0.25
    for text, said in (("A,B\n1,2\n", "expected the header ID,Label"), ("ID,Label\na,x\n", "not a CSV with ID,Label")):
        sample.write_text(text)
        with pytest.raises(LabelError, match=said):
            submission(slices, sample, anyway=True)
    with pytest.raises(LabelError, match="does not exist"):
        submission(slices, tmp_path / "none.csv", anyway=True)


def test_a_sheet_shows_the_slices_and_how_likely_each_is() -> None:
    pixels = np.zeros((7, 32, 32, 3), np.uint8)
    pixels[6, :, :, 1] = 200
    windows = {name: Window(centre=40, width=width) for name, width in (("a", 80), ("b", 200), ("c", 380))}
    probabilities = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0]
    texts = [str(number) for number in range(7)]
    draw: dict[str, Any] = {"windows": windows, "probabilities": probabilities, "captions": texts, "findings": texts}
    draw |= {"heading": "study x", "subheading": "any 1.00"}
    sheet = np.array(draw_suspects(pixels, **draw, warnings=["no head", "few"]))
    plain = np.array(draw_suspects(pixels, **draw, warnings=[]))
    assert len(sheet) - len(plain) == 36
    top = len(plain) // 2 + 20  # the second row of tiles
    assert (plain[top + TILE_PX + 40, 20:180] == 200).all()
    lengths = [int((row == POSITIVE).all(axis=1).sum()) for row in plain]
    assert max(lengths[top:]) == TILE_PX
    whole = sum(round(value * (TILE_PX - 1)) + 1 for value in probabilities[:6])
    assert max(lengths[:top]) == whole


def test_heat_lies_in_a_tile_of_its_own_over_the_first_window() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(
        0, 256, (2, TILE_PX, TILE_PX, 3), np.uint8
    )  # as large as a tile, so that nothing is resampled
    heat = rng.random((2, TILE_PX, TILE_PX), np.float32)
    windows = {name: Window(centre=40, width=width) for name, width in (("a", 80), ("b", 200), ("c", 380))}
    draw: dict[str, Any] = {"windows": windows, "probabilities": [0.5, 0.5], "captions": "ab", "findings": "ab"}
    draw |= {"heading": "", "subheading": "", "warnings": []}
    plain, hot = (np.array(draw_suspects(pixels, **draw, heat_KRC=one)) for one in (None, heat))
    assert len(hot) - len(plain) == TILE_PX
    top = 46 + 2 * TILE_PX
    for place, left in ((0, MARGIN_PX), (1, 2 * MARGIN_PX + TILE_PX)):
        tile = hot[top : top + TILE_PX, left : left + TILE_PX]
        np.testing.assert_array_equal(tile, blend_heat(pixels[place, :, :, 0], heat[place]))
    np.testing.assert_array_equal(hot[46:top], plain[46:top])


def test_suspects_carry_the_heat_that_the_training_store_gives(trained: Trained, tmp_path: Path) -> None:
    number, paths = 2, [str(trained.copy(2, tmp_path / "study"))]
    model = trained.model()
    networks = [network for fold in model.folds for network in fold.networks]
    for seed, network in enumerate(networks):  # two epochs teach nothing that speaks for a label
        torch.nn.init.normal_(network.head.weight, generator=torch.Generator().manual_seed(seed))
    manifest = index_studies(paths, trained.config)
    of_paths: dict[str, Any] = {"paths": paths, "anyway": True}
    (study,) = predict_studies(manifest, model, trained.config, sheets=tmp_path / "a", **of_paths)
    (cold,) = predict_studies(manifest, model, trained.config, sheets=tmp_path / "b", heat=False, **of_paths)
    assert study.suspects is not None
    assert study.table is not None
    assert cold.suspects is not None
    assert cold.suspects.heat_KRC is None
    numbers, labels = study.suspects.slices, study.suspects.labels
    subtypes = study.table[list(SUBTYPES)].to_numpy()[numbers]
    assert labels.tolist() == subtypes.argmax(axis=1).tolist()
    where = np.stack([np.full_like(numbers, number), numbers], axis=1)
    assert len(networks) == 2
    expected = explain_slices(networks, trained.store.reader, where, labels, neighbours=1, device=torch.device("cpu"))
    assert (expected.max(axis=(1, 2)) == 1).sum() > len(numbers) / 2
    np.testing.assert_allclose(study.suspects.heat_KRC, expected, atol=1e-5)
    np.testing.assert_array_equal(study.suspects.pixels_KRCW, trained.store.reader.read_study(number)[numbers])
    with Image.open(tmp_path / "a" / study.sheet) as hot, Image.open(tmp_path / "b" / cold.sheet) as plain:
        assert hot.height - plain.height == TILE_PX * -(-len(numbers) // 6)


def test_only_the_most_suspicious_slices_are_kept_in_pictures(trained: Trained, tmp_path: Path) -> None:
    cohort = Cohort(tmp_path)
    cohort.add_study(1, 20)
    (study,) = trained.predict(cohort.dicom, out=tmp_path, anyway=True).values()
    assert study.suspects is not None
    assert study.table is not None
    worst = study.table["any"].nlargest(12, keep="first").index
    assert study.suspects.slices.tolist() == sorted(worst)
    assert len(study.suspects.heat_KRC) == len(study.suspects.pixels_KRCW) == 12  # type: ignore[arg-type]


def test_no_identifier_leads_out_of_the_folder_of_sheets(tmp_path: Path) -> None:
    path = _sheet_path(tmp_path, 3, "../../etc/passwd x")
    assert path.parent == tmp_path
    assert path.name == "0003-.._.._etc_passwd_x.png"


# ---- the model's file


def test_a_model_that_holds_its_scope_needs_no_store(trained: Trained, tmp_path: Path) -> None:
    content = torch.load(trained.folder / "fold-0" / "model.pt", weights_only=True)
    scope = {**dict.fromkeys(measure_scope(trained.store)), "row_spacing_mm": [1.0, 2.0]}
    torch.save({**content, "format": 1, "crop": "head", "scope": scope}, tmp_path / "model.pt")
    model = read_model(find_models(tmp_path), device="cpu", store=tmp_path / "none.zarr")
    assert model.crop == "head"
    assert model.scope == scope


def test_a_file_that_is_no_such_model_is_refused_by_name(trained: Trained, tmp_path: Path) -> None:
    path = trained.folder / "fold-0" / "model.pt"
    content = torch.load(path, weights_only=True)
    content = {key: value for key, value in content.items() if key not in ("scope", "crop")}
    other = {**content, "params": {**content["params"], "neighbours": 2}}
    moved = {**content, "store_digest": "0" * 64}
    bad_weights = {**content, "members": [{**content["members"][0], "head.bias": torch.zeros(5)}]}
    gru = {**content["params"], "sequence": {**content["params"]["sequence"], "kind": "gru"}}
    store = trained.cohort.data / "store.zarr"
    for made, said in (
        (b"no model", "not a model, nor a whole file of torch.save"),
        (path.read_bytes()[:-400], "not a model, nor a whole file of torch.save"),
        (b"PK\5\6" + bytes(18), "cannot be read as a model"),  # a zip of nothing
        ([1], "it holds a list"),
        ({"weights": 1}, "it lacks fold, image_size, members"),
        ({**content, "params": {}}, "it lacks batch_size, dropout, model"),
        ({**content, "format": 9}, "a model of format 9, this version reads 1"),
        (moved, "trained on store 000000000000, and"),
        (bad_weights, "do not fit compact"),
        ({**content, "params": gru, "sequence": {"best_epoch": 1}}, "it lacks the weights of its sequence model"),
    ):
        file = tmp_path / "model.pt"
        file.write_bytes(made) if isinstance(made, bytes) else torch.save(made, file)
        with pytest.raises(CheckpointError, match=said) as error:
            read_model([file], device="cpu", store=store)
        assert str(error.value).startswith(str(file))
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"made with params.neighbours = 2, .* with 1; folds of two runs"):
        read_model([path, tmp_path / "other.pt"], device="cpu", store=store)
    shutil.copy2(path, tmp_path / "copy.pt")
    with pytest.raises(CheckpointError, match=r"copy.pt: holds fold \d, as .* does, which would count twice"):
        read_model([path, tmp_path / "copy.pt"], device="cpu", store=store)
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"its store cannot be asked: .* no store"):
        read_model([tmp_path / "model.pt"], device="cpu", store=tmp_path / "none.zarr")


def test_folds_left_of_an_earlier_run_are_passed_over(tmp_path: Path) -> None:
    for fold in (0, 1, 10):
        (tmp_path / f"fold-{fold}").mkdir()
        (tmp_path / f"fold-{fold}" / "model.pt").touch()
    assert find_models(tmp_path, [1]) == [tmp_path / "fold-1" / "model.pt"]
    assert len(find_models(tmp_path)) == 3
    with pytest.raises(CheckpointError, match="no model; run"):
        find_models(tmp_path, [2])


def test_a_path_without_a_study_is_told(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^\S+none does not exist; give a folder of DICOM files"):
        index_studies([str(tmp_path / "none")], trained.config)
    (tmp_path / "readme.txt").write_text("no DICOM")
    with pytest.raises(SourceError, match="1 files found, and none of them is a DICOM slice"):
        index_studies([str(tmp_path)], trained.config)
    with pytest.raises(CheckpointError, match=r"no model; run `python -m stages\.train`"):
        find_models(tmp_path)


def test_refused_studies_alone_make_tables_too(trained: Trained) -> None:
    model, studies = trained.model(0), [Study("a", REFUSED, ["2 slices, fewer than 8"], 2)]
    assert slice_table(studies, model).empty
    table = study_table(studies, model)
    assert table["warnings"].tolist() == ["2 slices, fewer than 8"]
    assert table[list(LABELS)].isna().all(axis=None)
    assert json.dumps(describe_result(studies, model, {}), allow_nan=False)
