"""Where the folds' own networks looked in the slices of the gallery: each slice is asked of the networks that never learnt from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.config import Config, differences
from pipeline.errors import CheckpointError, IchorError
from pipeline.gallery import Chosen
from pipeline.metrics import Scored
from pipeline.store import Store

if TYPE_CHECKING:
    from pipeline.trained import Model

Heats = dict[tuple[int, int], npt.NDArray[np.float32]]
"""Of a row and a label: float32 [R, C] in 0…1."""


def explain(
    config: Config,
    store: Store,
    chosen: Sequence[Chosen],
    slices: Scored,
    where_N2: npt.NDArray[np.int64],
    *,
    train: Path,
) -> tuple[Heats, list[str]]:
    """Heat maps of the chosen slices, each by the networks of the fold that held it out.

    Args:
        config: the parameters of the run.
        store: what the folds were trained on.
        chosen: the slices, and which label to explain in each.
        slices: the held-out slices.
        where_N2: study and slice number of each.
        train: the folder with `fold-K/` inside.

    Returns:
        The maps, and a line for each fold whose networks cannot be asked: its slices have none.

    Raises:
        DamageError: a slice cannot be read.
    """
    # Only here: torch takes seconds to load, and `--show`, `--help` and the scores themselves do without it.
    from pipeline.gradcam import explain_slices

    heats: Heats = {}
    faults = []
    for fold in np.unique([slices.fold_N[one.row] for one in chosen]):
        wanted = sorted({(one.row, one.label) for one in chosen if slices.fold_N[one.row] == fold})
        row_N, label_N = np.array(wanted).T
        try:
            model = _read_networks(config, store, int(fold), train=train)
        except IchorError as error:
            faults.append(str(error).replace(f"{train}/", ""))  # a folder's name may be a person's
            continue
        maps = explain_slices(
            model.folds[0].networks,
            store.reader,
            where_N2[row_N],
            label_N,
            neighbours=model.params["neighbours"],
            device=model.device,
        )
        heats |= dict(zip(wanted, maps, strict=True))
    return heats, faults


def _read_networks(config: Config, store: Store, fold: int, *, train: Path) -> Model:
    """A fold's networks, on the CPU: they are asked of a few slices, and a GPU would draw its own last digits.

    Raises:
        CheckpointError: they are missing, damaged, or of another run.
    """
    from pipeline.trained import MODEL_FILE, read_model

    path = train / f"fold-{fold}" / MODEL_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no model; train fold {fold} again")
    model = read_model([path], device="cpu", store=store.path)
    found = model.folds[0]
    others = differences(model.params, config.train.shaping())
    if (found.fold, found.origin["store_digest"]) != (fold, store.digest) or others:
        raise CheckpointError(f"{path}: not of the run that left fold {fold}'s predictions; train it again")
    return model
