"""What a network says of slices: uint8 to the device, scaled there; both mirror images; features for the sequence model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.loader import Batch
from pipeline.model import SliceNet


class Seen(NamedTuple):
    """What a network says of N slices, on the CPU."""

    logits_NL: npt.NDArray[np.float32]
    features_NF: npt.NDArray[np.float16]
    """[N, 0] where features were not asked for."""


def to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Hand batches on as they lie on the device.

    For a GPU the copy runs in a stream of its own: the host is batches ahead of the GPU, so that a batch is copied while
    the one before is worked on.
    """
    if device.type != "cuda":
        for batch in batches:
            yield Batch(batch.slices_NRCX.to(device), batch.labels_NL.to(device))
        return
    copying, working = _copying_stream(device), torch.cuda.current_stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            here = Batch(batch.slices_NRCX.to(device, non_blocking=True), batch.labels_NL.to(device, non_blocking=True))
        working.wait_stream(copying)
        for tensor in (here.slices_NRCX, here.labels_NL):
            tensor.record_stream(working)  # else its memory might be used again while it is still read
        yield here


@lru_cache(maxsize=1)
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the whole run: memory that was freed serves its own stream alone."""
    return torch.cuda.Stream(device)


def scale(slices_NRCX: Tensor) -> Tensor:
    """uint8 [N, R, C, X] as it lies in the store → float [N, X, R, C] in 0…1, in memory as it was: channels last."""
    return slices_NRCX.permute(0, 3, 1, 2).float().div_(255)


@torch.inference_mode()
def predict(
    network: SliceNet,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    precision: torch.dtype | None,
    flips: bool,
    with_features: bool = False,
) -> Seen:
    """Logits, and the features they were made from, of slices in their order.

    Args:
        network: in evaluation mode, on the device.
        batches: of the loader.
        device: where the network is.
        precision: for autocast, or None.
        flips: whether to take the mean with each slice's mirror image, left to right.
        with_features: whether they are wanted too.
    """
    logits = [torch.empty(0, network.head.out_features, device=device)]
    features = [torch.empty(0, network.feature_size, device=device).half()]
    for batch in to_device(batches, device):
        slices_NXRC = scale(batch.slices_NRCX)
        views = [slices_NXRC, slices_NXRC.flip(3)] if flips else [slices_NXRC]
        with torch.autocast(device.type, precision, enabled=precision is not None):
            features_NF = torch.stack([network.features(view) for view in views]).float().mean(0)
            logits.append(network.logits(features_NF))
        if with_features:
            features.append(features_NF.half())
    # taken off the device at the end: each batch by itself would make it wait
    return Seen(torch.cat(logits).cpu().numpy(), torch.cat(features).cpu().numpy())
