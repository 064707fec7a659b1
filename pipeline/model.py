"""The networks: a compact residual CNN of our own, and MONAI's backbones by name. Six logits a slice.

Ours uses GroupNorm, not BatchNorm: its sums do not depend on how a batch is split over processes, and it learns with the
small batches that a CPU can hold. MONAI takes five seconds to import, so it is imported only where it is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.labels import LABELS

WIDTHS = (32, 64, 128)
"""Channels of the levels, on a quarter, an eighth and a sixteenth of the rows and columns."""

STEM_KERNEL, STEM_STRIDE = 6, 4
"""The stem goes to a quarter at once: most of a convolution's cost is at full size, and a bleed spans many pixels."""

GROUP_WIDTH = 8
MEAN_GREY = 0.4
"""Brain is near the middle of its window: centred, it does not drown in the air around the head."""

PRIOR_LOGIT = -2.0
"""Start near the rates of real slices (12 %): else the first steps only learn that most slices are negative."""


class SqueezeExcite(nn.Module):
    """Weigh channels by what the whole slice shows (Hu et al. 2018, Squeeze-and-Excitation Networks)."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, 1),
            nn.SiLU(),
            nn.Conv2d(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, features_NCHW: Tensor) -> Tensor:
        return features_NCHW * self.gate(features_NCHW.mean((2, 3), keepdim=True))


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut (He et al. 2016), gated by squeeze-and-excitation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(outputs // GROUP_WIDTH, outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(outputs // GROUP_WIDTH, outputs),
            SqueezeExcite(outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.AvgPool2d(stride), nn.Conv2d(inputs, outputs, 1))
        self.activation = nn.SiLU()

    def forward(self, features_NCHW: Tensor) -> Tensor:
        summed: Tensor = self.body(features_NCHW) + self.shortcut(features_NCHW)
        return self.activation(summed)


class CompactCNN(nn.Module):
    """A small residual squeeze-and-excitation network that learns on a CPU.

    Args:
        channels: input channels: windows × slices seen at once.
        dropout: share of the pooled features dropped in training.
    """

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, WIDTHS[0], STEM_KERNEL, STEM_STRIDE, 1, bias=False),
            nn.GroupNorm(WIDTHS[0] // GROUP_WIDTH, WIDTHS[0]),
            nn.SiLU(),
        )
        inputs = (WIDTHS[0], *WIDTHS[:-1])
        self.levels = nn.Sequential(
            *(
                ResidualBlock(before, after, stride=1 if before == after else 2)
                for before, after in zip(inputs, WIDTHS, strict=True)
            )
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * WIDTHS[-1], len(LABELS))

    def forward(self, slices_NCHW: Tensor) -> Tensor:
        features_NCHW = self.levels(self.stem(slices_NCHW - MEAN_GREY))
        # The mean tells how much there is, the maximum whether there is a small one anywhere.
        pooled_NC = torch.cat([features_NCHW.mean((2, 3)), features_NCHW.amax((2, 3))], dim=1)
        logits_NL: Tensor = self.head(self.dropout(pooled_NC))
        return logits_NL


def build_model(name: str, *, channels: int, dropout: float, pretrained: bool = False) -> nn.Module:
    """Make a network with six logits.

    Args:
        name: one of `pipeline.config.MODELS`.
        channels: input channels.
        dropout: share dropped before the last layer, where the network has such a place.
        pretrained: start from weights that MONAI can fetch; needs the internet once.

    Returns:
        A module from float [slice, channel, row, column] in 0…1 to logits [slice, label].

    Raises:
        ConfigError: the name is unknown, or pretrained weights cannot be had.
    """
    if name == "compact":
        if pretrained:
            raise ConfigError("train.pretrained = true: the compact model has no pretrained weights; set it to false")
        model: nn.Module = CompactCNN(channels, dropout)
    else:
        try:
            model = _build_backbone(name, channels=channels, dropout=dropout, pretrained=pretrained)
        except OSError as error:
            raise ConfigError(
                f"train.pretrained = true: weights of {name} cannot be fetched ({error}); set it to false"
            ) from None
    for layer in reversed(list(model.modules())):
        if isinstance(layer, nn.Linear) and layer.out_features == len(LABELS):
            nn.init.constant_(layer.bias, PRIOR_LOGIT)
            break
    return model


def _build_backbone(name: str, *, channels: int, dropout: float, pretrained: bool) -> nn.Module:
    from monai.networks import nets

    labels = len(LABELS)
    if name.startswith("efficientnet"):
        return nets.EfficientNetBN(
            name, pretrained=pretrained, spatial_dims=2, in_channels=channels, num_classes=labels
        )
    if name.startswith("densenet"):
        kind = getattr(nets, f"DenseNet{name.removeprefix('densenet')}")
        return kind(2, channels, labels, dropout_prob=dropout, pretrained=pretrained)
    if name.startswith("seresnext"):
        kind = getattr(nets, f"SEResNext{name.removeprefix('seresnext')}")
        return kind(spatial_dims=2, in_channels=channels, num_classes=labels, pretrained=pretrained)
    if name.startswith("resnet"):
        if pretrained:
            raise ConfigError(
                f"train.pretrained = true: MONAI has no two-dimensional pretrained weights of {name}; set it to false"
            )
        return getattr(nets, name)(spatial_dims=2, n_input_channels=channels, num_classes=labels)
    raise ConfigError(f"train.model = {name!r}: unknown model")
