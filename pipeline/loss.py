"""The custom loss: the challenge's weighted multi-label log loss, from logits, with unknown labels masked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import LossConfig
from pipeline.labels import ANY, LABEL_WEIGHTS


def hemorrhage_loss(logits_NL: Tensor, labels_NL: Tensor, config: LossConfig) -> Tensor:
    """Weighted multi-label log loss, averaged over the known labels; equal to the RSNA 2019 metric with all options at 0.

    Args:
        logits_NL: float [slice, label].
        labels_NL: 1, 0, or −1 where unknown (left out); any number type.
        config: focal gamma (Lin et al. 2017), label smoothing, and `any_consistency`: the weight of a penalty on a subtype
            that is thought likelier than `any`.

    Returns:
        A scalar; 0 with a gradient of 0 where no label is known.
    """
    logits_NL = logits_NL.float()
    known_NL = (labels_NL >= 0).float()
    target_NL = labels_NL.clamp(min=0).float()
    if config.label_smoothing:
        target_NL = target_NL * (1 - config.label_smoothing) + 0.5 * config.label_smoothing
    loss_NL = F.binary_cross_entropy_with_logits(logits_NL, target_NL, reduction="none")
    if config.focal_gamma:
        probability_NL = logits_NL.sigmoid()
        missed_NL = (target_NL - probability_NL).abs()
        loss_NL = loss_NL * missed_NL**config.focal_gamma
    weight_NL = known_NL * torch.tensor(LABEL_WEIGHTS, device=logits_NL.device)
    loss = (loss_NL * weight_NL).sum() / weight_NL.sum().clamp(min=1e-12)
    if config.any_consistency:
        probability_NL = logits_NL.sigmoid()
        excess_NL = (probability_NL[:, :ANY] - probability_NL[:, ANY:]).clamp(min=0)
        loss = loss + config.any_consistency * excess_NL.mean()
    return loss
