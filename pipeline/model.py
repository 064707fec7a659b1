"""The networks: a compact residual CNN of our own, and MONAI's backbones by name. Slices to features, features to six logits.

Ours uses GroupNorm, not BatchNorm: its sums do not depend on how a batch is split over processes, and it learns with the
small batches that a CPU can hold. MONAI takes five seconds to import, so it is imported only where it is asked for.
Axes: N slices in a batch, X input channels, R rows, C columns, F features, L labels.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import MODELS
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

PUBLISHED_CHANNELS = 3
"""Channels of the photographs that published weights were learnt from."""

PUBLISHED_SE_NETS = {
    "seresnet50": "se_resnet50",
    "seresnext50": "se_resnext50_32x4d",
    "seresnext101": "se_resnext101_32x4d",
}
"""MONAI's names of the published weights of its SE-nets."""

WRAPPERS = re.compile(r"^((module|model)\.)*")
"""What DataParallel and training frameworks put before the names in a state dict."""


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
        # rounded up, as the convolution beside it is: the last row of an odd number is a mean of its own
        pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        self.shortcut = nn.Identity() if same else nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1))
        self.activation = nn.SiLU()

    def forward(self, features_NCHW: Tensor) -> Tensor:
        summed: Tensor = self.body(features_NCHW) + self.shortcut(features_NCHW)
        return self.activation(summed)


class CompactBody(nn.Module):
    """A small residual squeeze-and-excitation network that learns on a CPU: float [N, X, R, C] to features [N, F]."""

    feature_size = 2 * WIDTHS[-1]

    def __init__(self, channels: int) -> None:
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

    def forward(self, slices_NXRC: Tensor) -> Tensor:
        features_NFRC = self.levels(self.stem(slices_NXRC - MEAN_GREY))
        # The mean tells how much there is, the maximum whether there is a small one anywhere.
        return torch.cat([features_NFRC.mean((2, 3)), features_NFRC.amax((2, 3))], dim=1)


class SliceNet(nn.Module):
    """A body that sees features in slices, and a linear head that makes six logits of them.

    Args:
        body: a module from float [N, X, R, C] in 0…1 to features [N, F].
        feature_size: F.
        dropout: share of the features dropped in training.
    """

    def __init__(self, body: nn.Module, *, feature_size: int, dropout: float) -> None:
        super().__init__()
        self.body, self.feature_size = body, feature_size
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(feature_size, len(LABELS))
        nn.init.constant_(self.head.bias, PRIOR_LOGIT)

    def features(self, slices_NXRC: Tensor) -> Tensor:
        """What the body sees, before dropout: float32 [N, F], under autocast too."""
        features_NF: Tensor = self.body(slices_NXRC)
        return features_NF.float()

    def logits(self, features_NF: Tensor) -> Tensor:
        """The head, in float32 under autocast too: bf16 keeps three digits, and slices would tie."""
        # the meta device, on which shapes are counted, knows no autocast
        with nullcontext() if features_NF.is_meta else torch.autocast(features_NF.device.type, enabled=False):
            logits_NL: Tensor = self.head(features_NF)
        return logits_NL

    def forward(self, slices_NXRC: Tensor) -> Tensor:
        return self.logits(self.dropout(self.features(slices_NXRC)))


def build_model(name: str, *, channels: int, dropout: float, pretrained: bool | str = False) -> SliceNet:
    """Make a network with six logits.

    Args:
        name: one of `pipeline.config.MODELS`.
        channels: input channels: windows × slices seen at once.
        dropout: share of the features dropped before the last layer.
        pretrained: true: start from published weights, which MONAI fetches, once; a path: from the weights in that file, a
            state dict named as MONAI names its network's tensors, or a `model.pt` of ours.

    Returns:
        A module from float [slice, channel, row, column] in 0…1 to logits [slice, label].

    Raises:
        ConfigError: the name is unknown, or pretrained weights cannot be had, read or used.
    """
    if name not in MODELS:
        raise ConfigError(f"train.model = {name!r}: unknown model; expected one of {', '.join(MODELS)}")
    body, feature_size = _make_body(name, channels=channels)
    network = SliceNet(body, feature_size=feature_size, dropout=dropout)
    if pretrained:
        tensors = _read_weights(pretrained) if isinstance(pretrained, str) else _fetch_weights(name)
        _load_weights(network, tensors, name=name, origin=pretrained if isinstance(pretrained, str) else "true")
    return network


def _make_body(name: str, *, channels: int) -> tuple[nn.Module, int]:
    """The network without its classifier, and the number of its features."""
    if name == "compact":
        return CompactBody(channels), CompactBody.feature_size
    from monai.networks import nets

    body: Any
    if name.startswith("efficientnet"):
        body = nets.EfficientNetBN(name, pretrained=False, spatial_dims=2, in_channels=channels)
        body._dropout.p = 0.0  # dropout is `SliceNet`'s; stochastic depth (drop-connect) stays
        classifier = "_fc"
    elif name.startswith("densenet"):
        body = getattr(nets, f"DenseNet{name.removeprefix('densenet')}")(2, channels, len(LABELS))
        classifier = "class_layers.out"
    elif name.startswith("seres"):
        kind = getattr(nets, name.replace("seresnext", "SEResNext").replace("seresnet", "SEResNet"))
        body = kind(spatial_dims=2, in_channels=channels)
        classifier = "last_linear"
    else:
        # MONAI's defaults are for volumes: first stride 1, biases before norms. These are He et al.'s (2016), for pictures.
        body = getattr(nets, name)(
            spatial_dims=2, n_input_channels=channels, conv1_t_stride=2, shortcut_type="B", bias_downsample=False
        )
        classifier = "fc"
    feature_size = int(body.get_submodule(classifier).in_features)
    body.set_submodule(classifier, nn.Identity())
    return body, feature_size


