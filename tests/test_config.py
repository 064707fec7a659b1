from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import differences, load_config
from pipeline.errors import ConfigError
from tests.conftest import ROOT


def write(tmp_path: Path, change: Any) -> Path:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    change(values)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def set_key(key: str, value: Any) -> Any:
    *sections, last = key.split(".")

    def change(values: dict[str, Any]) -> None:
        for section in sections:
            values = values[section]
        values[last] = value

    return change


@pytest.mark.parametrize("name", ["params.yaml", "params.rsna.yaml"])
def test_committed_parameter_files_are_valid(name: str) -> None:
    assert load_config(ROOT / name).train.folds


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("preprocess.image_size", "big", "integer"),
        ("preprocess.image_size", 3, "16"),
        ("preprocess.workers", -1, "auto"),
        ("preprocess.windows.brain.width", 0, "greater than or equal to 1"),
        ("preprocess.windows.brain.centre", float("inf"), "finite"),
        ("source.dicom", "", "at least 1 character"),
        ("train.model", "resnet9000", "compact"),
        ("train.learning_rate", 0, "greater than 0"),
        ("folds.count", 1, "2"),
        ("source.dicom", 7, "string"),
        ("source.dicom", [], "a valid string or at least 1 item, not 0"),
        ("train.pretrained", 3, "a valid boolean or a valid string"),
        ("train.learning_rate", "2e-3", "as in 2.0e-3"),
        ("train", None, "a valid dictionary"),
    ],
)
def test_bad_value_is_refused_with_key_value_and_what_is_allowed(
    tmp_path: Path, key: str, value: Any, allowed: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(write(tmp_path, set_key(key, value)))
    line = next(line for line in str(refusal.value).splitlines() if key in line)
    assert repr(value) in line
    assert allowed in line


def test_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.epoch: unknown key"):
        load_config(write(tmp_path, set_key("train.epoch", 3)))


def test_missing_key_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"folds\.seed: missing"):
        load_config(write(tmp_path, lambda values: values["folds"].pop("seed")))


def test_fold_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"names fold 5, but folds.count = 5"):
        load_config(write(tmp_path, set_key("train.folds", [0, 5])))


@pytest.mark.parametrize("name", ["Brain", "all", "1st", "b-c"])
def test_window_of_an_odd_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"preprocess\.windows\.{name}: expected as a window's name a small letter"):
        load_config(write(tmp_path, set_key("preprocess.windows", {name: {"centre": 40, "width": 80}})))


def test_slices_too_small_for_a_backbone_are_refused(tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["preprocess"]["image_size"] = 24
        values["train"]["model"] = "densenet121"

    with pytest.raises(
        ConfigError, match=r"image_size = 24 is too small for train\.model = 'densenet121', which takes 32"
    ):
        load_config(write(tmp_path, change))
    assert load_config(write(tmp_path, set_key("preprocess.image_size", 24))).train.model == "compact"


def test_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text() + "\nfolds:\n  count: 3\n  seed: 1\n")
    with pytest.raises(ConfigError, match="the key 'folds' stands there twice"):
        load_config(path)


def test_salt_is_bounded_in_bytes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="patient_salt has 80 bytes, at most 64"):
        load_config(write(tmp_path, set_key("index.patient_salt", "é" * 40)))


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["train"]["epochs"] = 0
        values["preprocess"]["image_size"] = 1

    with pytest.raises(ConfigError) as refusal:
        load_config(write(tmp_path, change))
    assert "train.epochs" in str(refusal.value)
    assert "preprocess.image_size" in str(refusal.value)


@pytest.mark.parametrize("content", ["a: [1", "- 1", "", "just text"])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        load_config(path)


def test_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such parameter file"):
        load_config(tmp_path / "none.yaml")


def test_shaping_leaves_out_what_does_not_decide_the_weights() -> None:
    shaping = load_config(ROOT / "params.yaml").train.shaping()
    assert not {"folds", "device", "loader_workers", "checkpoint_seconds"} & shaping.keys()
    assert {"model", "epochs", "batch_size", "augment", "loss"} <= shaping.keys()


def test_differences_name_keys_on_either_side() -> None:
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 4}) == {"b.c": (2, 3), "d": (None, 4)}
    assert differences({"a": 1}, {"a": 1}) == {}
    assert differences(None, {"a": 1}, "x") == {"x": (None, {"a": 1})}
