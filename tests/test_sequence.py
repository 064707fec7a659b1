"""The model over a study's slices: it begins as the CNN, learns what only neighbours tell, and never makes it worse."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from pipeline.config import LossConfig, SequenceConfig
from pipeline.errors import IchorError
from pipeline.labels import LABEL_WEIGHTS, LABELS
from pipeline.loss import METRIC
from pipeline.sequence import (
    ROWS_AT_ONCE,
    SequenceModel,
    SequenceResult,
    Standardise,
    StudyFeatures,
    describe_place,
    fit_sequence,
    gather_studies,
    predict_sequence,
)

CPU = torch.device("cpu")
KINDS: list[Literal["gru", "transformer"]] = ["gru", "transformer"]
FEATURES = 8
PLANTED = 3
"""The feature of a slice that decides the labels of the slices beside it, and says nothing of its own."""


def configure(kind: Any, **changes: Any) -> SequenceConfig:
    values = {"width": 16, "layers": 1, "dropout": 0.1, "epochs": 3, "learning_rate": 0.01, "weight_decay": 0.01}
    return SequenceConfig(kind=kind, **{**values, **changes})


def draw_studies(count: int, *, seed: int, lengths: tuple[int, int] = (5, 14)) -> StudyFeatures:
    """A slice is positive for all labels where the planted features of its neighbours add up to more than 0.3."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(*lengths, count)
    features = rng.normal(2, 3, (counts.sum(), FEATURES)).astype(np.float16)
    labels, positions = [], []
    for signal in np.split((features[:, PLANTED].astype(float) - 2) / 3, np.cumsum(counts)[:-1]):
        beside = np.pad(signal, 1)
        labels.append(beside[:-2] + beside[2:] > 0.3)
        positions.append(rng.normal(0, 50) + 5.0 * np.arange(len(signal)))
    return StudyFeatures(
        features_NF=features,
        logits_NL=rng.normal(-0.4, 0.1, (counts.sum(), len(LABELS))).astype(np.float32),
        position_mm_N=np.concatenate(positions).astype(np.float32),
        labels_NL=np.concatenate(labels).astype(np.int8)[:, None].repeat(len(LABELS), axis=1),
        first_B=np.cumsum(counts) - counts,
        count_B=counts,
    )


def fit(
    config: SequenceConfig, *, seed: int = 0, loss: LossConfig = METRIC, **studies: StudyFeatures
) -> SequenceResult:
    training = studies.get("training", draw_studies(20, seed=1))
    validation = studies.get("validation", draw_studies(10, seed=2))
    return fit_sequence(training, validation, config=config, loss=loss, seed=seed, device=CPU)


