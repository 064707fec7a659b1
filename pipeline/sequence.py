"""A model over a study's slices: what the CNN saw in each, read in order, mends what it said of each.

A bleed spans slices, so that neighbours know of it; every top system of the RSNA 2019 challenge gained most from a second
model of this kind. It adds a correction to the CNN's logits, and the correction starts at zero: untrained it is the CNN
itself, and the epoch that is kept, the CNN's own among them, is the best on the validation studies.
Axes: N slices of all studies, B studies in a batch, S slices of a study, F features, L labels, W width.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from pipeline.config import LossConfig, SequenceConfig
from pipeline.errors import IchorError
from pipeline.labels import LABELS
from pipeline.loss import METRIC, hemorrhage_loss
from pipeline.progress import Progress

STUDIES_A_BATCH = 16
"""At RSNA's 34 slices a study, 544 slices to a step."""

PREDICTED_AT_ONCE = 64
HEADS = 4
"""Of the transformer's attention; `width` is a multiple of 8."""

CLIP_NORM = 1.0
FARTHEST_SD = 10.0
"""Inputs are held within so many standard deviations: a feature that hardly varied in training may leap elsewhere."""

ROWS_AT_ONCE = 8192
"""Rows made float64 at once to measure features: 84 MB of 1,280; all rows of RSNA would take 7.7 GB."""


@dataclass(frozen=True)
class StudyFeatures:
    """What the CNN saw in a set of studies: one row a slice, studies one after another, slices in order."""

    features_NF: npt.NDArray[np.float16]
    logits_NL: npt.NDArray[np.float32]
    """The CNN's own."""
    position_mm_N: npt.NDArray[np.float32]
    """Along the slice normal."""
    labels_NL: npt.NDArray[np.int8]
    """1, 0, or −1 where unknown."""
    first_B: npt.NDArray[np.int64]
    """Row of each study's first slice."""
    count_B: npt.NDArray[np.int64]
    """Slices of each study, at least one."""


@dataclass(frozen=True)
class SequenceResult:
    """What training the sequence model gives."""

    weights: dict[str, Tensor]
    """On the CPU, of the epoch with the least validation loss; epoch 0 is the CNN alone."""
    best_epoch: int
    best_loss: float
    cnn_loss: float
    """Validation loss of the CNN's logits alone, never less than `best_loss`."""
    history: pd.DataFrame


class Padded(NamedTuple):
    """Studies beside each other, filled up to the longest; `mask_BS` is true where there is a slice."""

    features_BSF: Tensor
    logits_BSL: Tensor
    position_mm_BS: Tensor
    mask_BS: Tensor
    labels_BSL: Tensor
    rows_BS: npt.NDArray[np.int64]

    def correct(self, model: nn.Module) -> Tensor:
        """The model's logits of the real slices, study by study."""
        logits_BSL: Tensor = model(self.features_BSF, self.logits_BSL, self.position_mm_BS, self.mask_BS)
        return logits_BSL[self.mask_BS]


class Standardise(nn.Module):
    """Bring each column to mean 0 and standard deviation 1, as measured on the training studies."""

    mean: Tensor
    scale: Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("scale", torch.ones(columns))

    def measure(self, rows: npt.NDArray[np.floating]) -> None:
        """Take mean and standard deviation of [N, columns], a few rows at a time."""
        total, squares = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
        for first in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[first : first + ROWS_AT_ONCE].astype(np.float64)
            total += some.sum(axis=0)
            squares += (some**2).sum(axis=0)
        mean = total / len(rows)
        deviation = np.sqrt(np.maximum(squares / len(rows) - mean**2, 0))
        deviation[deviation < 1e-6] = 1  # a dead feature stays 0
        self.mean.copy_(torch.from_numpy(mean))
        self.scale.copy_(torch.from_numpy(1 / deviation))

    def forward(self, values: Tensor) -> Tensor:
        return ((values.float() - self.mean) * self.scale).clamp(-FARTHEST_SD, FARTHEST_SD)


