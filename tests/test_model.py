"""Networks by name: features and logits, any number of channels, and weights from elsewhere."""

from __future__ import annotations

import re
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import MODELS, SMALLEST_OF_BACKBONES
from pipeline.errors import ConfigError
from pipeline.labels import LABELS
from pipeline.model import PRIOR_LOGIT, SliceNet, adapt_channels, build_model

FAMILIES = ["compact", "densenet121", "efficientnet-b0", "resnet18", "seresnet50", "seresnext50"]

PUBLISHED_PARAMETERS = {
    "densenet121": 7_978_856,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "efficientnet-b0": 5_288_548,
    "efficientnet-b1": 7_794_184,
    "efficientnet-b2": 9_109_994,
    "efficientnet-b3": 12_233_232,
    "efficientnet-b4": 19_341_616,
    "efficientnet-b5": 30_389_784,
    "efficientnet-b6": 43_040_704,
    "efficientnet-b7": 66_347_960,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "seresnet50": 28_088_024,
    "seresnext50": 27_559_896,
    "seresnext101": 48_955_416,
}
"""With three channels and a classifier of 1,000, as torchvision, EfficientNet-PyTorch and pretrained-models.pytorch count."""

PUBLISHED_FILES = {
    "densenet121": "densenet121-a639ec97.pth",
    "efficientnet-b0": "efficientnet-b0-355c32eb.pth",
    "seresnet50": "se_resnet50-ce0d4300.pth",
}
PUBLISHED_NAMES = (
    (r"(denselayer\d+)\.layers\.(norm|conv)", r"\1.\2."),
    (r"_blocks\.\d+\.", "_blocks."),
    (r"(layer\d\.\d+\.conv\d)\.conv\.", r"\1."),
    (r"(layer\d\.\d+)\.conv(\d)\.adn\.N\.", r"\1.bn\2."),
    (r"se_layer\.fc\.0\.", "se_module.fc1."),
    (r"se_layer\.fc\.2\.", "se_module.fc2."),
    (r"project\.conv\.", "downsample.0."),
    (r"project\.adn\.N\.", "downsample.1."),
)
"""MONAI's names → those in the published files."""


def draw_slices(count: int = 2, channels: int = 3, size: int = 64) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def trained(name: str, channels: int = 3, seed: int = 1) -> SliceNet:
    """A network whose norms have seen slices: as drawn, the deep ones' features would all be next to nothing."""
    torch.manual_seed(seed)
    network = build_model(name, channels=channels, dropout=0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a mean over what it sees
    with torch.no_grad():
        network.train()(draw_slices(4, channels))
        network.head.bias.add_(torch.arange(6))
    return network.eval()


def assert_same_features(one: SliceNet, other: SliceNet, copies: int) -> None:
    """One sees each slice, the other so many copies of it as channels."""
    slices = draw_slices()
    with torch.inference_mode():
        expected, found = one.eval().features(slices), other.eval().features(slices.repeat(1, copies, 1, 1))
    assert expected.std() > 1e-3  # else anything would be close
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_learn_from_any_number_of_channels(name: str) -> None:
    for channels in (1, 3, 9):
        network = build_model(name, channels=channels, dropout=0.1)
        logits = network.train()(draw_slices(2, channels))
        assert logits.shape == (2, len(LABELS))
        logits.square().sum().backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert gradients[0] is not None
        assert gradients[0].any()  # it reaches the first convolution


@pytest.mark.parametrize("size", [16, 31, 33, 100])
def test_compact_takes_every_size(size: int) -> None:
    network = build_model("compact", channels=1, dropout=0.0)
    assert network(draw_slices(channels=1, size=size)).shape == (2, len(LABELS))


@pytest.mark.parametrize("name", FAMILIES[1:])
def test_backbones_take_the_smallest_size_that_is_allowed(name: str) -> None:
    network = build_model(name, channels=1, dropout=0.0)
    assert network(draw_slices(channels=1, size=SMALLEST_OF_BACKBONES)).shape == (2, len(LABELS))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_head_of_the_features(name: str) -> None:
    network = build_model(name, channels=3, dropout=0.5).eval()
    with torch.inference_mode():
        features = network.features(draw_slices())
        assert features.shape == (2, network.feature_size)
        torch.testing.assert_close(network.head(features), network(draw_slices()), atol=0, rtol=0)
    assert (network.head.bias == PRIOR_LOGIT).all()


def test_features_are_float32_under_autocast() -> None:
    network = build_model("compact", channels=3, dropout=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert network.body(draw_slices()).dtype == torch.bfloat16
        assert network.features(draw_slices()).dtype == torch.float32


def test_every_name_makes_the_published_network_without_its_dropout() -> None:
    assert {*PUBLISHED_PARAMETERS, "compact"} == set(MODELS)
    for name, published in PUBLISHED_PARAMETERS.items():
        with torch.device("meta"):
            network = build_model(name, channels=3, dropout=0.3)
        classifier = 1000 * (network.feature_size + 1)
        assert sum(parameter.numel() for parameter in network.body.parameters()) + classifier == published, name
        assert [module.p for module in network.modules() if isinstance(module, nn.Dropout) and module.p] == [0.3], name


def test_resnets_are_those_for_pictures() -> None:
    """A 32nd of the rows is left at the end; with MONAI's default first stride, which is for volumes, it would be a 16th."""
    network = build_model("resnet18", channels=3, dropout=0)
    sizes: list[torch.Size] = []
    network.body.get_submodule("layer4").register_forward_hook(lambda _, __, output: sizes.append(output.shape))
    network(draw_slices())
    assert sizes == [(2, 512, 2, 2)]


def test_unknown_model_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"train\.model = 'vit': unknown model; expected one of compact, densenet121"):
        build_model("vit", channels=3, dropout=0)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 9])