def stirred(config: SequenceConfig) -> SequenceModel:
    """A model whose corrections are not zero."""
    torch.manual_seed(0)
    model = SequenceModel(FEATURES, config).eval()
    torch.nn.init.normal_(model.head.weight)
    model.features.measure(draw_studies(5, seed=0).features_NF)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_it_is_the_cnn(kind: str) -> None:
    config, studies = configure(kind), draw_studies(7, seed=0)
    weights = SequenceModel(FEATURES, config).state_dict()
    found = predict_sequence(weights, studies, config=config, device=CPU)
    np.testing.assert_array_equal(found, studies.logits_NL)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_study_does_not_depend_on_those_beside_it(kind: str, layers: int) -> None:
    config = configure(kind, layers=layers)
    model, studies = stirred(config), draw_studies(6, seed=0)
    together = predict_sequence(model.state_dict(), studies, config=config, device=CPU)
    assert np.abs(together - studies.logits_NL).max() > 0.1
    for number, (first, count) in enumerate(zip(studies.first_B, studies.count_B, strict=True)):
        batch = gather_studies(studies, np.array([number]), device=CPU)
        with torch.no_grad():
            alone = batch.correct(model).numpy()
        np.testing.assert_allclose(together[first : first + count], alone, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_the_padding_does_not_matter(kind: str) -> None:
    model = stirred(configure(kind))
    batch = gather_studies(draw_studies(4, seed=0), np.arange(4), device=CPU)
    assert not batch.mask_BS.all()
    rubbish = batch._replace(
        **{
            name: torch.where(batch.mask_BS.reshape(*batch.mask_BS.shape, *[1] * (value.ndim - 2)), value, torch.nan)
            for name, value in batch._asdict().items()
            if name in ("features_BSF", "logits_BSL", "position_mm_BS")
        }
    )
    with torch.no_grad():
        torch.testing.assert_close(rubbish.correct(model), batch.correct(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "studies", "epochs", "share"), [("gru", 96, 12, 0.5), ("transformer", 200, 20, 0.8)])
def test_it_learns_what_only_the_neighbours_tell(kind: str, studies: int, epochs: int, share: float) -> None:
    training, validation = draw_studies(studies, seed=1), draw_studies(40, seed=2)
    alone = LogisticRegression().fit(training.features_NF.astype(float), training.labels_NL[:, 0])
    by_itself = log_loss(validation.labels_NL[:, 0], alone.predict_proba(validation.features_NF.astype(float))[:, 1])
    config = configure(kind, epochs=epochs, width=32)
    result = fit(config, training=training, validation=validation)
    assert by_itself > 0.65  # a coin's is 0.69: a slice alone says next to nothing
    assert result.best_loss < share * min(by_itself, result.cnn_loss)
    found = predict_sequence(result.weights, validation, config=config, device=CPU)
    probability = torch.from_numpy(found).sigmoid().numpy()
    scores = [log_loss(validation.labels_NL[:, k], probability[:, k].astype(float)) for k in range(len(LABELS))]
    assert np.average(scores, weights=LABEL_WEIGHTS) == pytest.approx(result.best_loss, abs=1e-5)


def test_the_cnn_is_scored_by_the_challenge_metric_whatever_the_loss() -> None:
    validation = draw_studies(10, seed=2)
    smoothed = METRIC.model_copy(update={"label_smoothing": 0.2, "positive_weights": [3.0] * 6})
    result = fit(configure("gru", epochs=1), validation=validation, loss=smoothed)
    probability = torch.from_numpy(validation.logits_NL).sigmoid().numpy().astype(float)
    scores = [log_loss(validation.labels_NL[:, k], probability[:, k]) for k in range(len(LABELS))]
    assert result.cnn_loss == pytest.approx(np.average(scores, weights=LABEL_WEIGHTS), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_it_never_makes_validation_worse(kind: str) -> None:
    training, validation = draw_studies(20, seed=1), draw_studies(10, seed=2)
    sure = np.where(validation.labels_NL == 1, 9.0, -9.0).astype(
        np.float32
    )  # a CNN that knows, and lessons that are wrong
    validation = replace(validation, logits_NL=sure)
    config = configure(kind)
    result = fit(config, training=replace(training, labels_NL=1 - training.labels_NL), validation=validation)
    assert result.best_epoch == 0
    assert result.best_loss == result.cnn_loss < result.history.valid_loss[1:].min()
    found = predict_sequence(result.weights, validation, config=config, device=CPU)
    np.testing.assert_array_equal(found, sure)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_weights_and_leaves_the_global_state(kind: str) -> None:
    config = configure(kind, epochs=2, layers=2, dropout=0.3)
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    one = fit(config, seed=3)
    predict_sequence(one.weights, draw_studies(2, seed=0), config=config, device=CPU)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]  # type: ignore[index]
    torch.manual_seed(6)
    other, different = fit(config, seed=3), fit(config, seed=4)
    pd.testing.assert_frame_equal(one.history.drop(columns="seconds"), other.history.drop(columns="seconds"))
    assert all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())
    assert not torch.equal(one.weights["from_features.weight"], different.weights["from_features.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_studies_of_one_slice_and_of_300_are_learnt_from_together(kind: str) -> None:
    few, many = draw_studies(3, seed=0, lengths=(1, 2)), draw_studies(2, seed=1, lengths=(300, 301))
    arrays = ("features_NF", "logits_NL", "position_mm_N", "labels_NL")
    both = StudyFeatures(
        **{name: np.concatenate([getattr(few, name), getattr(many, name)]) for name in arrays},
        first_B=np.array([0, 1, 2, 3, 303]),
        count_B=np.array([1, 1, 1, 300, 300]),
    )
    config = configure(kind, epochs=2)
    for training in (both, few):
        result = fit(config, training=training, validation=both)
        assert np.isfinite(result.history.to_numpy()).all()
        found = predict_sequence(result.weights, both, config=config, device=CPU)
        assert found.shape == (603, 6)
        assert np.isfinite(found).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_that_nobody_knows_stays_the_cnns(kind: str) -> None:
    training, validation = draw_studies(40, seed=1), draw_studies(10, seed=2)
    training.labels_NL[:, 2] = -1
    training.labels_NL[: training.count_B[0]] = -1  # and a study of which nothing is known
    config = configure(kind, epochs=8)
    result = fit(config, training=training, validation=validation)
    assert result.best_epoch > 0
    found = predict_sequence(result.weights, validation, config=config, device=CPU)
    np.testing.assert_array_equal(found[:, 2], validation.logits_NL[:, 2])
    assert (found[:, [0, 1, 3, 4, 5]] != validation.logits_NL[:, [0, 1, 3, 4, 5]]).all()


def test_with_no_label_at_all_it_stays_the_cnn() -> None:
    training = draw_studies(5, seed=1)
    training.labels_NL[:] = -1
    result = fit(configure("gru"), training=training, validation=training)
    assert (result.best_epoch, result.best_loss) == (0, 0.0)


def test_reversed_studies_keep_each_slice_with_its_own() -> None:
    studies = draw_studies(3, seed=0)
    forth = gather_studies(studies, np.array([2, 0]), device=CPU)
    back = gather_studies(studies, np.array([2, 0]), device=CPU, reversed_B=np.array([True, False]))
    count = int(studies.count_B[2])
    for name in ("features_BSF", "logits_BSL", "position_mm_BS", "labels_BSL"):
        one, other = getattr(forth, name), getattr(back, name)
        torch.testing.assert_close(other[0, :count], one[0, :count].flip(0), msg=name)
        torch.testing.assert_close(other[1], one[1], msg=name)
    heights = [describe_place(batch.position_mm_BS, batch.mask_BS)[0, :count, 0] for batch in (forth, back)]
    torch.testing.assert_close(heights[1], heights[0].flip(0))  # the base of the skull stays below


def test_places_are_heights_and_distances() -> None:
    position_mm = torch.tensor([[10.0, 15, 20, 30], [7, 99, 99, 99]])
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    place = describe_place(position_mm, mask)
    below = torch.log1p(torch.tensor([0.0, 5, 5, 10]))
    torch.testing.assert_close(place[0], torch.stack([torch.tensor([-1, -0.5, 0, 1]), below, below.roll(-1)], dim=1))
    assert place[1, 0].tolist() == [0, 0, 0]


def test_features_are_measured_as_numpy_would_in_one_go() -> None:
    rows = np.random.default_rng(0).normal(3, 2, (ROWS_AT_ONCE + 100, 4)).astype(np.float16)
    rows[:, 2] = 7  # dead
    standard = Standardise(4)
    standard.measure(rows)
    found = standard(torch.from_numpy(rows)).numpy()
    deviation = rows.std(axis=0, dtype=np.float64)
    expected = (rows - rows.mean(axis=0, dtype=np.float64)) / np.where(deviation > 0, deviation, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert standard(torch.full((1, 4), 1e4)).max() == 10  # a leap is held


def test_weights_pass_through_a_file_of_plain_tensors() -> None:
    config, studies = configure("gru"), draw_studies(4, seed=0)
    weights = stirred(config).state_dict()
    file = io.BytesIO()
    torch.save(dict(weights), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    expected, found = (predict_sequence(each, studies, config=config, device=CPU) for each in (weights, loaded))
    np.testing.assert_array_equal(found, expected)


def test_history_tells_every_epoch_from_the_cnn_on() -> None:
    result = fit(configure("gru", epochs=3))
    assert result.history.epoch.tolist() == [0, 1, 2, 3]
    assert result.history.valid_loss[0] == result.cnn_loss
    assert result.history.valid_loss.min() == result.best_loss == result.history.valid_loss[result.best_epoch]
    rates = result.history.learning_rate.to_numpy()
    np.testing.assert_allclose(rates[1:], 0.005 * (1 + np.cos(np.pi * np.arange(3) / 3)))


def test_a_loss_that_is_no_number_stops_with_its_epoch() -> None:
    with pytest.raises(IchorError, match=r"became nan in epoch 1; lower train\.sequence\.learning_rate \(now 1e\+30\)"):
        fit(configure("gru", learning_rate=1e30), training=draw_studies(50, seed=1))