class SequenceModel(nn.Module):
    """Corrects the CNN's logits of each slice by what it saw in all slices of the study.

    Args:
        feature_size: F.
        config: `gru` is a bidirectional GRU (Cho et al. 2014) of `width` units each way; `transformer` an encoder with the norm
            first (Xiong et al. 2020) of `width`.
    """

    def __init__(self, feature_size: int, config: SequenceConfig) -> None:
        super().__init__()
        self.features, self.logits = Standardise(feature_size), Standardise(len(LABELS))
        self.dropout = nn.Dropout(config.dropout)
        # Two layers, not one over all: there six logits would begin a hundred times fainter than a thousand features.
        self.from_features = nn.Linear(feature_size, config.width)
        self.from_place = nn.Linear(len(LABELS) + 3, config.width)
        self.context: nn.Module = GruContext(config) if config.kind == "gru" else TransformerContext(config)
        self.head = nn.Linear(2 * config.width if config.kind == "gru" else config.width, len(LABELS))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features_BSF: Tensor, logits_BSL: Tensor, position_mm_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Corrected logits [B, S, L]; what stands where `mask_BS` is false does not matter, and means nothing."""
        place_BSX = torch.cat([self.logits(logits_BSL), describe_place(position_mm_BS, mask_BS)], dim=2)
        inputs_BSW = self.from_features(self.dropout(self.features(features_BSF))) + self.from_place(place_BSX)
        context_BSW = self.context(inputs_BSW.masked_fill(~mask_BS[:, :, None], 0), mask_BS)
        correction_BSL: Tensor = self.head(self.dropout(context_BSW))
        return logits_BSL + correction_BSL


class GruContext(nn.Module):
    """Packed, so that the way back begins at a study's own last slice and not in the padding."""

    def __init__(self, config: SequenceConfig) -> None:
        super().__init__()
        self.gru = nn.GRU(
            config.width,
            config.width,
            config.layers,
            batch_first=True,
            bidirectional=True,
            dropout=config.dropout if config.layers > 1 else 0.0,  # it is between layers
        )

    def forward(self, inputs_BSW: Tensor, mask_BS: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            inputs_BSW, mask_BS.sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        context_BSW, _ = nn.utils.rnn.pad_packed_sequence(
            self.gru(packed)[0], batch_first=True, total_length=mask_BS.shape[1]
        )
        return context_BSW


class TransformerContext(nn.Module):
    """Every slice looks at every other of its study; waves tell it how many slices away they are."""

    def __init__(self, config: SequenceConfig) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            config.width,
            HEADS,
            dim_feedforward=4 * config.width,
            dropout=config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            layer, config.layers, norm=nn.LayerNorm(config.width), enable_nested_tensor=False
        )

    def forward(self, inputs_BSW: Tensor, mask_BS: Tensor) -> Tensor:
        waves_SW = draw_waves(*inputs_BSW.shape[1:]).to(inputs_BSW)
        context_BSW: Tensor = self.encoder(inputs_BSW + waves_SW, src_key_padding_mask=~mask_BS)
        return context_BSW


