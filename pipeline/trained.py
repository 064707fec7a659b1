"""A run's trained networks, read from the files that `stages.train` left."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint import MODEL_FORMAT
from pipeline.config import Window, differences
from pipeline.device import choose_device
from pipeline.errors import CheckpointError, StoreError
from pipeline.model import SliceNet, build_model
from pipeline.store import Store
from pipeline.survey import find_crop, measure_scope

MODEL_FILE = "model.pt"

NEEDED = {"members", "sequence", "windows", "image_size", "params", "fold", "store_digest"}
"""What a model's file must hold."""

NEEDED_PARAMS = {"model", "neighbours", "dropout", "batch_size", "test_flips", "precision", "sequence"}

SAME = ("windows", "image_size", "params", "store_digest")
"""What the folds of one run have in common."""


@dataclass(frozen=True)
class FoldNetworks:
    """The networks of one fold, ready to look."""

    fold: int
    sha256: str
    """Of its file."""
    networks: list[SliceNet]
    """Whose logits are averaged."""
    sequence: dict[str, Tensor] | None
    origin: dict[str, Any]
    """The store, code and torch that it was trained with."""


@dataclass(frozen=True)
class Model:
    """All folds of one run, and what they want to see."""

    folds: list[FoldNetworks]
    params: dict[str, Any]
    windows: dict[str, Window]
    image_size: int
    crop: str
    scope: Mapping[str, Sequence[float] | None]
    """Lowest and highest of each of `SCOPE` in training; None where no study told."""
    phantom: bool
    """Whether it learnt from the made-up cohort alone."""
    device: torch.device

    @property
    def digest(self) -> str:
        """The first 12 digits of each file's SHA-256."""
        return "+".join(fold.sha256[:12] for fold in self.folds)

    def describe(self) -> dict[str, Any]:
        """Plain values for people and programs."""
        return {
            "digest": self.digest,
            "folds": [{"fold": fold.fold, "sha256": fold.sha256, **fold.origin} for fold in self.folds],
            "name": self.params["model"],
            "image_size": self.image_size,
            "crop": self.crop,
            "windows": {name: window.model_dump() for name, window in self.windows.items()},
            "trained_on": {name: list(found) if found else None for name, found in self.scope.items()},
        }


def find_models(path: Path, folds: Sequence[int] | None = None) -> list[Path]:
    """The files of a run's folds, or of the one that is named.

    Args:
        path: a ``model.pt``, a fold's folder, or the folder of all folds.
        folds: only these, if they are of the run: others may be left of an earlier one.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file():
        return [path]
    found = [path / MODEL_FILE] if (path / MODEL_FILE).is_file() else sorted(path.glob(f"fold-*/{MODEL_FILE}"))
    if folds is not None:
        found = [file for file in found if file.parent.name in [f"fold-{fold}" for fold in folds]]
    if not found:
        raise CheckpointError(
            f"{path}: no model; run `python -m stages.train` (or `dvc repro`) first, or give --model a {MODEL_FILE}, or a "
            f"folder with one or with fold-K/{MODEL_FILE} in it"
        )
    return found


def read_model(paths: Sequence[Path], *, device: str, store: Path) -> Model:
    """Read the folds of one run.

    Args:
        paths: of `find_models`.
        device: `auto`, or torch's name of a device.
        store: the training store, asked only where a model does not itself hold what it was trained on.

    Raises:
        CheckpointError: a file is damaged or of another format, two folds are not of one run, or the store is another one.
    """
    contents = [_read_file(path) for path in paths]
    first = contents[0]
    for path, content in zip(paths, contents, strict=True):
        for key in SAME:
            for name, (found, expected) in differences(content[key], first[key], key).items():
                raise CheckpointError(
                    f"{path}: made with {name} = {found!r}, {paths[0]} with {expected!r}; folds of two runs are not averaged: "
                    f"give --model one of them, or train them again"
                )
    _require_each_once(paths, contents)
    chosen = choose_device(device)
    crop, scope = _what_it_saw(first, paths[0], store)
    return Model(
        folds=[_make_fold(path, content, chosen) for path, content in zip(paths, contents, strict=True)],
        params=first["params"],
        windows={name: Window(**window) for name, window in first["windows"].items()},
        image_size=first["image_size"],
        crop=crop,
        scope=scope,
        phantom=bool(first.get("phantom")),
        device=chosen,
    )


def _require_each_once(paths: Sequence[Path], contents: Sequence[dict[str, Any]]) -> None:
    """A copy of a fold's folder beside it would count twice."""
    seen: dict[int, Path] = {}
    for path, content in zip(paths, contents, strict=True):
        twin = seen.setdefault(content["fold"], path)
        if twin != path:
            raise CheckpointError(
                f"{path}: holds fold {content['fold']}, as {twin} does, which would count twice; move one of them away"
            )


