"""Operating points scale and call as they say, are read whole or not at all, and never for another run's model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

from pipeline.errors import CheckpointError
from pipeline.labels import LABELS
from pipeline.operating import OperatingPoints, Point, find_operating_points, read_operating_points

IDENTITY = {"store_digest": "a" * 64, "folds_digest": "b" * 64, "folds": [0, 1], "params": {"epochs": 3}}


def content(**changes: Any) -> dict[str, Any]:
    """As `stages.evaluate` writes it."""
    point = {"temperature": 2.0, "threshold": 0.25, "positives": 9, "negatives": 9}
    levels = {level: dict.fromkeys(LABELS, point) for level in ("slice", "study")}
    return (
        {name: IDENTITY[name] for name in ("store_digest", "folds_digest", "folds")} | {"rule": "x", **levels} | changes
    )


def write(folder: Path, value: Any) -> Path:
    path = folder / "operating_points.json"
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path


def test_log_odds_are_divided_and_a_label_is_called_at_its_threshold() -> None:
    probability = np.random.default_rng(0).random(50)
    point = Point(temperature=1.7, threshold=float(expit(logit(probability[7]) / 1.7)))
    expected = expit(logit(probability) / 1.7)
    np.testing.assert_allclose(point.calibrate(probability), expected, rtol=1e-12)
    called = Point(1.7, float(point.calibrate(probability)[7])).call(probability)
    assert called is not None
    assert called[7], "at the threshold is called"
    assert called.tolist() == (probability >= probability[7]).tolist()
    assert np.isnan(Point().calibrate(probability)).all()
    assert Point().call(probability) is None
    assert Point(2.0).call(probability) is None


def test_a_tables_own_columns_stay_and_what_was_not_fitted_is_empty() -> None:
    values = np.random.default_rng(0).random((4, len(LABELS))).astype(np.float32)
    table = pd.DataFrame(values, columns=list(LABELS)).assign(image_id=list("abcd"))
    points = OperatingPoints(slices=dict.fromkeys(LABELS, Point()) | {"any": Point(2.0, 0.5)})
    found = points.extend(table)
    pd.testing.assert_frame_equal(found[table.columns], table)
    assert found.columns[len(table.columns) :].tolist() == [
        *(f"{name}_calibrated" for name in LABELS),
        *(f"{name}_called" for name in LABELS),
    ]
    np.testing.assert_allclose(found["any_calibrated"], expit(logit(values[:, -1].astype(float)) / 2), rtol=1e-6)
    assert found["any_called"].tolist() == (values[:, -1] >= 0.5).tolist()
    rest = [name for name in found.columns if name.endswith(("_calibrated", "_called")) and not name.startswith("any_")]
    assert found[rest].isna().all(axis=None)


def test_what_evaluation_wrote_is_taken_as_it_stands(tmp_path: Path) -> None:
    nothing = {"temperature": None, "threshold": None, "positives": 0, "negatives": 9}
    path = write(tmp_path, content(study=dict.fromkeys(LABELS, nothing)))
    points = read_operating_points(path, identity=IDENTITY)
    assert points.slices == dict.fromkeys(LABELS, Point(2.0, 0.25))
    assert points.studies == dict.fromkeys(LABELS, Point())
    described = json.loads(json.dumps(points.describe(), allow_nan=False))
    assert (described["used"], described["file"], described["rule"]) == (True, "/".join(path.parts[-3:]), "x")
    assert described["slice"]["any"] == {"temperature": 2.0, "threshold": 0.25}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"store_digest": "c" * 64}, "store_digest cccccccccccccccc, the model's aaaaaaaaaaaaaaaa"),
        ({"folds_digest": "c" * 64}, "folds_digest cccccccccccccccc, the model's bbbbbbbbbbbbbbbb"),
        ({"folds": [0]}, r"folds \[0\], the model's \[0, 1\]"),
        ({"params": {"epochs": 4}}, "params.epochs 4, the model's 3"),
        ({"params": {"epochs": 3}, "folds_digest": None}, ""),
    ],
)
def test_another_runs_are_left_out_and_only_what_both_know_is_compared(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    points = read_operating_points(write(tmp_path, content(**changes)), identity=IDENTITY)
    if not said:
        assert points.slices["any"] == Point(2.0, 0.25)
        return
    assert re.search(f"operating_points.json is of another run .{said}", points.why_not)
    assert points.slices == points.studies == dict.fromkeys(LABELS, Point())
    assert points.describe() == {"used": False, "why_not": points.why_not}


def broken(**point: Any) -> dict[str, Any]:
    return content(slice=dict.fromkeys(LABELS, {"temperature": 2.0, "threshold": 0.25} | point))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"{", "JSONDecodeError"),
        (b"\xff\xff", "UnicodeDecodeError"),
        ([1], "TypeError"),
        ({"any": 0.5}, "KeyError: 'slice'"),
        ({name: value for name, value in content().items() if name != "folds"}, "KeyError: 'folds'"),
        (content(study={}), "KeyError: 'epidural'"),
        (content(slice=dict.fromkeys(LABELS, 1.0)), "TypeError"),
        (broken(temperature=0), "a temperature of 0.0"),
        (broken(temperature="hot"), "could not convert"),
        (broken(temperature=None), "a threshold of 0.25 at a temperature of None"),
        (broken(threshold=float("nan")), "a threshold of nan"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_in_words(value: Any, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, value)
    with pytest.raises(CheckpointError, match=f"not the operating points of an evaluation .*{said}.*; run") as error:
        read_operating_points(path, identity=IDENTITY)
    assert str(error.value).startswith(str(path))


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist; run `python -m stages\.evaluate` first"):
        read_operating_points(tmp_path / "none.json", identity=IDENTITY)
    with pytest.raises(CheckpointError, match="not the operating points"):
        read_operating_points(tmp_path, identity=IDENTITY)


def test_a_run_has_them_beside_its_model_its_folds_or_in_its_report(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "train" / "fold-0"
    folder.mkdir(parents=True)
    (tmp_path / "data" / "report").mkdir()
    model = folder / "model.pt"
    assert find_operating_points(model) is None
    for place in (tmp_path / "data" / "report", tmp_path / "data" / "train", folder):
        path = write(place, content())
        assert find_operating_points(model) == path
