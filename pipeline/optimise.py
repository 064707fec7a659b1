"""How weights move: the learning rate over a run, what decays, the moving average, and mixed slices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); weight decay on weights alone: on biases and norms it only fights what they are for."""
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    is_cuda = next(network.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=is_cuda)


def learning_rate_at(step: int, *, steps_an_epoch: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017, SGDR, without restarts), or a step down after
    each epoch.

    Args:
        step: of the optimiser, from 0.
        steps_an_epoch: how many make an epoch.
        config: `learning_rate` is the peak; `schedule`, `step_decay`, `warmup_epochs`, `epochs`.
    """
    warmup_steps = int(config.warmup_epochs * steps_an_epoch)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    if config.schedule == "step":
        return config.learning_rate * config.step_decay ** (step // steps_an_epoch)
    steps = steps_an_epoch * config.epochs
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class MovingAverage:
    """Exponential moving average of a network's weights, kept in another network.

    Args:
        mean: the network that holds it; its tensors stay the same ones.
        now: the network that learns.
    """

    def __init__(self, mean: nn.Module, now: nn.Module) -> None:
        pairs = list(zip(mean.state_dict().values(), now.state_dict().values(), strict=True))
        self.floats = [pair for pair in pairs if pair[0].dtype.is_floating_point]
        self.counters = [pair for pair in pairs if not pair[0].dtype.is_floating_point]

    @torch.no_grad()
    def update(self, *, step: int, decay: float) -> None:
        """Move towards the weights as they are; at first faster, as the first weights are noise."""
        decay = min(decay, (1 + step) / (10 + step))
        # one kernel for all of them: an EfficientNet has hundreds, and each launch would cost a GPU more than its arithmetic
        torch._foreach_lerp_([mean for mean, _ in self.floats], [now for _, now in self.floats], 1 - decay)
        if self.counters:
            torch._foreach_copy_([mean for mean, _ in self.counters], [now for _, now in self.counters])


def draw_mixup(alpha: float, *, seed: int, epoch: int, batch: int) -> float:
    """The share that a slice keeps beside another one (Zhang et al. 2018, mixup): at least a half, of Beta(alpha, alpha); 1
    where mixup is off. A function of its arguments alone, so that a resumed run draws the same."""
    if not alpha:
        return 1.0
    share = float(np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch, batch)))).beta(alpha, alpha))
    return max(share, 1 - share)


def mix(slices_NXRC: Tensor, share: float) -> Tensor:
    """Each slice with its opposite in the batch; the loss is to be shared between both slices' labels alike."""
    return slices_NXRC.lerp(slices_NXRC.flip(0), 1 - share) if share < 1 else slices_NXRC