def _read_file(path: Path) -> dict[str, Any]:
    if path.is_file() and not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: not a model, nor a whole file of torch.save; expected a {MODEL_FILE} of stages.train"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # on damaged bytes torch.load raises what it stumbles on: struct.error, AssertionError ...
    except Exception as error:
        first_line = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise CheckpointError(f"{path}: cannot be read as a model ({first_line}); train it again") from None
    lacks = _say_what_it_lacks(content)
    if lacks:
        raise CheckpointError(f"{path}: not a model that stages.train made ({lacks}); train it again with this version")
    if content.get("format", MODEL_FORMAT) != MODEL_FORMAT:
        raise CheckpointError(
            f"{path}: a model of format {content['format']!r}, this version reads {MODEL_FORMAT}; train it again"
        )
    found: dict[str, Any] = content
    return found


def _say_what_it_lacks(content: Any) -> str:
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}"
    params = content.get("params")
    missing = NEEDED - set(content) or NEEDED_PARAMS - set(params if isinstance(params, dict) else {})
    if missing:
        return f"it lacks {', '.join(sorted(missing))}"
    has_sequence = isinstance(content["sequence"], dict) and "features.mean" in content["sequence"]
    is_wanted = content["params"]["sequence"]["kind"] != "none"
    return "it lacks the weights of its sequence model" if is_wanted and not has_sequence else ""


def _make_fold(path: Path, content: dict[str, Any], device: torch.device) -> FoldNetworks:
    params = content["params"]
    channels = len(content["windows"]) * (2 * params["neighbours"] + 1)
    networks = []
    for weights in content["members"]:
        network = build_model(params["model"], channels=channels, dropout=params["dropout"])
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(
                f"{path}: its weights do not fit {params['model']} as it is now ({str(error).splitlines()[-1].strip()[:160]}); "
                f"train it again"
            ) from None
        # channels_last, as in training: another order of sums would change the last digits
        networks.append(network.to(device, memory_format=torch.channels_last).eval())  # type: ignore[call-overload]
    origin = {key: content.get(key) for key in ("store_digest", "folds_digest", "code", "torch")}
    return FoldNetworks(
        content["fold"], hashlib.sha256(path.read_bytes()).hexdigest(), networks, content["sequence"], origin
    )


def _what_it_saw(content: dict[str, Any], path: Path, store: Path) -> tuple[str, Mapping[str, Sequence[float] | None]]:
    """How the training studies were cut out, and their ranges: of the model, or else of its store."""
    if "scope" in content:
        return content["crop"], content["scope"]
    try:
        opened = Store(store)
    except StoreError as error:
        raise CheckpointError(
            f"{path} does not hold what it was trained on, and its store cannot be asked: {error}"
        ) from None
    if opened.digest != content["store_digest"]:
        raise CheckpointError(
            f"{path}: trained on store {content['store_digest'][:12]}, and {store} is {opened.digest[:12]}; give --data the "
            f"folder of the store that it was trained on, or train it again"
        )
    return find_crop(opened), measure_scope(opened)
