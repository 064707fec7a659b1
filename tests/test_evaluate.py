"""The evaluate stage on a made-up store and made-up folds: what it writes, what it leaves out, and what it refuses."""

from __future__ import annotations

import argparse
import base64
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import yaml
from markupsafe import escape

from pipeline.calibration import fit_temperature, scale
from pipeline.charts import Axis, Band, Line, chart, ticks
from pipeline.config import Config, Window
from pipeline.errors import CheckpointError, ConfigError, IchorError, StoreError
from pipeline.evaluate import evaluate
from pipeline.labels import ANY, LABELS
from pipeline.report import PUBLISHED
from pipeline.shard import build_shard, encode_chunk
from pipeline.store import STUDY_ARRAYS, Store, StoreContent, slice_axis, write_store
from stages.evaluate import main
from tests.conftest import ROOT, Cohort, Ran
from tests.test_baseline import WINDOWS, disk, head_hu, windowed

SIZE = 64
STUDIES, SLICES = 16, 6
ACCOUNTING = {
    "files": 104,
    "used": 90,
    "repaired": 6,
    "excluded": 8,
    "reasons": {"localizer": 8, "wrap_12bit": 6},
}


class Run:
    """A store of small heads, half of which bleed, and the results of trained folds beside it."""

    def __init__(
        self, cohort: Cohort, *, folds: list[int], windows: dict[str, Window] = WINDOWS, **params: Any
    ) -> None:
        self.cohort, self.windows = cohort, windows
        self.data = cohort.data
        self.rng = np.random.default_rng(0)
        params = {"train__folds": folds, "folds__count": 2, "evaluate__bootstrap": 100, **params}
        self.params = cohort.write_params(**params)
        self.config: Config = cohort.config(**params)
        self.labels = self._draw_labels()
        self.store = self._write_store()
        for fold in folds:
            self.write_fold(fold)

    def _draw_labels(self) -> np.ndarray:
        labels = np.full((STUDIES, slice_axis(SLICES), len(LABELS)), -1, np.int8)
        labels[:, :SLICES] = 0
        for study in range(0, STUDIES, 2):
            labels[study, 2:5, [study // 2 % 5, ANY]] = 1
        labels[1, 0] = -1
        return labels

    def _write_store(self) -> Store:
        shards = {}
        for study in range(STUDIES):
            chunks = [encode_chunk(self.draw(study, number)) for number in range(SLICES)]
            path = self.cohort.folder / f"{study}.shard"
            path.write_bytes(build_shard(chunks))
            shards[study, 0] = path
        image_id = np.full(self.labels.shape[:2], "", object)
        image_id[:, :SLICES] = [[f"ID_{s:05x}{k:04x}" for k in range(SLICES)] for s in range(STUDIES)]
        per_study: dict[str, Any] = {name: np.zeros(STUDIES) for name in STUDY_ARRAYS}
        per_study |= {
            "bits_stored": np.where(np.arange(STUDIES) % 4 < 2, 12, 16),
            "intercept": np.full(STUDIES, -1024.0),
            "tilt_deg": np.arange(STUDIES) * 1.5,
            "thickness_mm": np.where(np.arange(STUDIES) % 3 == 0, np.nan, 5.0),
            "lowest_hu": np.where(np.arange(STUDIES) % 4 < 2, -1024.0, -3024.0),
            "num_slices": np.full(STUDIES, SLICES),
            "patient_key": np.array([f"key{study:08x}" for study in range(STUDIES)], object),
            "content": np.array([f"fingerprint{study}" for study in range(STUDIES)], object),
            "orientation": np.zeros((STUDIES, 6)),
            "box_mm": np.zeros((STUDIES, 3)),
        }
        study_uid = np.array([f"ID_{study:010x}" for study in range(STUDIES)], object)
        position = np.zeros(self.labels.shape[:2], np.float32)
        content = StoreContent(study_uid, per_study, image_id, position, self.labels)
        folder = self.data / "store.zarr"
        folder.parent.mkdir(parents=True, exist_ok=True)
        attributes = {"accounting": ACCOUNTING}
        write_store(folder, content, shards, image_size=SIZE, windows=self.windows, attributes=attributes)
        return Store(folder)

    def draw(self, study: int, number: int) -> np.ndarray:
        pixels_hu = head_hu(SIZE)
        if self.labels[study, number, ANY] == 1:
            pixels_hu[disk(30, 30, 3 + study % 3, SIZE)] = 65
        return windowed(pixels_hu, self.windows)

    def write_fold(self, fold: int, **changes: Any) -> pd.DataFrame:
        folder = self.data / "train" / f"fold-{fold}"
        folder.mkdir(parents=True, exist_ok=True)
        # Pairs of a bleeding and a free study, so that each of two folds has both; the patient is the study here.
        at = [(s, k) for s in range(STUDIES) if s // 2 % 2 == fold % 2 for k in range(SLICES)]
        truth = np.array([self.labels[s, k] for s, k in at]) == 1
        probabilities = np.clip(0.3 + 0.3 * truth + self.rng.normal(0, 0.12, truth.shape), 0, 1).astype(np.float32)
        table = pd.DataFrame(
            {
                "image_id": [self.store.image_id[s, k] for s, k in at],
                "study_uid": [self.store.study[s] for s, _ in at],
                "fold": np.int16(fold),
                **{name: probabilities[:, label] for label, name in enumerate(LABELS)},
            }
        ).sample(frac=1, random_state=fold)
        table.to_parquet(folder / "predictions.parquet")
        table.iloc[:0].to_parquet(folder / "unlabelled.parquet")
        epochs = pd.DataFrame({"epoch": [1, 2, 3], "learning_rate": 0.1, "train_loss": [0.6, 0.4, 0.3]})
        epochs.assign(valid_loss=[0.6, 0.5, 0.45], slices_per_s=100.0, seconds=1.0).to_csv(
            folder / "history.csv", index=False
        )
        self.write_summary(fold, **changes)
        return table

    def write_summary(self, fold: int, **changes: Any) -> None:
        summary = {
            "fold": fold,
            "store_digest": self.store.digest,
            "params": self.config.train.shaping(),
            "folds_params": self.config.folds.model_dump(),
            "folds_digest": "dealt once",
            "epochs": 3,
            "best_epoch": 3,
            "best_valid_loss": 0.45,
            "parameters": 1234,
            "device": "cpu",
            "seconds": 3.0,
            **{f"{part}_{unit}": 8 for part in ("train", "valid", "held_out") for unit in ("slices", "patients")},
            **changes,
        }
        (self.data / "train" / f"fold-{fold}" / "summary.json").write_text(json.dumps(summary))

    def evaluate(self) -> dict[str, Any]:
        """Run the door in this process, and read what it wrote."""
        main(argparse.Namespace(params=self.params, data=self.data, show=False))
        return self.metrics()

    def metrics(self) -> dict[str, Any]:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        metrics: dict[str, Any] = json.loads((self.report / "metrics.json").read_text(), parse_constant=refuse)
        return metrics

    @property
    def report(self) -> Path:
        return self.data / "report"

    def outputs(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.report.iterdir())}


@pytest.fixture
def run(cohort: Cohort) -> Run:
    return Run(cohort, folds=[0, 1])


def test_stage_writes_metrics_curves_and_report_and_prints_the_scores(
    run: Run, run_stage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    done: Ran = run_stage("evaluate", params=run.params)
    assert done.code == 0, done.err
    tables = ["precision_recall.csv", "reliability.csv", "roc.csv", "training.csv"]
    files = ["MODEL_CARD.md", "headline.json", "metrics.json", "operating_points.json", "report.html"]
    written = sorted([*files, "unlabelled.parquet", *tables])
    assert sorted(run.outputs()) == written
    metrics = run.metrics()
    baselines = {"counting", "headers", "headers_by_slice", "balanced"}
    assert {"headline", "held_out", "strata", "slice", "study", *baselines} == set(metrics)
    for word in (*LABELS, "macro", "weighted log loss", "counting baseline", str(run.report / "report.html")):
        assert word in done.out
    main(argparse.Namespace(params=run.params, data=run.data, show=True))
    assert capsys.readouterr().out == done.out


def test_studies_without_labels_get_the_mean_of_the_folds(run: Run) -> None:
    rng = np.random.default_rng(1)
    tables = []
    for fold in (0, 1):
        table = pd.read_parquet(run.data / "train" / f"fold-{fold}" / "predictions.parquet").iloc[:4]
        table = table.assign(image_id=["b", "a", "c", "d"], study_uid="u", fold=np.int16(fold))
        table[list(LABELS)] = rng.random((4, len(LABELS)))
        table.to_parquet(run.data / "train" / f"fold-{fold}" / "unlabelled.parquet")
        tables.append(table.set_index("image_id"))
    run.evaluate()
    mean = pd.read_parquet(run.report / "unlabelled.parquet").set_index("image_id")
    assert mean.index.tolist() == ["b", "a", "c", "d"]
    assert (mean["folds"] == 2).all()
    expected = (tables[0][list(LABELS)] + tables[1][list(LABELS)]) / 2
    np.testing.assert_allclose(mean[list(LABELS)], expected, rtol=1e-6)


def test_folds_of_two_dealings_are_refused(run: Run) -> None:
    run.write_summary(1, folds_digest="dealt again")
    with pytest.raises(CheckpointError, match="folds 0, 1 were trained on different fold tables"):
        run.evaluate()


def test_scores_equal_scikit_learns_on_the_predictions_joined_by_hand(run: Run) -> None:
    metrics = run.evaluate()
    table = pd.concat([pd.read_parquet(run.data / "train" / f"fold-{fold}" / "predictions.parquet") for fold in (0, 1)])
    number = {image_id: at for at, image_id in np.ndenumerate(run.store.image_id) if image_id}
    truth = np.array([run.labels[number[image_id]] for image_id in table["image_id"]])
    known = truth[:, ANY] != -1
    assert (~known).sum() == 1
    expected = sklearn.metrics.roc_auc_score(truth[known, ANY], table["any"][known])
    assert metrics["slice"]["any"]["auc"] == pytest.approx(expected, abs=1e-6)
    by_study = table.assign(truth=truth[:, ANY]).groupby("study_uid")[["any", "truth"]].max()
    expected = sklearn.metrics.roc_auc_score(by_study["truth"], by_study["any"])
    assert metrics["study"]["any"]["auc"] == pytest.approx(expected, abs=1e-6)
    figures = metrics["slice"]["any"]
    assert (figures["positives"], figures["negatives"]) == (24, STUDIES * SLICES - 24 - 1)
    assert (figures["positive_studies"], figures["positive_patients"]) == (8, 8)
    assert metrics["held_out"]["labelled_slices"] == STUDIES * SLICES - 1


def test_counting_baseline_reads_the_same_slices(run: Run) -> None:
    """In this store every bleeding slice has bright pixels and no other has one: counting is perfect."""
    counting = run.evaluate()["counting"]
    assert counting["any_auc"] == 1.0
    assert counting["any_auc_above_counting"] == pytest.approx(run.metrics()["slice"]["any"]["auc"] - 1, abs=1e-6)
    assert counting["window"] == "subdural"


def test_windows_without_blood_leave_counting_out_and_say_why(cohort: Cohort) -> None:
    run = Run(cohort, folds=[0, 1], windows={"narrow": Window(centre=40, width=40)})
    metrics = run.evaluate()
    assert metrics["counting"]["any_auc"] is None
    assert "no window covers 50 to 90 HU" in metrics["counting"]["reason"]
    assert "no window covers" in (run.report / "report.html").read_text()


def test_same_input_gives_the_same_bytes(run: Run) -> None:
    run.evaluate()
    before = run.outputs()
    run.evaluate()
    assert run.outputs() == before


def test_leftover_of_another_fold_leaves_no_trace(cohort: Cohort) -> None:
    run = Run(cohort, folds=[0])
    run.evaluate()
    before = run.outputs()
    run.write_fold(1, store_digest="of another store", seconds=12345.0)
    run.evaluate()
    assert run.outputs() == before
    assert run.metrics()["held_out"]["folds"] == [0]
    assert set(run.metrics()["slice"]["any"]["auc_by_fold"]) == {"0"}


def test_missing_fold_is_refused_by_name(run: Run) -> None:
    (run.data / "train" / "fold-1" / "predictions.parquet").unlink()
    with pytest.raises(
        CheckpointError, match=r"fold 1 is not trained, and train.folds = \[0, 1\] names it; run .*--fold 1"
    ):
        run.evaluate()
    assert not run.report.exists()


def test_fold_of_another_store_is_refused_with_both_digests(run: Run) -> None:
    run.write_summary(1, store_digest="0123456789abcdef0123")
    with pytest.raises(CheckpointError, match=rf"fold 1 .* store 0123456789ab, .* {run.store.digest[:12]}; run"):
        run.evaluate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": {"epochs": 7}}, r"fold 0 was trained with train.epochs = 7, the parameters say \d+"),
        ({"params": {"loss": {"focal_gamma": 2.0}}}, r"train.loss.focal_gamma = 2.0, the parameters say 0.0"),
        ({"folds_params": {"seed": 9}}, r"fold 0 was trained with folds.seed = 9, the parameters say 0"),
    ],
)
def test_fold_of_other_parameters_is_refused_by_key(run: Run, changes: dict[str, Any], message: str) -> None:
    found: dict[str, Any] = {"params": run.config.train.shaping(), "folds_params": run.config.folds.model_dump()}
    for section, values in changes.items():
        for key, value in values.items():
            found[section][key] = {**found[section][key], **value} if isinstance(value, dict) else value
    run.write_summary(0, **found)
    with pytest.raises(CheckpointError, match=message):
        run.evaluate()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fold": 0}'])
def test_unreadable_summary_is_refused(run: Run, content: str) -> None:
    (run.data / "train" / "fold-0" / "summary.json").write_text(content)
    with pytest.raises(CheckpointError, match="fold 0"):
        run.evaluate()


def test_prediction_of_a_slice_that_the_store_lacks_is_refused(run: Run) -> None:
    table = run.write_fold(1)
    table.loc[table.index[0], "image_id"] = "ID_fffffffff"
    table.to_parquet(run.data / "train" / "fold-1" / "predictions.parquet")
    with pytest.raises(StoreError, match="fold 1 predicts slice ID_fffffffff"):
        run.evaluate()


def test_slice_held_out_by_two_folds_is_refused(run: Run) -> None:
    table = run.write_fold(0)
    table.assign(fold=np.int16(1)).to_parquet(run.data / "train" / "fold-1" / "predictions.parquet")
    with pytest.raises(CheckpointError, match="held out twice"):
        run.evaluate()


@pytest.mark.parametrize("value", [np.nan, -0.1, 1.5])
def test_prediction_that_is_no_probability_is_refused(run: Run, value: float) -> None:
    table = run.write_fold(1)
    table.loc[table.index[3], "subdural"] = value
    table.to_parquet(run.data / "train" / "fold-1" / "predictions.parquet")
    with pytest.raises(CheckpointError, match=r"fold 1 has 1 row\(s\)"):
        run.evaluate()


def test_show_without_scores_says_how_to_get_them(run: Run) -> None:
    with pytest.raises(IchorError, match=r"metrics.json: no scores yet; run `python -m stages.evaluate`"):
        main(argparse.Namespace(params=run.params, data=run.data, show=True))


def test_operating_points_are_fitted_on_all_held_out_predictions_and_say_on_which(run: Run) -> None:
    metrics = run.evaluate()
    found = json.loads((run.report / "operating_points.json").read_text())
    assert list(found) == ["store_digest", "folds_digest", "folds", "params", "rule", "slice", "study"]
    assert (found["store_digest"], found["folds_digest"]) == (run.store.digest, "dealt once")
    assert (found["folds"], found["params"]) == ([0, 1], run.config.train.shaping())
    tables = [pd.read_parquet(run.data / "train" / f"fold-{fold}" / "predictions.parquet") for fold in (0, 1)]
    said = pd.concat(tables).set_index("image_id")["any"]
    known = {
        run.store.image_id[s, k]: run.labels[s, k, ANY] for s, k in run.store.slices if run.labels[s, k, ANY] != -1
    }
    truth, probability = np.array(list(known.values())) == 1, said[list(known)].to_numpy(np.float64)
    point = found["slice"]["any"]
    assert (point["positives"], point["negatives"]) == (truth.sum(), (~truth).sum())
    assert point["temperature"] == fit_temperature(truth, probability)
    called = scale(probability, point["temperature"]) >= point["threshold"]
    best = max(recall(truth, probability >= one) + recall(~truth, probability < one) for one in probability)
    assert recall(truth, called) + recall(~truth, ~called) == best
    for level in ("slice", "study"):
        for name in LABELS:
            scored = metrics[level][name]["sensitivity"] is not None
            assert (found[level][name]["temperature"] is not None) == scored
            assert (found[level][name]["threshold"] is not None) == scored


def recall(truth: np.ndarray, called: np.ndarray) -> float:
    return float(sklearn.metrics.recall_score(truth, called))


def test_plots_of_dvc_draw_columns_that_are_written(run: Run) -> None:
    """`dvc plots diff` draws nothing, or mixes the labels, where a template asks for a column that isn't there."""
    run.evaluate()
    plots = [one for one in yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"] if "data/live/curves" not in one]
    drawn = set()
    for plot in (settings for one in plots for settings in one.values()):
        ((path, up),) = plot["y"].items()
        table = pd.read_csv(run.report / Path(path).name)
        template = (ROOT / ".dvc" / "plots" / f"{plot['template']}.json").read_text()
        named = set(re.findall(r"datum\.(\w+)", template)) - {"rev"}
        assert {plot["x"], up} | named <= set(table)
        fields = set(re.findall(r'"field": "(\w+)"', template)) - set(re.findall(r'"as": "(\w+)"', template))
        assert fields - {"rev", "at"} <= set(table)
        if "label" in table:
            assert json.loads(template)["facet"]["field"] == "label"
        drawn.add(Path(path).name)
    assert drawn == {path.name for path in run.report.glob("*.csv")}, "every table of curves has its plot"


def test_roc_table_starts_and_ends_in_the_corners(run: Run) -> None:
    run.evaluate()
    table = pd.read_csv(run.report / "roc.csv")
    assert list(table) == ["level", "label", "fold", "fpr", "tpr"]
    curves = table.groupby(["level", "label", "fold"])
    assert {fold for _, _, fold in curves.groups} == {"all", "0", "1"}
    assert (curves.size() <= 200).all()
    for _, curve in curves:
        assert curve[["fpr", "tpr"]].iloc[0].tolist() == [0, 0]
        assert curve[["fpr", "tpr"]].iloc[-1].tolist() == [1, 1]
        assert (curve[["fpr", "tpr"]].diff().dropna() >= 0).all(axis=None)


def test_training_table_holds_both_losses_of_every_fold_and_epoch(run: Run) -> None:
    run.evaluate()
    table = pd.read_csv(run.report / "training.csv")
    assert list(table) == ["fold", "epoch", "part", "loss"]
    losses = table.set_index(["fold", "part", "epoch"])["loss"]
    assert len(losses) == 2 * 2 * 3
    assert losses[1, "validation", 2] == 0.5
    assert losses[0, "training", 3] == 0.3


def test_report_needs_nothing_from_elsewhere_and_names_nobody(run: Run) -> None:
    run.evaluate()
    page = (run.report / "report.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*(?![\"']data:image)", page)
    assert not re.search(r"https?:|url\(|@import|<script|<link", page)
    secrets = [*run.store.study, *run.store.patient_key, *run.store.image_id.ravel()]
    assert not [secret for secret in secrets if secret and secret in page]
    assert str(run.cohort.folder) not in page
    assert run.config.index.patient_salt not in re.sub("Ichor", "", page)


def test_report_holds_what_was_scored(run: Run) -> None:
    metrics = run.evaluate()
    page = (run.report / "report.html").read_text()
    assert page.count('class="chart"') == 3 * len(LABELS) + 2 + 2, (
        "ROC, precision-recall, reliability; ROC averages; two trainings"
    )
    assert "Not a medical device" in page
    assert f"{metrics['headline']['slice_any_auc']:.3f}" in page
    assert "104 files found = 90 used + 6 repaired + 8 excluded" in page
    assert "12-bit values had wrapped round" in page
    assert run.store.digest[:12] in page
    assert page.count("<img") == page.count('alt="Head CT') > 4
    for encoded in re.findall(r"data:image/png;base64,([^\"]+)", page):
        assert base64.b64decode(encoded).startswith(b"\x89PNG")


@pytest.mark.parametrize(("labels", "says"), [("data/phantom/labels.csv", True), ("data/rsna/labels.csv", False)])
def test_report_speaks_of_phantoms_only_where_there_are_any(cohort: Cohort, labels: str, says: bool) -> None:
    run = Run(cohort, folds=[0, 1], source__labels=labels)
    run.evaluate()
    page = (run.report / "report.html").read_text()
    assert ("phantom" in page) == says
    assert ("other hospitals" in page.lower()) != says


def test_intervals_stand_beside_the_figures_and_in_the_report(run: Run) -> None:
    metrics = run.evaluate()
    page = (run.report / "report.html").read_text()
    low, high = metrics["slice"]["any"]["auc_ci"]
    assert low < metrics["slice"]["any"]["auc"] < high
    assert f"{low:.3f} to {high:.3f}" in page
    assert metrics["slice"]["epidural"]["positive_patients"] == 2
    assert metrics["slice"]["epidural"]["auc_ci"] is None, "too few patients"
    low, high = metrics["slice"]["weighted_log_loss_ci"]
    assert low < metrics["slice"]["weighted_log_loss"] < high
    low, high = metrics["counting"]["any_auc_above_counting_ci"]
    assert low < metrics["counting"]["any_auc_above_counting"] < high + 1e-9
    assert high < 0, "here counting is perfect"
    assert (metrics["held_out"]["resamples"], metrics["held_out"]["prevalence"]) == (100, 0.08)
    assert "PPV at 8 %" in page


def test_intervals_follow_the_seed_and_nothing_else_does(run: Run) -> None:
    one = run.evaluate()
    settings = {"train__folds": [0, 1], "folds__count": 2, "evaluate__bootstrap": 100, "evaluate__seed": 1}
    run.params = run.cohort.write_params(**settings)
    other = run.evaluate()
    assert one["slice"]["any"]["auc_ci"] != other["slice"]["any"]["auc_ci"]

    def figures(metrics: Any) -> Any:
        if not isinstance(metrics, dict):
            return metrics
        return {key: figures(value) for key, value in metrics.items() if not key.endswith("_ci")}

    assert figures(one) == figures(other)


def test_reliability_and_precision_recall_tables_hold_every_label_and_level(run: Run) -> None:
    metrics = run.evaluate()
    bins = pd.read_csv(run.report / "reliability.csv")
    for (level, label, name), one in bins.groupby(["level", "label", "probabilities"]):
        error = np.average((one["observed"] - one["predicted"]).abs(), weights=one["rows"])
        key = {"predicted": "ece", "scaled": "ece_scaled"}[name]
        assert metrics[level][label][key] == pytest.approx(error, abs=1e-5)
        assert one["rows"].sum() == metrics[level][label]["positives"] + metrics[level][label]["negatives"]
    curves = pd.read_csv(run.report / "precision_recall.csv")
    assert set(curves["level"]) == set(bins["level"]) == {"slice", "study"}
    assert set(curves["label"]) == set(bins["label"]) == set(LABELS)
    assert curves[["recall", "precision"]].stack().between(0, 1).all()


def test_several_folds_have_a_mean_and_a_spread_and_one_has_none(run: Run, tmp_path: Path) -> None:
    metrics = run.evaluate()
    aucs = list(metrics["slice"]["any"]["auc_by_fold"].values())
    page = (run.report / "report.html").read_text()
    assert f"(folds {np.mean(aucs):.3f} ± {np.std(aucs, ddof=1):.3f})" in page
    both = [name for name in LABELS if None not in metrics["slice"][name]["auc_by_fold"].values()]
    assert page.count('<polygon class="spread"') == len(both) > 1
    (tmp_path / "alone").mkdir()
    alone = Run(Cohort(tmp_path / "alone"), folds=[0])
    alone.evaluate()
    assert '<polygon class="spread"' not in (alone.report / "report.html").read_text()


def test_published_systems_stand_beside_this_run_filled_from_the_metrics(run: Run) -> None:
    metrics = run.evaluate()
    page = (run.report / "report.html").read_text()
    row = re.search(r'<tr class="strong"><th scope="row">this run</th>.*?</tr>', page, re.DOTALL)
    assert row is not None
    assert f"{metrics['slice']['any']['auc']:.3f} by slice" in row[0]
    assert f"{metrics['study']['any']['auc']:.3f} by study" in row[0]
    assert f"{metrics['slice']['weighted_log_loss']:.4f}" in row[0]
    assert f"{metrics['held_out']['patients']} patients" in row[0]
    for one in PUBLISHED:
        assert all(str(escape(words)) in page for words in (one.system, one.split, one.auc, one.log_loss, one.caveat))


def add_alone(run: Run, folds: list[int]) -> None:
    """What the CNN says without the sequence model, which turned some of it round."""
    for fold in folds:
        path = run.data / "train" / f"fold-{fold}" / "predictions.parquet"
        table = pd.read_parquet(path)
        alone = {
            f"cnn_{name}": np.where(np.arange(len(table)) % 3 == 0, 1 - table[name], table[name]) for name in LABELS
        }
        table.assign(**alone).to_parquet(path)


def test_the_cnn_alone_stands_beside_the_sequence_models_scores(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert "without_sequence" not in run.evaluate()
    before = run.metrics()
    add_alone(run, [0, 1])
    capsys.readouterr()
    metrics = run.evaluate()
    alone = metrics.pop("without_sequence")
    assert metrics == before, "the last word is still the sequence model's"
    tables = [pd.read_parquet(run.data / "train" / f"fold-{fold}" / "predictions.parquet") for fold in (0, 1)]
    table = pd.concat(tables).set_index("image_id")
    truth = {run.store.image_id[s, k]: run.labels[s, k, ANY] for s, k in run.store.slices}
    known = [image_id for image_id in table.index if truth[image_id] != -1]
    expected = sklearn.metrics.roc_auc_score([truth[one] for one in known], table.loc[known, "cnn_any"])
    assert alone["slice_any_auc"] == pytest.approx(expected, abs=1e-6)
    assert alone["weighted_log_loss"] > metrics["slice"]["weighted_log_loss"]
    assert set(alone) < set(metrics["headline"]) | {"study_any_auc"}
    assert f"the CNN alone       any AUC {alone['slice_any_auc']:.3f}" in capsys.readouterr().out
    assert "The CNN alone" in (run.report / "report.html").read_text()


def test_one_fold_without_the_cnns_own_word_leaves_it_out(run: Run) -> None:
    add_alone(run, [1])
    assert "without_sequence" not in run.evaluate()


def test_the_cnns_own_word_is_refused_where_it_is_no_probability(run: Run) -> None:
    add_alone(run, [0, 1])
    path = run.data / "train" / "fold-1" / "predictions.parquet"
    table = pd.read_parquet(path)
    table.loc[table.index[0], "cnn_any"] = np.nan
    table.to_parquet(path)
    with pytest.raises(CheckpointError, match=r"fold 1 has 1 row\(s\) with no probability"):
        run.evaluate()


def test_scores_of_an_earlier_version_are_refused_by_show(run: Run) -> None:
    metrics = run.evaluate()
    del metrics["held_out"]["resamples"]
    (run.report / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(IchorError, match=r"metrics.json: not the scores of an evaluation; run"):
        main(argparse.Namespace(params=run.params, data=run.data, show=True))


def test_strata_hold_every_slice_once_and_are_scored_as_by_scikit_learn(run: Run) -> None:
    metrics = run.evaluate()
    strata, labelled = metrics["strata"], metrics["held_out"]["labelled_slices"]
    named = ["stored as", "around the scanned circle", "gantry tilt", "slice thickness"]
    assert list(strata) == named, "in all else these studies are alike, also in what their headers foretell"
    assert list(strata["gantry tilt"]) == ["under 1°", "1 to 15°", "15° or more"]
    assert list(strata["slice thickness"]) == ["3 to 6 mm", "not known"]
    for name in named:
        assert sum(part["rows"] for part in strata[name].values()) == labelled
        assert sum(part["positives"] for part in strata[name].values()) == metrics["slice"]["any"]["positives"]
    assert list(strata["stored as"]) == ["12 bits, unsigned, intercept −1024", "16 bits, unsigned, intercept −1024"]
    truth, said = [], []
    tables = [pd.read_parquet(run.data / "train" / f"fold-{fold}" / "predictions.parquet") for fold in (0, 1)]
    probability = pd.concat(tables).set_index("image_id")["any"]
    for study, number in run.store.slices:
        if study % 4 < 2 and run.labels[study, number, ANY] != -1:
            truth.append(run.labels[study, number, ANY])
            said.append(probability[run.store.image_id[study, number]])
    part = strata["stored as"]["12 bits, unsigned, intercept −1024"]
    assert part["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(truth, said), abs=1e-6)
    assert part["log_loss"] == pytest.approx(sklearn.metrics.log_loss(truth, said), abs=1e-5)
    low, high = part["auc_ci"]
    assert low < part["auc"] <= high
    page = (run.report / "report.html").read_text()
    for name, parts in strata.items():
        assert name in page
        assert all(one in page for one in parts)


def test_headers_that_know_the_label_are_found_out(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this store every even study bleeds: a header that tells even from odd gives all away, on both folds."""
    run = Run(cohort, folds=[0, 1])
    blind = run.evaluate()["headers"]
    run.store.per_study["rows"] = np.where(np.arange(STUDIES) % 2 == 0, 512, 600)
    monkeypatch.setattr("pipeline.baseline.SMALLEST_LEAF", 1)  # this store holds too few studies for leaves of 20
    metrics = evaluate(run.config, run.store, train=run.data / "train").metrics
    seeing, thirds = metrics["headers"], metrics["strata"]["likelihood by the headers alone"]
    assert {part["positives"] / part["rows"] for part in thirds.values()} == {0, 0.5}, "3 of 6 slices bleed"
    assert seeing["auc"]["any"] == 1.0
    assert (blind["auc"]["any"] or 0) < 0.9
    network = run.metrics()["study"]["any"]["auc"]
    assert seeing["any_auc_above_headers"] == pytest.approx(network - 1, abs=1e-6)
    assert blind["any_auc_above_headers"] == pytest.approx(network - blind["auc"]["any"], abs=1e-5)
    by_slice = metrics["headers_by_slice"]
    assert by_slice["auc"]["any"] == 1.0, "and where in the study a slice lies tells the rest"
    assert metrics["balanced"]["slice"]["any"]["positives"] < 5, "no row is left to compare"


def test_headers_are_not_learnt_from_the_patients_that_they_predict(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two studies have one tilt here: whoever has seen a study knows it again, and nobody else learns anything."""
    monkeypatch.setattr("pipeline.baseline.SMALLEST_LEAF", 1)
    metrics = run.evaluate()
    headers = metrics["headers"]
    assert headers["auc"]["any"] < 0.8
    assert headers["any_log_loss"] > 0.5
    by_place_alone = (2 / 3 + 1) / 2  # of the free slices, two thirds lie where no slice bleeds
    assert metrics["headers_by_slice"]["auc"]["any"] < by_place_alone + 0.05


def test_page_and_terminal_show_the_headers_beside_the_network(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run.evaluate()
    said, page = capsys.readouterr().out, (run.report / "report.html").read_text()
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL)]
    balanced, names = metrics["balanced"]["slice"], [*LABELS]
    assert balanced["any"]["headers"] == 0.5, "too few studies to learn from: the headers tell nothing"
    expected = {
        "headers, by slice": [metrics["headers_by_slice"]["auc"][name] for name in names],
        "headers, by study": [metrics["headers"]["auc"][name] for name in names],
    }
    for title, figures in expected.items():
        row = next(row for row in rows if row[:3] == title.split())
        kept = [word for word in row[3:] if word != "to"][: len(names)]
        assert kept == [f"{one:.3f}" for one in figures]
    compared = (
        "–"
        if balanced[name]["positives"] is None
        else f"{balanced[name]['positives']} of {metrics['slice'][name]['positives']}"
        for name in names
    )
    assert f"positives compared {' '.join(compared)}" in [" ".join(row) for row in rows]
    low, high = balanced["any"]["network_ci"]
    network = f"{balanced['any']['network']:.3f}"
    assert f"balanced by headers any AUC {network} [{low:.3f}, {high:.3f}] by slice" in said
    assert f'{network}<br><span class="ci">{low:.3f} to {high:.3f}</span>' in page


def test_gallery_names_what_is_labelled(run: Run) -> None:
    done = evaluate(run.config, run.store, train=run.data / "train")
    assert {picture.kind for picture in done.pictures} <= {"found", "missed", "false_alarm", "rightly_free"}
    for picture in done.pictures:
        labels = run.labels[picture.study, picture.slice_number - 1]
        assert (labels[LABELS.index(picture.label)] == 1) == (picture.kind in ("found", "missed"))
        assert (picture.labelled == "no bleeding") == (labels[ANY] != 1)


def test_bad_parameters_are_refused_before_anything_is_read(run: Run) -> None:
    run.params.write_text("train: {}\n")
    with pytest.raises(ConfigError):
        run.evaluate()


def test_ticks_are_round_and_few() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0, 0.63) == [0, 0.2, 0.4, 0.6]
    assert Axis("epoch", 1, 3, whole=True).ticks() == [1, 2, 3]
    assert all(len(ticks(0, high)) <= 6 for high in np.geomspace(1e-3, 1e4, 50))


def test_chart_places_lines_by_value_and_escapes_words() -> None:
    line = Line(np.array([0, 1]), np.array([0, 1]), "slices", "<slices>")
    svg = chart([line], describe='a "line"', x=Axis("x", 0, 1), y=Axis("y", 0, 1), size=(300, 200))
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == 'a "line"'
    drawn = root.find("polyline")
    assert drawn is not None
    assert drawn.attrib["points"] == "46.0,160.0 290.0,10.0"
    assert drawn.findtext("title") == "<slices>"


def test_band_lies_between_its_lines_and_below_every_line() -> None:
    band = Band(np.array([0, 1]), np.array([0, 0.5]), np.array([0.5, 1]), "spread", "mean ± SD")
    line = Line(np.array([0, 1]), np.array([0, 1]), "slices", "slices", dots=True, radius=np.array([2.0, 5.0]))
    svg = chart([line], describe="", x=Axis("x", 0, 1), y=Axis("y", 0, 1), size=(300, 200), bands=[band])
    root = ElementTree.fromstring(svg)
    filled = root.find("polygon")
    assert filled is not None
    assert filled.attrib["points"] == "46.0,85.0 290.0,10.0 290.0,85.0 46.0,160.0"
    tags = [child.tag for child in root]
    assert tags.index("polygon") < tags.index("polyline")
    assert [dot.attrib["r"] for dot in root.iter("circle")] == ["2.0", "5.0"]
