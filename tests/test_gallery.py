"""The gallery: which slices it shows, in which windows, and where their own fold's networks looked."""

from __future__ import annotations

import base64
import re
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from pipeline.checkpoint import MODEL_FORMAT, write_tensors
from pipeline.evaluate import evaluate
from pipeline.gallery import (
    EACH,
    KINDS,
    LARGEST_PX,
    LEAST_SURE,
    SUREST,
    _name_probabilities,
    choose_all,
    choose_slices,
    png_uri,
)
from pipeline.gradcam import explain_slices
from pipeline.held_out import Scored, decide
from pipeline.labels import ANY, LABELS, SUBTYPES
from pipeline.model import build_model
from pipeline.sheet import blend_heat
from tests.conftest import Cohort
from tests.test_evaluate import Run


def scored(rng: np.random.Generator, *, studies: int = 20, each: int = 12) -> Scored:
    rows = studies * each
    labels_NL = (rng.random((rows, len(LABELS))) < 0.3).astype(np.int8)
    labels_NL[:, ANY] = labels_NL[:, :ANY].max(axis=1)
    labels_NL[rng.random(rows) < 0.1] = -1
    probability_NL = np.clip(0.35 + 0.2 * labels_NL + rng.normal(0, 0.2, labels_NL.shape), 0, 1)
    study_N = np.repeat(np.arange(studies), each)
    return Scored(labels_NL, probability_NL, study_N, study_N.astype(str).astype(object), study_N % 2)


def test_each_kind_shows_the_surest_and_the_least_sure() -> None:
    slices = scored(np.random.default_rng(0))
    known, truth, probability = slices.of(ANY)
    decisions = decide(slices, ANY)
    assert decisions is not None
    rows = np.flatnonzero(known)
    wanted = {
        "found": truth & decisions.called,
        "missed": truth & ~decisions.called,
        "false_alarm": ~truth & decisions.called,
        "rightly_free": ~truth & ~decisions.called,
    }
    chosen = choose_slices(slices)
    assert list(wanted) == list(KINDS)
    for kind, inside in wanted.items():
        found = {end: [one.row for one in chosen if (one.kind, one.end) == (kind, end)] for end in (SUREST, LEAST_SURE)}
        assert {row for of_end in found.values() for row in of_end} <= set(rows[inside])
        highest, lowest = rows[inside][np.argmax(probability[inside])], rows[inside][np.argmin(probability[inside])]
        called = kind in ("found", "false_alarm")
        assert found[SUREST][0] == (highest if called else lowest)
        assert found[LEAST_SURE][0] == (lowest if called else highest)
        assert not set(found[SUREST]) & set(found[LEAST_SURE])
        for of_end in found.values():
            assert len(of_end) == EACH
            assert len(set(slices.study_N[of_end])) == EACH, "no study twice in a row of pictures"


def test_each_subtype_shows_its_worst_miss_and_its_loudest_false_alarm() -> None:
    slices = scored(np.random.default_rng(1))
    of_subtypes = [one for one in choose_all(slices) if one.label != ANY]
    assert [(one.label, one.kind) for one in of_subtypes] == [
        (label, kind) for label in range(len(SUBTYPES)) for kind in ("missed", "false_alarm")
    ]
    for one in of_subtypes:
        assert one.end == SUREST
        assert slices.labels_NL[one.row, one.label] == (1 if one.kind == "missed" else 0)


def write_model(run: Run, fold: int, **changes: Any) -> None:
    torch.manual_seed(fold)
    channels = len(run.windows) * (2 * run.config.train.neighbours + 1)
    network = build_model(run.config.train.model, channels=channels, dropout=0.0)
    content = {
        "format": MODEL_FORMAT,
        "members": [network.state_dict()],
        "sequence": {"features.mean": torch.zeros(1)},
        "windows": {name: window.model_dump() for name, window in run.windows.items()},
        "image_size": run.store.image_size,
        "params": run.config.train.shaping(),
        "fold": fold,
        "store_digest": run.store.digest,
        "crop": "none",
        "scope": {},
        **changes,
    }
    write_tensors(run.data / "train" / f"fold-{fold}" / "model.pt", content)


def decode(uri: str) -> np.ndarray:
    encoded = np.frombuffer(base64.b64decode(uri.removeprefix("data:image/png;base64,")), np.uint8)
    decoded = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
    assert decoded is not None
    return decoded if decoded.ndim == 2 else decoded[..., ::-1]