def test_adapted_convolution_keeps_the_size_of_its_sums(channels: int) -> None:
    weight = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    adapted = adapt_channels(weight, channels)
    assert adapted.shape == (8, channels, 5, 5)
    grey = draw_slices(channels=1)
    found = nn.functional.conv2d(grey.expand(-1, channels, -1, -1), adapted)
    torch.testing.assert_close(found, nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's cache, empty, and no internet."""

    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def publish(network: SliceNet, classes: int = 1000) -> dict[str, Tensor]:
    """Its body's tensors by the published names, with a classifier."""
    published = {"classifier.weight": torch.ones(classes, network.feature_size)}
    for key, value in network.body.state_dict().items():
        name = key
        for pattern, replacement in PUBLISHED_NAMES:
            name = re.sub(pattern, replacement, name)
        published[name] = value[..., None, None] if "se_module" in name and value.ndim == 2 else value
    return published


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_published_weights_serve_three_channels_and_multiples(name: str, cache: Path) -> None:
    network = trained(name)
    torch.save(publish(network), cache / PUBLISHED_FILES[name])
    for channels in (3, 9):
        fetched = build_model(name, channels=channels, dropout=0, pretrained=True)
        assert_same_features(network, fetched, channels // 3)
        assert (fetched.head.bias == PRIOR_LOGIT).all()


def test_published_weights_that_do_not_fill_the_network_are_refused(cache: Path) -> None:
    published = publish(trained("efficientnet-b0"))
    del published["_blocks.3._bn1.running_var"], published["_bn1.bias"]
    torch.save(published, cache / PUBLISHED_FILES["efficientnet-b0"])
    with pytest.raises(
        ConfigError, match=r"true: 307 of the 309 .* not, _blocks\.2\.3\._bn1\.running_var, is not there"
    ):
        build_model("efficientnet-b0", channels=3, dropout=0, pretrained=True)


def test_weights_that_cannot_be_fetched_are_refused(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"weights of efficientnet-b0 cannot be fetched .*URLError.*no route to host"):
        build_model("efficientnet-b0", channels=3, dropout=0, pretrained=True)
    (cache / PUBLISHED_FILES["densenet121"]).write_bytes(b"half a download")
    with pytest.raises(ConfigError, match=r"weights of densenet121 cannot be fetched .* or read there"):
        build_model("densenet121", channels=3, dropout=0, pretrained=True)


@pytest.mark.parametrize("name", ["compact", "resnet18"])
def test_weights_that_nobody_publishes_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"there are no pretrained weights of {name}"):
        build_model(name, channels=3, dropout=0, pretrained=True)


@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
def test_weights_come_from_a_file_of_a_bare_backbone(
    prefix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = trained("resnet18")
    tensors = {key: value for key, value in network.body.state_dict().items() if "num_batches" not in key}
    classifier = {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}
    path = tmp_path / "resnet18.pth"
    torch.save({prefix + key: value for key, value in {**tensors, **classifier}.items()}, path)
    loaded = build_model("resnet18", channels=6, dropout=0, pretrained=str(path))
    assert_same_features(network, loaded, 2)
    assert (loaded.head.bias == PRIOR_LOGIT).all()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("form", ["members", "weights", "bare"])
def test_weights_come_from_a_model_of_ours_with_its_head(form: str, tmp_path: Path) -> None:
    network = trained("compact")
    weights = network.state_dict()
    content = {"members": {"members": [weights, {}]}, "weights": {"weights": weights}, "bare": weights}[form]
    torch.save(content, tmp_path / "model.pt")
    loaded = build_model("compact", channels=3, dropout=0, pretrained=str(tmp_path / "model.pt")).eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(draw_slices()), network(draw_slices()), atol=0, rtol=0)


def test_head_for_other_labels_is_left_as_drawn(tmp_path: Path) -> None:
    network = trained("compact")
    network.head = nn.Linear(network.feature_size, 14)
    torch.save(network.state_dict(), tmp_path / "other.pt")
    loaded = build_model("compact", channels=3, dropout=0, pretrained=str(tmp_path / "other.pt"))
    assert_same_features(network, loaded, 1)
    assert (loaded.head.bias == PRIOR_LOGIT).all()


FILES: dict[str, tuple[Any, str]] = {
    "absent": (None, "no such file"),
    "empty": (b"", "cannot be read as weights"),
    "text": (b"weights, all of them\n", "cannot be read as weights"),
    "zip": (b"PK\x03\x04" + bytes(100), "cannot be read as weights"),
    "code": (Path, "cannot be read as weights"),
    "list": ([torch.ones(1)], "expected a state dict .* found list"),
    "settings": ({"epoch": 3, "name": "x"}, "expected a state dict .* found a dict of epoch, name"),
    "half": ({"stem.0.weight": torch.ones(32, 3, 6, 6)}, r"1 of the 37 .* not, stem\.1\.weight, is not there"),
    "shapes": (
        {"stem.0.weight": torch.ones(32, 3, 7, 7)},
        r"0 of the 37 .* stem\.0\.weight, has shape \[32, 3, 7, 7\]",
    ),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_file_without_the_weights_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    content, said = FILES[fault]
    path = tmp_path / f"{fault}.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=f"^train.pretrained = {re.escape(str(path))}: .*{said}"):
        build_model("compact", channels=3, dropout=0, pretrained=str(path))


def test_a_folder_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as weights"):
        build_model("compact", channels=3, dropout=0, pretrained=str(tmp_path))
