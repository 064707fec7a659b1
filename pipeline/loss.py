"""The custom loss: the challenge's weighted multi-label log loss, from logits, with unknown labels masked."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import LossConfig
from pipeline.labels import ANY, LABEL_WEIGHTS, LABELS

METRIC = LossConfig(focal_gamma=0.0, label_smoothing=0.0, any_consistency=0.0, positive_weights=[1.0] * len(LABELS))
"""The challenge's metric itself: what validation is judged by, whatever the network learns from."""


def hemorrhage_loss(
    logits_NL: Tensor, labels_NL: Tensor, config: LossConfig, *, whole_NL: Tensor | None = None
) -> Tensor:
    """Weighted multi-label log loss, averaged over the known labels; as the options stand, equal to the RSNA 2019 metric.

    Args:
        logits_NL: float [slice, label].
        labels_NL: 1, 0, or −1 where unknown (left out); any number type.
        config: focal gamma (Lin et al. 2017), label smoothing, weights of the positives of each label, and `any_consistency`:
            the weight of a penalty on a subtype that is thought likelier than `any`.
        whole_NL: the labels of the whole batch, on the CPU, where the others are one process's share of it: the shares' losses
            then add up to the batch's, however the labels are dealt.

    Returns:
        A scalar; 0 with a gradient of 0 where no label is known.
    """
    logits_NL = logits_NL.float()
    whole_NL = labels_NL if whole_NL is None else whole_NL
    weights_L = _on_device(LABEL_WEIGHTS, logits_NL.device)
    known_NL = (labels_NL >= 0).float()
    target_NL = labels_NL.clamp(min=0).float()
    if config.label_smoothing:
        target_NL = target_NL * (1 - config.label_smoothing) + 0.5 * config.label_smoothing
    positive_weights_L = _on_device(tuple(config.positive_weights), logits_NL.device).to(logits_NL)
    loss_NL = F.binary_cross_entropy_with_logits(logits_NL, target_NL, pos_weight=positive_weights_L, reduction="none")
    if config.focal_gamma:
        # where nothing is missed any more, a gamma below 1 would have an infinite slope
        missed_NL = (target_NL - logits_NL.sigmoid()).abs().clamp(min=1e-6)
        loss_NL = loss_NL * missed_NL**config.focal_gamma
    known_weight = ((whole_NL >= 0).float() @ _on_device(LABEL_WEIGHTS, whole_NL.device)).sum().clamp(min=1e-12)
    loss = (loss_NL * known_NL * weights_L).sum() / known_weight
    if config.any_consistency:
        probability_NL = logits_NL.sigmoid()
        excess_NL = (probability_NL[:, :ANY] - probability_NL[:, ANY:]).clamp(min=0) * known_NL.amax(
            dim=1, keepdim=True
        )
        slices = (whole_NL >= 0).any(dim=1).sum().clamp(min=1)
        loss = loss + config.any_consistency * excess_NL.mean(dim=1).sum() / slices
    return loss


@lru_cache(maxsize=16)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied there once: a copy in every batch would make a GPU wait."""
    return torch.tensor(values, device=device)