def draw_waves(slices: int, width: int) -> Tensor:
    """Sines and cosines [S, W] of a slice's number (Vaswani et al. 2017), from six to nearly 1,000 slices long."""
    number_S1 = torch.arange(slices)[:, None]
    angle = number_S1 * torch.exp(torch.arange(0, width, 2) * (-math.log(1000 / math.tau) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


def describe_place(position_mm_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Where a slice lies [B, S, 3]: from −1 to 1 in its study, and the log of its distance to the slices beside it."""
    lowest_B1 = position_mm_BS.masked_fill(~mask_BS, math.inf).amin(1, keepdim=True)
    highest_B1 = position_mm_BS.masked_fill(~mask_BS, -math.inf).amax(1, keepdim=True)
    half_B1 = (highest_B1 - lowest_B1) / 2
    height_BS = (position_mm_BS - lowest_B1 - half_B1) / half_B1.clamp(min=1e-3)
    both_BS = mask_BS[:, 1:] & mask_BS[:, :-1]
    gap_BS = position_mm_BS.diff(dim=1).abs().log1p().masked_fill(~both_BS, 0)
    gaps = [nn.functional.pad(gap_BS, (1, 0)), nn.functional.pad(gap_BS, (0, 1))]
    return torch.stack([height_BS, *gaps], dim=2)


def fit_sequence(
    training: StudyFeatures,
    validation: StudyFeatures,
    *,
    config: SequenceConfig,
    loss: LossConfig,
    seed: int,
    device: torch.device,
) -> SequenceResult:
    """Train a sequence model; the same seed gives the same weights on the CPU, and the global random state is left alone.

    Args:
        training: studies to learn from; an order in two is reversed, positions and all.
        validation: studies that decide which epoch is kept, by the challenge's metric.
        config: kind (not none), size, and how it learns: AdamW, half a cosine to zero.
        loss: what it learns from.
        seed: of its weights, its order and its dropout.
        device: where it learns.

    Raises:
        IchorError: the loss is no number.
    """
    with _own_randomness(seed, device):
        model = SequenceModel(training.features_NF.shape[1], config)
        model.features.measure(training.features_NF)
        model.logits.measure(training.logits_NL)
        return _fit(model.to(device), training, validation, config=config, loss=loss)


def _fit(
    model: SequenceModel,
    training: StudyFeatures,
    validation: StudyFeatures,
    *,
    config: SequenceConfig,
    loss: LossConfig,
) -> SequenceResult:
    studies, started_s = len(training.count_B), time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    steps = config.epochs * math.ceil(studies / STUDIES_A_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    cnn_loss = best_loss = _score(validation.logits_NL, validation, METRIC)
    best_epoch, best = 0, _copy_weights(model)
    history = [_describe_epoch(0, 0.0, _score(training.logits_NL, training, loss), cnn_loss, started_s)]
    with Progress(config.epochs * studies, what=f"sequence model ({config.kind})", unit="studies") as progress:
        for epoch in range(1, config.epochs + 1):
            rate = optimizer.param_groups[0]["lr"]
            train_loss = _train_epoch(model, training, optimizer, schedule, loss, progress)
            if not math.isfinite(train_loss):
                raise IchorError(
                    f"train: the sequence model's loss became {train_loss} in epoch {epoch}; lower "
                    f"train.sequence.learning_rate (now {config.learning_rate})"
                )
            valid_loss = _score(_predict(model, validation), validation, METRIC)
            progress.advance(0, f"epoch {epoch}/{config.epochs}, valid {valid_loss:.4f}, CNN alone {cnn_loss:.4f}")
            history.append(_describe_epoch(epoch, rate, train_loss, valid_loss, started_s))
            if valid_loss < best_loss:
                best_epoch, best_loss, best = epoch, valid_loss, _copy_weights(model)
    return SequenceResult(best, best_epoch, best_loss, cnn_loss, pd.DataFrame(history))


def _describe_epoch(
    epoch: int, rate: float, train_loss: float, valid_loss: float, started_s: float
) -> dict[str, float]:
    return {
        "epoch": epoch,
        "learning_rate": rate,
        "train_loss": train_loss,
        "valid_loss": valid_loss,
        "seconds": round(time.monotonic() - started_s, 1),
    }


def _train_epoch(
    model: SequenceModel,
    training: StudyFeatures,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loss: LossConfig,
    progress: Progress,
) -> float:
    """Each study once, in batches; the mean loss of a slice."""
    model.train()
    device = model.head.weight.device
    order_B = torch.randperm(len(training.count_B)).numpy()
    loss_sum = torch.zeros((), device=device)
    for first in range(0, len(order_B), STUDIES_A_BATCH):
        chosen_B = order_B[first : first + STUDIES_A_BATCH]
        reversed_B = (torch.rand(len(chosen_B)) < 0.5).numpy()
        batch = gather_studies(training, chosen_B, device=device, reversed_B=reversed_B)
        loss_value = hemorrhage_loss(batch.correct(model), batch.labels_BSL[batch.mask_BS], loss)
        optimizer.zero_grad(set_to_none=True)
        loss_value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        loss_sum += loss_value.detach() * int(training.count_B[chosen_B].sum())
        progress.advance(len(chosen_B), progress.note)
    return loss_sum.item() / int(training.count_B.sum())


def predict_sequence(
    weights: dict[str, Tensor], studies: StudyFeatures, *, config: SequenceConfig, device: torch.device
) -> npt.NDArray[np.float32]:
    """Corrected logits [N, L] of every row of `studies`, by weights that `fit_sequence` gave with the same `config`."""
    with torch.random.fork_rng(devices=[]):  # weights are drawn, only to be replaced
        model = SequenceModel(len(weights["features.mean"]), config)
    model.load_state_dict(weights)
    return _predict(model.to(device), studies)


@torch.inference_mode()
def _predict(model: SequenceModel, studies: StudyFeatures) -> npt.NDArray[np.float32]:
    model.eval()
    logits_NL = studies.logits_NL.astype(np.float32)
    by_length = np.argsort(studies.count_B, kind="stable")  # little padding
    for first in range(0, len(by_length), PREDICTED_AT_ONCE):
        chosen_B = by_length[first : first + PREDICTED_AT_ONCE]
        batch = gather_studies(studies, chosen_B, device=model.head.weight.device)
        logits_NL[batch.rows_BS[batch.mask_BS.cpu().numpy()]] = batch.correct(model).cpu().numpy()
    return logits_NL


def gather_studies(
    studies: StudyFeatures,
    chosen_B: npt.NDArray[np.int64],
    *,
    device: torch.device,
    reversed_B: npt.NDArray[np.bool_] | None = None,
) -> Padded:
    """Put studies beside each other on the device; a study's last row stands in for what it lacks."""
    first_B1, count_B1 = studies.first_B[chosen_B, None], studies.count_B[chosen_B, None]
    place_BS = np.arange(count_B1.max())[None, :]
    mask_BS = place_BS < count_B1
    place_BS = np.minimum(place_BS, count_B1 - 1)
    if reversed_B is not None:
        place_BS = np.where(reversed_B[:, None], count_B1 - 1 - place_BS, place_BS)
    rows_BS = first_B1 + place_BS
    arrays = (studies.features_NF, studies.logits_NL, studies.position_mm_N)
    features, logits, position_mm = (torch.from_numpy(array[rows_BS]).to(device) for array in arrays)
    labels = torch.from_numpy(studies.labels_NL[rows_BS]).to(device)
    return Padded(features, logits, position_mm, torch.from_numpy(mask_BS).to(device), labels, rows_BS)


def _score(logits_NL: npt.NDArray[np.float32], studies: StudyFeatures, loss: LossConfig) -> float:
    return hemorrhage_loss(torch.tensor(logits_NL), torch.tensor(studies.labels_NL), loss).item()


def _copy_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: copy.deepcopy(value.detach().cpu()) for name, value in model.state_dict().items()}


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Draws that depend on the seed alone inside, and the random state as it was outside."""
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None  # fork_rng cannot keep this one
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)
