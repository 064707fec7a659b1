"""docs/arrays.md: its blocks run as they stand, without our code, and print what the page says that they print."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from pipeline.config import load_config
from pipeline.folds import deal_folds, write_folds
from pipeline.store import Store
from tests.conftest import ROOT
from tests.test_view import make_store, write_fold

PAGE = (ROOT / "docs" / "arrays.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
SAID = re.compile(r"^(# →|# phantom:) (.*)$", flags=re.MULTILINE)
BAR = re.compile(r"^\[[# ]*\] \|.*$", flags=re.MULTILINE)

WITHOUT_A_WINDOW = """
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # napari's own imports warn
    import napari
    from napari.components import ViewerModel

napari.Viewer, napari.run = ViewerModel, lambda: None
"""
"""What `napari.Viewer` is made of, less the Qt window, which needs a screen."""

LEFT_BEHIND = """
import json, sys

shown = [axes for figure in map(plt.figure, plt.get_fignums()) for axes in figure.axes]
facts = {
    "ours": [name for name in sys.modules if name.split(".")[0] in ("pipeline", "stages")],
    "counts": counts.tolist(),
    "positives": positives.tolist(),
    "aspects": [axes.get_aspect() for axes in shown],
    "spacing": [pixel_mm, slice_mm],
}
Path("facts.json").write_text(json.dumps(facts))
images = [np.asarray(axes.images[0].get_array()) for axes in shown if axes.images]
np.savez("arrays.npz", soft_hu=soft_hu.values, ids=table["image_id"].to_numpy(str), labels=table[names], *images)
"""


@dataclass(frozen=True)
class Walk:
    """What the blocks of the page printed and left behind."""

    store: Store
    printed: list[str]
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]


def run_blocks(folder: Path, blocks: list[str], *, before: str = "") -> list[str]:
    """Run blocks as one script in the folder that holds `data`, every warning an error; the lines that they print."""
    (folder / "walk.py").write_text("\n".join([before, *blocks]), encoding="utf-8")
    # our code could be imported, so that a page which did so would be caught, not fail
    paths = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-W", "error", "walk.py"],
        cwd=folder,
        env=environment | {"MPLBACKEND": "Agg", "PYTHONPATH": paths.rstrip(os.pathsep)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [line for line in BAR.sub("", done.stdout.replace("\r", "\n")).splitlines() if line]


def compare(printed: list[str], blocks: list[str]) -> None:
    """Hold lines to what the blocks say; of what is said of the phantom cohort, only the figures may differ."""
    said = SAID.findall("\n".join(blocks))
    for line, (kind, expected) in zip(printed, said, strict=True):
        if kind == "# →":
            assert line == expected
        else:
            assert re.sub(r"\d+", "0", line) == re.sub(r"\d+", "0", expected)


def uses_napari(block: str) -> bool:
    return "import napari" in block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`: a store, its folds, and predictions of each with one miss, slice 3 of study 0."""
    folder = tmp_path_factory.mktemp("walk")
    store, config = make_store(folder), load_config(folder / "params.yaml")
    dealt = deal_folds(config, store)
    write_folds(folder / "data" / "folds", dealt, config=config, store=store)
    for fold in range(config.folds.count):
        write_fold(folder / "data", store, fold=fold, studies=np.flatnonzero(dealt.fold_S == fold).tolist())
    return folder


@pytest.fixture(scope="module")
def walk(folder: Path) -> Walk:
    printed = run_blocks(folder, [*(block for block in BLOCKS if not uses_napari(block)), LEFT_BEHIND])
    with np.load(folder / "arrays.npz") as arrays:
        loaded = dict(arrays)
    facts = json.loads((folder / "facts.json").read_text())
    return Walk(Store(folder / "data" / "store.zarr"), printed, facts, loaded)


def test_page_prints_what_it_says(walk: Walk) -> None:
    compare(walk.printed, [block for block in BLOCKS if not uses_napari(block)])
    assert "nobody knows 8 of 48" in walk.printed  # the last study has no labels
    assert "study 0, slice 3: subdural, any 0.100" in walk.printed


def test_page_imports_nothing_of_ours(walk: Walk) -> None:
    assert walk.facts["ours"] == []


def test_pages_table_and_lazy_counts_are_the_stores(walk: Walk) -> None:
    store = walk.store
    study, number = store.slices.T
    np.testing.assert_array_equal(walk.arrays["ids"], store.image_id[study, number].astype(str))
    np.testing.assert_array_equal(walk.arrays["labels"], store.labels[study, number])
    pixels = np.concatenate([store.reader.read_study(one) for one in range(len(store.study))])
    np.testing.assert_array_equal(walk.facts["counts"], np.bincount(pixels[..., 0].ravel(), minlength=256))
    np.testing.assert_array_equal(walk.facts["positives"], (store.labels == 1).sum(axis=(0, 1)))


def test_pages_hu_are_those_of_the_dicom_files_to_half_a_grey_level(walk: Walk, folder: Path) -> None:
    returned_hu, known = walk.arrays["soft_hu"], 0
    for one_hu, image_id in zip(returned_hu, walk.store.image_id[0], strict=False):
        dicom = pydicom.dcmread(folder / "dicom" / f"{image_id}.dcm")
        stored_hu = dicom.pixel_array * float(dicom.RescaleSlope) + float(dicom.RescaleIntercept)
        expected_hu = stored_hu.reshape(32, 2, 32, 2).mean(axis=(1, 3))  # 64 × 64 became 32 × 32
        inside = np.isfinite(one_hu)
        np.testing.assert_allclose(one_hu[inside], expected_hu[inside], atol=380 / 255 / 2 + 1e-3)
        assert (np.abs(expected_hu[~inside] - 40) > 380 / 2 - 380 / 255).all()
        known += int(inside.sum())
    assert known > len(returned_hu) * 32 * 32 / 3  # the disk, not the air around it


def test_pages_pictures_are_to_scale_and_the_last_shows_the_worst_miss(walk: Walk) -> None:
    assert walk.facts["spacing"] == [1.0, 5.0]  # 64 pixels of 0.5 mm in 32, a slice each 5 mm
    assert walk.facts["aspects"][:2] == [1.0, 5.0]
    missed = walk.store.reader.read_study(0)[3]  # [row, column, window]
    rows, columns = np.nonzero(missed[..., 0])
    cut = missed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert cut.shape < missed.shape
    shown = [walk.arrays[f"arr_{panel}"] for panel in (2, 3, 4)]
    np.testing.assert_array_equal(np.stack(shown, axis=-1), cut)


def test_napari_takes_the_arrays_of_the_page(walk: Walk, folder: Path) -> None:
    if importlib.util.find_spec("napari") is None:
        pytest.skip("napari, which the page leaves to its reader, is not installed")
    check = "import json; Path('layers.json').write_text(json.dumps([[*map(float, layer.scale)] for layer in layers]))"
    printed = run_blocks(folder, [*BLOCKS, check], before=WITHOUT_A_WINDOW)
    compare(printed, BLOCKS)
    assert json.loads((folder / "layers.json").read_text()) == [[5.0, 1.0, 1.0]] * 3
