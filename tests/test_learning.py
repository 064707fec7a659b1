"""Model, loss, augmentation and loader: small facts that training stands on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from pipeline.augment import build_augment, slice_seed
from pipeline.config import AugmentConfig, LossConfig
from pipeline.errors import ConfigError, DamageError
from pipeline.labels import LABEL_WEIGHTS, LABELS
from pipeline.loader import Loader, SliceDataset, epoch_order, name_batches
from pipeline.loss import hemorrhage_loss
from pipeline.model import build_model
from pipeline.reader import shard_name
from pipeline.store import Store
from tests.conftest import Cohort
from tests.test_store import make_store

PLAIN = LossConfig(focal_gamma=0, label_smoothing=0, any_consistency=0)
AUGMENT = AugmentConfig(
    flip=0.5, rotate_deg=10, shift=0.05, scale=0.1, brightness=0.1, contrast=0.1, noise=0.05, cutout=0.5
)
OFF = AugmentConfig(flip=0, rotate_deg=0, shift=0, scale=0, brightness=0, contrast=0, noise=0, cutout=0)


def draw(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 6, generator=generator, dtype=torch.float64) * 3
    return logits, (torch.rand(count, 6, generator=generator) < 0.4).to(torch.int8)


def test_loss_is_the_challenge_metric_as_scikit_learn_computes_it() -> None:
    logits, labels = draw()
    by_label = [
        log_loss(labels[:, k].numpy(), logits[:, k].sigmoid().numpy(), labels=[0, 1]) for k in range(len(LABELS))
    ]
    expected = np.average(by_label, weights=LABEL_WEIGHTS)
    assert hemorrhage_loss(logits, labels, PLAIN).item() == pytest.approx(expected, abs=1e-6)


def test_unknown_labels_count_for_nothing() -> None:
    logits, labels = draw()
    masked = labels.clone()
    masked[5:, 2] = -1
    masked[7] = -1
    known = masked >= 0
    weights = torch.tensor(LABEL_WEIGHTS).expand_as(logits)[known]
    plain = torch.nn.functional.binary_cross_entropy_with_logits(
        logits.float()[known], labels.float()[known], weights, reduction="sum"
    )
    assert hemorrhage_loss(logits, masked, PLAIN).item() == pytest.approx((plain / weights.sum()).item(), abs=1e-6)
    logits = logits.float().requires_grad_()
    hemorrhage_loss(logits, masked, PLAIN).backward()
    assert logits.grad is not None
    assert (logits.grad[~known] == 0).all()


def test_batch_without_any_label_gives_zero() -> None:
    logits, labels = draw(3)
    assert hemorrhage_loss(logits, torch.full_like(labels, -1), PLAIN).item() == 0


@pytest.mark.parametrize("options", [{}, {"focal_gamma": 2.0}, {"label_smoothing": 0.1}, {"any_consistency": 0.5}])
def test_gradients_are_right(options: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor.double())  # finite differences need the precision
    logits, labels = draw(4)
    config = PLAIN.model_copy(update=options)
    assert torch.autograd.gradcheck(lambda x: hemorrhage_loss(x, labels, config), logits.requires_grad_())


def test_options_do_what_they_say() -> None:
    logits, labels = draw()
    plain = hemorrhage_loss(logits, labels, PLAIN)
    assert hemorrhage_loss(logits, labels, PLAIN.model_copy(update={"focal_gamma": 2.0})) < plain
    sure = torch.where(labels == 1, 30.0, -30.0)
    assert hemorrhage_loss(sure, labels, PLAIN) < 1e-6
    assert hemorrhage_loss(sure, labels, PLAIN.model_copy(update={"label_smoothing": 0.1})) > 1
    torn = torch.tensor([[5.0, -5, -5, -5, -5, -5]])
    silent = torch.tensor([[-1, -1, -1, -1, -1, -1]])
    assert hemorrhage_loss(torn, silent, PLAIN.model_copy(update={"any_consistency": 1.0})) > 0.1


@pytest.mark.parametrize("name", ["compact", "densenet121", "efficientnet-b0", "resnet18", "seresnext50"])
@pytest.mark.filterwarnings("ignore")
def test_models_take_any_channels_and_give_six_logits(name: str) -> None:
    model = build_model(name, channels=5, dropout=0.1)
    logits = model.eval()(torch.rand(2, 5, 64, 64))
    assert logits.shape == (2, len(LABELS))


def test_unknown_model_and_absent_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown model"):
        build_model("vit", channels=3, dropout=0)
    with pytest.raises(ConfigError, match="no pretrained weights"):
        build_model("compact", channels=3, dropout=0, pretrained=True)


def test_augmentation_depends_on_its_seed_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 6)).astype(np.uint8)
    augment, other = build_augment(AUGMENT), build_augment(AUGMENT)
    first = augment(pixels.copy(), 7)
    for seed in range(5):
        other(pixels.copy(), seed)  # what came before must not matter
    np.testing.assert_array_equal(first, other(pixels.copy(), 7))
    assert (first != augment(pixels.copy(), 8)).any()
    assert first.shape == pixels.shape
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(build_augment(OFF)(pixels, 3), pixels)


def test_one_geometric_transform_serves_all_channels() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 1)).astype(np.uint8).repeat(6, axis=2)
    turned = build_augment(OFF.model_copy(update={"rotate_deg": 20.0, "flip": 0.5}))(pixels, 3)
    assert (turned == turned[..., :1]).all()
    assert (turned != pixels).any()


def test_seeds_of_slices_and_epochs_differ() -> None:
    seeds = {slice_seed(0, epoch, number) for epoch in range(20) for number in range(200)}
    assert len(seeds) == 4000


def test_order_is_a_permutation_and_a_function_of_seed_and_epoch() -> None:
    order = epoch_order(1000, seed=3, epoch=5)
    assert sorted(order.tolist()) == list(range(1000))
    np.testing.assert_array_equal(order, epoch_order(1000, seed=3, epoch=5))
    assert (order != epoch_order(1000, seed=3, epoch=6)).any()
    assert (order != epoch_order(1000, seed=4, epoch=5)).any()


def test_batches_from_the_middle_are_the_same_batches() -> None:
    order = epoch_order(103, seed=0, epoch=0)
    every = name_batches(order, batch_size=10)
    assert [len(numbers) for _, numbers in every] == [10] * 10 + [3]
    for (_, one), (_, other) in zip(every[4:], name_batches(order, batch_size=10, first=4), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def store(cohort: Cohort) -> Store:
    for number in range(3):
        cohort.add_study(number, 4)
    return make_store(cohort)


def dataset_of(store: Store, **options: Any) -> SliceDataset:
    slices = store.slices
    return SliceDataset(store.reader, slices, store.labels[slices[:, 0], slices[:, 1]], **{"neighbours": 0, **options})


def test_batches_hold_the_slices_of_the_store(store: Store) -> None:
    batch = dataset_of(store)[(0, np.array([5, 0, 11]))]
    expected = [store.reader.read(*store.slices[number]) for number in (5, 0, 11)]
    np.testing.assert_array_equal(batch.slices_NRCX.numpy(), np.stack(expected))
    assert batch.labels_NL.shape == (3, 6)


def test_neighbours_come_as_channels_and_the_ends_repeat(store: Store) -> None:
    batch = dataset_of(store, neighbours=1)[(0, np.array([4, 5]))]  # first two slices of the second study
    windows = len(store.windows)
    below, here, above = (batch.slices_NRCX[..., k * windows : (k + 1) * windows].numpy() for k in range(3))
    np.testing.assert_array_equal(below[0], here[0])
    np.testing.assert_array_equal(below[1], here[0])
    np.testing.assert_array_equal(above[0], here[1])
    np.testing.assert_array_equal(above[1], store.reader.read(1, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_the_workers(store: Store, workers: int) -> None:
    dataset = dataset_of(store, neighbours=1, augment=AUGMENT, seed=1)
    loader = Loader(dataset, workers=workers)
    for epoch in range(2):
        names = name_batches(epoch_order(12, seed=0, epoch=epoch), batch_size=5, epoch=epoch)
        batches = list(loader.batches(names))
        assert len(batches) == 3
        for name, batch in zip(names, batches, strict=True):
            np.testing.assert_array_equal(batch.slices_NRCX.numpy(), dataset[name].slices_NRCX.numpy())


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_chunk_stops_the_loader_with_study_and_slice(store: Store, workers: int) -> None:
    path = store.path / "pixels" / shard_name(1, 0)
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.unlink()
    path.write_bytes(bytes(content))
    loader = Loader(dataset_of(store), workers=workers)
    with pytest.raises(DamageError, match="study ID_0000000001, slice 0"):
        list(loader.batches(name_batches(np.arange(12), batch_size=4)))
