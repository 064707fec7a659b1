"""The loss is the challenge's metric, as scikit-learn computes it; its options are what torch and papers say; shares add up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import log_loss

from pipeline.labels import ANY, LABEL_WEIGHTS, LABELS
from pipeline.loss import METRIC, hemorrhage_loss

WEIGHTS = [4.0, 1.0, 2.0, 0.5, 1.0, 3.0]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"focal_gamma": 2.0},
    {"label_smoothing": 0.1},
    {"any_consistency": 0.5},
    {"positive_weights": WEIGHTS},
    {"focal_gamma": 1.5, "label_smoothing": 0.05, "any_consistency": 0.2, "positive_weights": WEIGHTS},
]


def draw(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 6, generator=generator, dtype=torch.float64) * 3
    return logits, (torch.rand(count, 6, generator=generator) < 0.4).to(torch.int8)


def mask(labels: torch.Tensor) -> torch.Tensor:
    masked = labels.clone()
    masked[5:, 2] = -1
    masked[7] = -1
    return masked


def test_loss_is_the_challenge_metric_as_scikit_learn_computes_it() -> None:
    logits, labels = draw()
    by_label = [
        log_loss(labels[:, k].numpy(), logits[:, k].sigmoid().numpy(), labels=[0, 1]) for k in range(len(LABELS))
    ]
    expected = np.average(by_label, weights=LABEL_WEIGHTS)
    assert hemorrhage_loss(logits, labels, METRIC).item() == pytest.approx(expected, abs=1e-6)


def test_loss_of_known_labels_is_that_of_scikit_learn_where_others_are_unknown() -> None:
    logits, labels = draw()
    masked = mask(labels)
    known = (masked >= 0).numpy()
    weights = np.broadcast_to(LABEL_WEIGHTS, known.shape)[known]
    expected = log_loss(labels.numpy()[known], logits.sigmoid().numpy()[known], sample_weight=weights)
    assert hemorrhage_loss(logits, masked, METRIC).item() == pytest.approx(expected, abs=1e-6)
    logits = logits.float().requires_grad_()
    hemorrhage_loss(logits, masked, METRIC).backward()
    assert logits.grad is not None
    assert (logits.grad[masked < 0] == 0).all()


def test_batch_without_any_label_gives_zero_with_every_option() -> None:
    logits, labels = draw(3)
    for options in OPTIONS:
        assert hemorrhage_loss(logits, torch.full_like(labels, -1), METRIC.model_copy(update=options)).item() == 0


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_right(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor.double())  # finite differences need the precision
    monkeypatch.setattr("pipeline.loss._on_device", lambda values, _: torch.tensor(values, dtype=torch.float64))
    logits, labels = draw(10)
    config = METRIC.model_copy(update=options)
    assert torch.autograd.gradcheck(lambda x: hemorrhage_loss(x, mask(labels), config), logits.requires_grad_())


@pytest.mark.parametrize("options", OPTIONS)
def test_shares_of_a_batch_add_up_to_its_loss_and_gradient(options: dict[str, Any]) -> None:
    logits, labels = draw()
    labels, config = mask(labels), METRIC.model_copy(update=options)
    whole = logits.float().requires_grad_()
    hemorrhage_loss(whole, labels, config).backward()
    parts = logits.float().requires_grad_()
    shares = [hemorrhage_loss(parts[at], labels[at], config, whole_NL=labels) for at in (slice(0, 9), slice(9, 40))]
    torch.stack(shares).sum().backward()
    assert sum(share.item() for share in shares) == pytest.approx(
        hemorrhage_loss(logits, labels, config).item(), abs=1e-6
    )
    torch.testing.assert_close(whole.grad, parts.grad)


def test_weights_of_positives_are_those_of_torch() -> None:
    logits, labels = draw()
    theirs_NL = F.binary_cross_entropy_with_logits(
        logits.float(), labels.float(), pos_weight=torch.tensor(WEIGHTS), reduction="none"
    )
    expected = np.average(theirs_NL.mean(dim=0).numpy(), weights=LABEL_WEIGHTS)
    ours = hemorrhage_loss(logits, labels, METRIC.model_copy(update={"positive_weights": WEIGHTS}))
    assert ours.item() == pytest.approx(expected, abs=1e-6)


def test_focal_loss_is_that_of_the_paper() -> None:
    logits, labels = draw()
    sure = logits.sigmoid()
    of_truth = torch.where(labels == 1, sure, 1 - sure)
    by_hand = (-((1 - of_truth) ** 2) * of_truth.log()).mean(dim=0).numpy()  # Lin et al. 2017, equation 4
    ours = hemorrhage_loss(logits, labels, METRIC.model_copy(update={"focal_gamma": 2.0}))
    assert ours.item() == pytest.approx(np.average(by_hand, weights=LABEL_WEIGHTS), abs=1e-6)


def test_gradient_of_any_gamma_is_a_number_however_sure_the_network() -> None:
    logits = torch.tensor([[120.0, -120, 20, -20, 0, 120]]).requires_grad_()
    labels = torch.tensor([[1, 0, 1, 0, 1, -1]])
    hemorrhage_loss(logits, labels, METRIC.model_copy(update={"focal_gamma": 0.5})).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_smoothed_labels_make_certainty_costly() -> None:
    _, labels = draw()
    sure = torch.where(labels == 1, 30.0, -30.0)
    assert hemorrhage_loss(sure, labels, METRIC) < 1e-6
    smoothed = METRIC.model_copy(update={"label_smoothing": 0.1})
    best = torch.where(labels == 1, 0.95, 0.05).logit()
    assert hemorrhage_loss(sure, labels, smoothed) > hemorrhage_loss(best, labels, smoothed)
    moved = best.clone().requires_grad_()
    hemorrhage_loss(moved, labels, smoothed).backward()
    assert moved.grad is not None
    assert moved.grad.abs().max() < 1e-6, "the minimum is at 5 and 95 %"


def test_consistency_punishes_a_subtype_likelier_than_any_alone() -> None:
    config = METRIC.model_copy(update={"any_consistency": 1.0})
    labels = torch.zeros(1, 6, dtype=torch.int8)
    torn, sound = torch.full((1, 6), -5.0), torch.full((1, 6), -5.0)
    torn[0, 0] = 5.0
    sound[0, [0, ANY]] = 5.0
    excess = torch.tensor(5.0).sigmoid() - torch.tensor(-5.0).sigmoid()
    added = hemorrhage_loss(torn, labels, config) - hemorrhage_loss(torn, labels, METRIC)
    assert added.item() == pytest.approx(excess.item() / 5, abs=1e-6)
    assert hemorrhage_loss(sound, labels, config) == hemorrhage_loss(sound, labels, METRIC)
