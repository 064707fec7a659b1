"""Heat maps of a store's slices, when they are asked for: the report's gallery asks for all at once, the viewer one by one.

torch and the networks are loaded with the first map: who only looks at slices or scores waits for neither. All of it runs on the CPU:
a viewer beside a running training takes nothing of its GPU, and a report's maps are the same wherever it is made.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.config import Config, differences
from pipeline.errors import CheckpointError, IchorError
from pipeline.gallery import Chosen
from pipeline.held_out import Scored
from pipeline.store import Store

if TYPE_CHECKING:
    from pipeline.trained import Model

Key = TypeVar("Key")
Value = TypeVar("Value")

KEPT_BYTES = 64 << 20
"""Of maps: 4,096 at 128 × 128, the studies of an hour's reading."""

MODELS_KEPT = 6
"""Five folds and their mean."""

Heat = npt.NDArray[np.uint8]
"""uint8 [row, column], 255 where the map is highest; all 0 where nothing speaks for the label."""

GalleryHeat = dict[tuple[int, int], npt.NDArray[np.float32]]
"""Of a row and a label: float32 [R, C] in 0…1."""


def explain_chosen(
    config: Config,
    store: Store,
    chosen: Sequence[Chosen],
    slices: Scored,
    where_N2: npt.NDArray[np.int64],
    *,
    train: Path,
) -> tuple[GalleryHeat, list[str]]:
    """Heat maps of the gallery's slices, each by the networks of the fold that held it out.

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
    heats: GalleryHeat = {}
    faults = []
    for fold in np.unique([slices.fold_N[one.row] for one in chosen]):
        wanted = sorted({(one.row, one.label) for one in chosen if slices.fold_N[one.row] == fold})
        row_N, label_N = np.array(wanted).T
        try:
            model = read_networks(store, [int(fold)], train=train)
            _require_same_run(model, config, train / f"fold-{fold}")
        except IchorError as error:
            faults.append(str(error).replace(f"{train}/", ""))  # a folder's name may be a person's
            continue
        heats |= dict(zip(wanted, _explain(model, store, where_N2[row_N], label_N), strict=True))
    return heats, faults


def read_networks(store: Store, folds: Sequence[int], *, train: Path) -> Model:
    """The networks of some folds that were trained on a store.

    Raises:
        CheckpointError: they are missing, damaged, of another fold, or trained on another store.
    """
    from pipeline.trained import MODEL_FILE, read_model

    paths = [train / f"fold-{fold}" / MODEL_FILE for fold in folds]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path}: not there, and heat maps need the networks; run `dvc repro` to train them")
    model = read_model(paths, device="cpu", store=store.path)
    for path, expected, found in zip(paths, folds, model.folds, strict=True):
        digest = str(found.origin["store_digest"])
        if digest != store.digest:
            raise CheckpointError(
                f"{path}: trained on store {digest[:12]}, and this is {store.digest[:12]}; run `dvc repro`"
            )
        if found.fold != expected:
            raise CheckpointError(f"{path}: expected fold {expected}, found {found.fold}; train it again")
    return model


def _require_same_run(model: Model, config: Config, folder: Path) -> None:
    if differences(model.params, config.train.shaping()):
        raise CheckpointError(f"{folder}/model.pt: not of the run that left the fold's predictions; train it again")


def _explain(
    model: Model, store: Store, slices_N2: npt.NDArray[np.int64], label_N: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """float32 [N, R, C]: the mean over all networks of all folds of the model."""
    from pipeline.gradcam import explain_slices

    return explain_slices(
        [network for fold in model.folds for network in fold.networks],
        store.reader,
        slices_N2,
        label_N,
        neighbours=model.params["neighbours"],
        device=model.device,
    )


class HeatMaps:
    """Makes the maps, and keeps the latest; may be asked from many threads.

    Args:
        store: of the slices.
        train: folder of the folds that were trained on it.
    """

    def __init__(self, store: Store, train: Path) -> None:
        self.store, self.train = store, train
        self.lock = threading.Lock()
        """Held while a map is made: two at once would only take the cores from one another."""
        self._maps: dict[tuple[int, int, int], Heat] = {}
        self._models: dict[tuple[int, ...], Model] = {}

    def make(self, study: int, slice_number: int, label: int, *, folds: tuple[int, ...]) -> Heat:
        """The map of one slice for one label, by the networks of these folds, averaged.

        Raises:
            CheckpointError: a fold's networks are missing, damaged, or trained on another store.
            DamageError: the slice or a neighbour cannot be read.
        """
        place = study, slice_number, label
        kept = self._maps.get(place)  # without the lock: what is kept does not wait for what is being made
        if kept is not None:
            return kept
        with self.lock:
            if place not in self._maps:
                heat = self._explain(study, slice_number, label, self._load(folds))
                _keep(self._maps, place, heat, most=max(1, KEPT_BYTES // heat.nbytes))
            return self._maps[place]

    def _explain(self, study: int, slice_number: int, label: int, model: Model) -> Heat:
        with _one_core_spared():
            (heat_RC,) = _explain(model, self.store, np.array([[study, slice_number]]), np.array([label]))
        return np.rint(heat_RC * 255).astype(np.uint8)

    def _load(self, folds: tuple[int, ...]) -> Model:
        if folds not in self._models:
            _keep(self._models, folds, read_networks(self.store, folds, train=self.train), most=MODELS_KEPT)
        return self._models[folds]


@contextmanager
def _one_core_spared() -> Iterator[None]:
    """The browser needs one to draw: threads that waited for one another and for it took 100 ms for a map, not 5 (two cores)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _keep(kept: dict[Key, Value], key: Key, value: Value, *, most: int) -> None:
    """Put a value in; the oldest go."""
    kept[key] = value
    while len(kept) > most:
        del kept[next(iter(kept))]
