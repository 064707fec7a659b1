"""One fold, from the store to its predictions: the CNN, the sequence model over a study's slices, and what both say.

The held-out patients are predicted by this fold alone; studies without any label are predicted by every fold, and evaluation
takes the mean.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from pipeline import (
    augment,
    device,
    folds,
    inference,
    labels,
    loader,
    loss,
    model,
    optimise,
    parts,
    processes,
    sequence,
    trainer,
)
from pipeline.config import Config
from pipeline.errors import ConfigError, IchorError
from pipeline.folds import FoldTable
from pipeline.inference import Seen
from pipeline.labels import LABELS
from pipeline.model import refuse_leak
from pipeline.parts import HELD_OUT, TRAINING, VALIDATION, split_slices
from pipeline.processes import Processes
from pipeline.sequence import SequenceResult, StudyFeatures, fit_sequence, predict_sequence
from pipeline.store import Store
from pipeline.trainer import Slices, Trainer, Weights

SHAPING = (
    augment, device, folds, inference, labels, loader, loss, model, optimise, parts, processes, sequence, trainer
)  # fmt: skip
"""The code that decides the weights and what they say."""


@dataclass(frozen=True)
class FoldResult:
    """What training a fold gives."""

    members: list[Weights]
    """The CNN's, whose logits are averaged; mostly one."""
    sequence: SequenceResult | None
    predictions: pd.DataFrame
    """Of the held-out slices."""
    unlabelled: pd.DataFrame
    """Of the slices of studies without any label."""
    history: pd.DataFrame
    summary: dict[str, Any]


def train_fold(
    config: Config,
    store: Store,
    fold: int,
    table: FoldTable,
    *,
    wip: Path,
    processes: Processes | None = None,
    live: Path | None = None,
) -> FoldResult | None:
    """Train one fold, or go on with it, and predict its held-out slices.

    Args:
        config: the parameters.
        store: the opened store.
        fold: its number.
        table: which patient is in which fold.
        wip: folder for checkpoints; the fold's own is below it.
        processes: the others that share the work; None for this one alone.
        live: the project's folder of live curves, or None.

    Returns:
        None in all but the first of several processes.

    Raises:
        IchorError: too few patients or labels, a loss that is no number, no more memory, or a device that is not there.
        CheckpointError: an unfinished run of this fold had other parameters, another store or other code.
    """
    processes = processes or Processes()
    slices = split_slices(config, store, fold, table)
    identity = {**describe_run(config, store, fold), "folds_digest": slices.digest}
    if isinstance(config.train.pretrained, str):
        refuse_leak(config.train.pretrained, identity)
    folder = wip / f"fold-{fold}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run = Trainer(
            config.train,
            store,
            slices,
            identity=identity,
            folder=folder,
            processes=processes,
            live=live if processes.is_first else None,
        )
        run.run()
        return _finish(config, run, processes)
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(config, error) from None
    except RuntimeError as error:
        # imported here: it takes a second and a half, which a refusal need not wait for
        from torch._dynamo.exc import TorchDynamoException

        if not isinstance(error, TorchDynamoException):
            raise
        first_line = str(error).strip().splitlines()[0][:160]
        raise ConfigError(
            f"train.compile = true: the network cannot be compiled here ({type(error).__name__}: {first_line}); set it to false, or "
            f"install a C++ compiler such as g++"
        ) from None


def describe_run(config: Config, store: Store, fold: int) -> dict[str, Any]:
    """All that decides a fold's weights; plain values, so that a checkpoint can hold and compare it."""
    digest = hashlib.sha256()
    for module in SHAPING:
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return {
        "fold": fold,
        "store_digest": store.digest,
        "params": config.train.shaping(),
        "folds_params": config.folds.model_dump(),
        "torch": str(torch.__version__),
        "code": digest.hexdigest()[:16],
    }