def _fetch_weights(name: str) -> dict[str, Tensor]:
    """Published weights of the body by MONAI's names, from torch.hub's cache or the internet."""
    if name == "compact" or name.startswith("resnet"):
        raise ConfigError(
            f"train.pretrained = true: there are no pretrained weights of {name} that MONAI could fetch; set it to false, or "
            f"to the path of a file with weights"
        )
    from monai.networks.nets import densenet, efficientnet, senet

    body, _ = _make_body(name, channels=PUBLISHED_CHANNELS)
    # MONAI passes over in silence what it does not find under its names; NaN shows what it never wrote.
    for tensor in body.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    try:
        if name.startswith("efficientnet"):
            efficientnet._load_state_dict(body, name, progress=True, adv_prop=False)
        elif name.startswith("densenet"):
            densenet._load_state_dict(body, name, progress=True)
        else:
            senet._load_state_dict(body, PUBLISHED_SE_NETS[name], progress=True)
    except Exception as error:  # no way to the internet, or a damaged file: see `_read_weights`
        raise ConfigError(
            f"train.pretrained = true: weights of {name} cannot be fetched into {torch.hub.get_dir()}, or read there "
            f"({_first_line(error)}); set it to false, or to the path of a file with weights"
        ) from None
    return {key: tensor for key, tensor in body.state_dict().items() if not tensor.isnan().any()}


def _read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a file by name: a state dict's, or the first member's of a `model.pt`."""
    content = _read_file(path)
    is_dict = isinstance(content, dict)
    if is_dict:
        content = content["members"][0] if content.get("members") else content.get("weights", content)
        is_dict = isinstance(content, dict)
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)} if is_dict else {}
    if not tensors:
        found = f"a dict of {', '.join(map(str, list(content)[:5]))}" if is_dict else type(content).__name__
        raise ConfigError(f"train.pretrained = {path}: expected a state dict (names and tensors), found {found}")
    return tensors


def refuse_leak(path: str, identity: dict[str, Any]) -> None:
    """Refuse weights of our own that have learnt from patients whom this fold holds out.

    Args:
        path: of the weights.
        identity: of the run: `store_digest`, `folds_digest` and `fold` are compared.

    Raises:
        ConfigError: they are of another fold of this store.
    """
    content = _read_file(path)
    if not isinstance(content, dict) or content.get("store_digest") != identity["store_digest"]:
        return
    if any(content.get(key) != identity[key] for key in ("fold", "folds_digest")):
        raise ConfigError(
            f"train.pretrained = {path}: a model of fold {content.get('fold')} of this very store has learnt from patients whom fold "
            f"{identity['fold']} holds out, and its scores would be worth nothing; take weights that were made from other data"
        )


def _read_file(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(
            f"train.pretrained = {path}: no such file; expected true, false or the path of a file with weights"
        ) from None
    except (
        Exception
    ) as error:  # on damaged bytes torch.load raises what it stumbles on: struct.error, AssertionError ...
        raise ConfigError(
            f"train.pretrained = {path}: cannot be read as weights ({_first_line(error)}); expected a file of torch.save with "
            f"a state dict"
        ) from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _load_weights(network: SliceNet, tensors: dict[str, Tensor], *, name: str, origin: str) -> None:
    """Take weights over: all of the body's, its first convolution adapted to the channels, and the head's where they fit."""
    given = {_our_name(theirs): value for theirs, value in tensors.items()}
    wanted = network.state_dict()
    first = next(f"{part}.weight" for part, module in network.named_modules() if isinstance(module, nn.Conv2d))
    if first in given and given[first].ndim == 4:
        given[first] = adapt_channels(given[first], wanted[first].shape[1])
    fitting = {key: given[key] for key in wanted if key in given and given[key].shape == wanted[key].shape}
    # The head is another task's in published weights, and old files lack BatchNorm's counters, which nothing here reads.
    needed = [key for key in wanted if key.startswith("body.") and not key.endswith("num_batches_tracked")]
    unfit = [key for key in needed if key not in fitting]
    if unfit:
        key = unfit[0]
        found = f"has shape {list(given[key].shape)}" if key in given else "is not there"
        raise ConfigError(
            f"train.pretrained = {origin}: {len(needed) - len(unfit)} of the {len(needed)} tensors of {name} fit; the first that "
            f"does not, {key.removeprefix('body.')}, {found}, and {list(wanted[key].shape)} is expected. Set it to false, or to "
            f"the path of weights of {name} by MONAI's names"
        )
    network.load_state_dict(fitting, strict=False)


def _our_name(theirs: str) -> str:
    """A tensor's name in a `SliceNet`, whether the file was of one or of a bare backbone."""
    bare = WRAPPERS.sub("", theirs)
    return bare if bare.startswith(("body.", "head.")) else f"body.{bare}"


def adapt_channels(weight_FXRC: Tensor, channels: int) -> Tensor:
    """Weights of a first convolution for another number of channels, so that its sums keep their size.

    Over a multiple of the channels the weights are repeated; else each channel takes the mean over the old ones.
    """
    inputs = weight_FXRC.shape[1]
    if channels % inputs:
        weight_FXRC = weight_FXRC.mean(dim=1, keepdim=True)
    return weight_FXRC.repeat(1, channels // weight_FXRC.shape[1], 1, 1) * (inputs / channels)