def test_pictures_are_the_stores_slices_and_their_own_folds_heat_maps(cohort: Cohort) -> None:
    run = Run(cohort, folds=[0, 1])
    write_model(run, 0)
    write_model(run, 1)
    done = evaluate(run.config, run.store, train=run.data / "train")
    assert done.without_heat == []
    assert {picture.fold for picture in done.pictures} == {0, 1}
    network = {}
    for fold in (0, 1):
        torch.manual_seed(fold)
        channels = len(run.windows) * (2 * run.config.train.neighbours + 1)
        network[fold] = build_model("compact", channels=channels, dropout=0.0).eval()
    for picture in (done.pictures[0], done.pictures[3], done.pictures[-1]):
        where = (picture.study, picture.slice_number - 1)
        pixels = run.store.reader.read(*where)
        assert list(picture.windows) == list(run.windows)
        for number, png in enumerate(picture.windows.values()):
            np.testing.assert_array_equal(decode(png), pixels[..., number])
        (heat,) = explain_slices(
            [network[picture.fold]],
            run.store.reader,
            np.array([where]),
            np.array([LABELS.index(picture.label)]),
            neighbours=run.config.train.neighbours,
            device=torch.device("cpu"),
        )
        assert picture.heat is not None
        differing = decode(picture.heat).astype(int) - blend_heat(pixels[..., 0], heat)
        assert np.abs(differing).max() <= 2, "another batch may sum in another order"
        held_out = picture.study // 2 % 2
        assert picture.fold == held_out, "of the fold that held the study out"


def test_a_network_that_cannot_be_asked_costs_its_heat_maps_alone_and_is_named(cohort: Cohort) -> None:
    run = Run(cohort, folds=[0, 1])
    write_model(run, 0, store_digest="of another store")
    (run.data / "train" / "fold-1" / "model.pt").write_bytes(b"no network")
    metrics = run.evaluate()
    page = (run.report / "report.html").read_text()
    assert "fold-0/model.pt: trained on store of another" in page
    assert "fold-1/model.pt: not a model" in page
    assert str(run.cohort.folder) not in page
    assert "under the heat map of" not in page
    assert page.count('class="zoom"') > 8
    write_model(run, 0)
    (run.data / "train" / "fold-1" / "model.pt").unlink()
    assert run.evaluate() == metrics, "no figure depends on it"
    page = (run.report / "report.html").read_text()
    assert "fold-0/model.pt" not in page
    assert "fold-1/model.pt: not there, and heat maps need the networks" in page
    assert "under the heat map of any" in page


@pytest.mark.parametrize("shape", [(512, 512), (600, 300), (512, 512, 3)])
def test_large_slices_are_made_smaller_and_small_ones_left_alone(shape: tuple[int, ...]) -> None:
    pixels = np.full(shape, 90, np.uint8)
    pixels[..., : shape[1] // 2] = 10 if len(shape) == 2 else pixels[..., : shape[1] // 2]
    small = decode(png_uri(pixels))
    assert max(small.shape[:2]) == LARGEST_PX
    assert small.shape[0] * shape[1] == small.shape[1] * shape[0]
    left = pixels[:200, :200]
    np.testing.assert_array_equal(decode(png_uri(np.ascontiguousarray(left))), left)


def test_the_page_says_how_each_slice_is_found_in_the_viewer(cohort: Cohort) -> None:
    run = Run(cohort, folds=[0, 1])
    run.evaluate()
    page = (run.report / "report.html").read_text()
    captions = re.findall(r"<b>study (\d+), slice (\d+) of 6</b>.*?fold (\d) · <code>(.+?)</code>", page, re.DOTALL)
    assert len(captions) == page.count('class="zoom"') > 8
    for study, number, fold, address in captions:
        assert address == f"--study {study} --slice {number}"
        assert int(study) // 2 % 2 == int(fold)
        assert 1 <= int(number) <= 6, "from 1, as the viewer counts"


def test_probabilities_are_never_rounded_to_certainty() -> None:
    named = [
        _name_probabilities(np.array(values))
        for values in ([0.5, 0, 0.004, 0.02, 0.996, 0.999], [0.001] * 6, [0.3] * 6)
    ]
    assert named == [
        "any >0.99, EDH 0.50, SAH 0.02, SDH >0.99, the rest <0.01",
        "any <0.01, every subtype <0.01",
        "any 0.30, EDH 0.30, IPH 0.30, IVH 0.30, SAH 0.30, SDH 0.30",
    ]