def _finish(config: Config, run: Trainer, processes: Processes) -> FoldResult | None:
    """Predict what was held out, through the sequence model where there is one."""
    slices = run.slices
    wanted = np.concatenate([slices.held_out, slices.unlabelled])
    is_held_out = np.arange(len(wanted)) < len(slices.held_out)
    found: SequenceResult | None = None
    if config.train.sequence.kind == "none":
        logits_NL = run.see_slices(wanted).logits_NL
        if not processes.is_first:
            return None
    else:
        groups = [_whole_studies(run.store, part) for part in (slices.training, slices.validation, wanted)]
        seen = run.see_slices(np.concatenate(groups), with_features=True)
        if not processes.is_first:
            return None
        training, validation, rest = _gather_studies(run, groups, seen)
        found = fit_sequence(
            training,
            validation,
            config=config.train.sequence,
            loss=config.train.loss,
            seed=config.train.seed,
            device=run.device,
        )
        rows = _find_rows(groups[2], wanted)
        logits_NL = predict_sequence(found.weights, rest, config=config.train.sequence, device=run.device)[rows]
        alone_NL = rest.logits_NL[rows]
    alone = {} if found is None else {f"cnn_{name}": _sigmoid(alone_NL[:, k]) for k, name in enumerate(LABELS)}
    predictions = _tabulate(run, wanted, logits_NL, alone)
    return FoldResult(
        members=run.members,
        sequence=found,
        predictions=predictions[is_held_out],
        unlabelled=predictions[~is_held_out].reset_index(drop=True),
        history=pd.DataFrame(run.state.history),
        summary=_summarise(run, found),
    )


def _whole_studies(store: Store, slices: Slices) -> Slices:
    """Every slice of the studies that these slices are of, in order, unlabelled ones too."""
    study = np.unique(slices[:, 0])
    counts = store.num_slices[study]
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([np.repeat(study, counts), np.arange(counts.sum()) - first], axis=1)


def _gather_studies(run: Trainer, groups: list[Slices], seen: Seen) -> list[StudyFeatures]:
    """What the CNN saw, group by group, study by study."""
    store, ends = run.store, np.cumsum([len(group) for group in groups])
    gathered = []
    for group, end in zip(groups, ends, strict=True):
        rows = slice(end - len(group), end)
        study, slice_number = group.T
        count_B = np.unique(study, return_counts=True)[1]
        gathered.append(
            StudyFeatures(
                features_NF=seen.features_NF[rows],
                logits_NL=seen.logits_NL[rows],
                position_mm_N=store.position_mm[study, slice_number],
                labels_NL=store.labels[study, slice_number],
                first_B=np.cumsum(count_B) - count_B,
                count_B=count_B,
            )
        )
    return gathered


def _find_rows(table: Slices, wanted: Slices) -> npt.NDArray[np.int64]:
    """Where in a table of whole studies the wanted slices stand."""
    study, first = np.unique(table[:, 0], return_index=True)
    return np.asarray(first[np.searchsorted(study, wanted[:, 0])] + wanted[:, 1], np.int64)


def _sigmoid(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return torch.from_numpy(np.ascontiguousarray(logits)).sigmoid().numpy()


def _tabulate(
    run: Trainer, slices: Slices, logits_NL: npt.NDArray[np.float32], more: dict[str, npt.NDArray[np.float32]]
) -> pd.DataFrame:
    study, slice_number = slices.T
    probabilities_NL = _sigmoid(logits_NL)
    return pd.DataFrame(
        {
            "image_id": run.store.image_id[study, slice_number].astype(str),
            "study_uid": run.store.study[study].astype(str),
            "fold": np.full(len(study), run.identity["fold"], np.int16),
            **{name: probabilities_NL[:, number] for number, name in enumerate(LABELS)},
            **more,
        }
    )


def _summarise(run: Trainer, found: SequenceResult | None) -> dict[str, Any]:
    state, slices = run.state, run.slices
    return {
        **run.identity,
        "device": str(run.device),
        "processes": run.processes.count,
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in run.network.parameters()),
        "epochs": state.epoch,
        "best_epoch": state.best_epoch + 1,
        "best_valid_loss": state.best_loss,
        "sequence": {"best_epoch": found.best_epoch, "valid_loss": found.best_loss, "cnn_valid_loss": found.cnn_loss}
        if found
        else None,
        "seconds": round(state.seconds, 1),
        "train_slices": len(slices.training),
        "valid_slices": len(slices.validation),
        "held_out_slices": len(slices.held_out),
        "unlabelled_slices": len(slices.unlabelled),
        "train_patients": slices.patients[TRAINING],
        "valid_patients": slices.patients[VALIDATION],
        "held_out_patients": slices.patients[HELD_OUT],
    }


def _out_of_memory(config: Config, error: Exception) -> IchorError:
    train = config.train
    return IchorError(
        f"train: the device's memory is full ({' '.join(str(error).split())[:160]}). Lower train.batch_size (now "
        f"{train.batch_size}; raise train.accumulate to keep the same step), or preprocess.image_size, or take a smaller "
        f"train.model (now {train.model}); set train.precision to auto or bf16. The last checkpoint is kept"
    )
