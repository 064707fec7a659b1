"""Where in a slice a network saw what it says: Grad-CAM (Selvaraju et al. 2017).

A heat map is of one label, of the CNN alone: what the sequence model adds comes from other slices. It is as coarse as the network's
last feature map (a sixteenth of the rows and columns in ours, a thirty-second in most backbones), and it is an explanation of the
network, not a segmentation of the bleed.
Axes: N slices, X input channels, R rows, C columns, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.inference import scale
from pipeline.labels import LABELS, UNKNOWN
from pipeline.loader import SliceDataset, name_batches
from pipeline.model import SliceNet
from pipeline.reader import SliceReader

BATCH = 16
"""Slices at once: the whole network's features are kept for the gradient."""

HeatMaps = npt.NDArray[np.float32]
"""float32 [slice, row, column] in 0…1, 1 where that slice's map is highest; all 0 where nothing speaks for the label."""


def explain_slices(
    networks: Sequence[SliceNet],
    reader: SliceReader,
    slices_N2: npt.NDArray[np.int64],
    label_N: npt.NDArray[np.int64],
    *,
    neighbours: int,
    device: torch.device,
) -> HeatMaps:
    """Heat maps of slices of a store, each for one label.

    Args:
        networks: in evaluation mode, on the device; their maps are averaged.
        reader: of the store's shards.
        slices_N2: study and slice number of each.
        label_N: index in `LABELS` of what to explain, one a slice.
        neighbours: slices on either side that the networks were trained to see.
        device: where the networks are.

    Raises:
        DamageError: a slice cannot be read; study and slice are named.
    """
    unknown_NL = np.full((len(slices_N2), len(LABELS)), UNKNOWN, np.int8)
    dataset = SliceDataset(reader, slices_N2, unknown_NL, neighbours=neighbours)
    maps = [np.zeros((0, *reader.shape[:2]), np.float32)]
    for name in name_batches(np.arange(len(slices_N2)), batch_size=BATCH):
        slices_NXRC = scale(dataset[name].slices_NRCX.to(device))
        summed_NRC = sum(grad_cam(network, slices_NXRC, label_N[name.numbers]) for network in networks)
        maps.append(_to_unit(torch.as_tensor(summed_NRC)).cpu().numpy())
    return np.concatenate(maps)


def grad_cam(network: SliceNet, slices_NXRC: Tensor, label_N: npt.NDArray[np.int64]) -> Tensor:
    """Grad-CAM of the network's last feature map, for one label a slice.

    Args:
        network: in evaluation mode.
        slices_NXRC: float, in 0…1.
        label_N: index of each slice's label.

    Returns:
        float32 [N, R, C], 0 or more, of the logit's own scale; as large as the slices, smoothly enlarged.
    """
    seen: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda _m, _i, out: _keep_last(seen, out)) for module in network.modules()]
    try:
        with torch.enable_grad():
            logits_NL = network(slices_NXRC.detach().requires_grad_())
            chosen_N = logits_NL[torch.arange(len(label_N)), torch.as_tensor(label_N)]
            (gradient_NFRC,) = torch.autograd.grad(chosen_N.sum(), seen)
    finally:
        for hook in hooks:
            hook.remove()
    weights_NF11 = gradient_NFRC.mean((2, 3), keepdim=True)
    coarse_N1RC = functional.relu((weights_NF11 * seen[0].detach()).sum(1, keepdim=True))
    return functional.interpolate(coarse_N1RC, slices_NXRC.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def _keep_last(seen: list[Tensor], output: Any) -> None:
    """Keep the latest output that still has rows and columns: the last feature map, whatever the network calls it."""
    if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
        seen[:] = [output]


def _to_unit(maps_NRC: Tensor) -> Tensor:
    highest = maps_NRC.amax((1, 2), keepdim=True)
    return torch.where(highest > 0, maps_NRC / highest.clamp_min(torch.finfo(maps_NRC.dtype).tiny), 0.0)
