"""Heat maps show where a network saw what it says: Grad-CAM as published, on any network, and on the store's own slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import DamageError
from pipeline.gradcam import explain_slices, grad_cam
from pipeline.inference import scale
from pipeline.labels import LABELS
from pipeline.model import SliceNet, build_model
from pipeline.reader import SliceReader, shard_name
from pipeline.shard import build_shard, encode_chunk
from pipeline.sheet import blend_heat


class Averaging(nn.Module):
    """One convolution and a mean over space: the network of Zhou et al. 2016, whose class activation map is in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 4, 4)

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        return self.convolution(slices).mean((2, 3))


@pytest.fixture
def averaging() -> SliceNet:
    torch.manual_seed(0)
    return SliceNet(Averaging(), feature_size=4, dropout=0.5).eval()


def test_it_is_the_class_activation_map_where_that_has_a_closed_form(averaging: SliceNet) -> None:
    slices, labels = torch.rand(3, 3, 16, 16), np.array([0, 5, 2])
    features = averaging.body.convolution(slices)
    weights = averaging.head.weight[labels] / features[0, 0].numel()  # the gradient of a mean
    expected = torch.einsum("nf,nfrc->nrc", weights, features).relu()
    found = grad_cam(averaging, slices, labels)
    larger = nn.functional.interpolate(expected[:, None], (16, 16), mode="bilinear")[:, 0]
    torch.testing.assert_close(found, larger.detach())
    assert found.amax() > 0


def test_it_leaves_the_network_as_it_was(averaging: SliceNet) -> None:
    slices = torch.rand(2, 3, 16, 16)
    before = averaging(slices)
    grad_cam(averaging, slices, np.array([1, 1]))
    assert not any(module._forward_hooks for module in averaging.modules())
    assert all(weights.grad is None for weights in averaging.parameters())
    torch.testing.assert_close(averaging(slices), before)


@pytest.mark.parametrize("name", ["compact", "resnet18", "densenet121", "efficientnet-b0", "seresnet50"])
def test_every_kind_of_network_has_a_last_feature_map(name: str) -> None:
    torch.manual_seed(1)
    network = build_model(name, channels=3, dropout=0.0).eval()
    slices = torch.rand(2, 3, 64, 64)
    maps = [grad_cam(network, slices, np.full(2, label)) for label in range(len(LABELS))]
    assert all(one.shape == (2, 64, 64) and one.isfinite().all() and one.amin() >= 0 for one in maps)
    varied = max(one.amax() - one.amin() for one in maps)
    assert varied > 0, "a map without rows and columns says nothing"


def brightness() -> SliceNet:
    """A network whose every logit is the mean brightness of the first channel, seen in squares of 4 × 4."""
    body = Averaging()
    nn.init.zeros_(body.convolution.weight)
    nn.init.zeros_(body.convolution.bias)
    nn.init.constant_(body.convolution.weight[0, 0], 1.0)
    network = SliceNet(body, feature_size=4, dropout=0.0)
    nn.init.ones_(network.head.weight)
    return network.eval()


@pytest.fixture
def reader(tmp_path: Path) -> SliceReader:
    """Three slices of one study: a bright square at another place in each."""
    pixels_SRCW = np.zeros((3, 16, 16, 3), np.uint8)
    for number, (row, column) in enumerate([(0, 0), (4, 8), (12, 12)]):
        pixels_SRCW[number, row : row + 4, column : column + 4] = 200
    path = tmp_path / shard_name(0, 0)
    path.write_bytes(build_shard([encode_chunk(one) for one in pixels_SRCW]))
    return SliceReader(tmp_path, study_uids=np.array(["1"]), num_slices=np.array([3]), shape=(16, 16, 3))


def test_slices_of_a_store_are_hottest_where_the_network_looked(reader: SliceReader) -> None:
    slices = np.array([[0, 2], [0, 0], [0, 1]])
    settings: dict[str, Any] = {"neighbours": 0, "device": torch.device("cpu")}
    maps = explain_slices([brightness()], reader, slices, np.zeros(3, np.int64), **settings)
    centres = [np.argwhere(one == one.max()).mean(axis=0) for one in maps]
    assert [one.max() for one in maps] == [1, 1, 1]
    np.testing.assert_allclose(centres, [(13.5, 13.5), (1.5, 1.5), (5.5, 9.5)], atol=2)
    nobody = explain_slices([brightness()], reader, slices[:0], np.zeros(0, np.int64), **settings)
    assert nobody.shape == (0, 16, 16)


def test_nothing_that_speaks_for_a_label_gives_an_empty_map(reader: SliceReader) -> None:
    network = brightness()
    nn.init.constant_(network.head.weight, -1.0)
    settings: dict[str, Any] = {"neighbours": 0, "device": torch.device("cpu")}
    maps = explain_slices([network], reader, np.array([[0, 0]]), np.array([3]), **settings)
    np.testing.assert_array_equal(maps, np.zeros((1, 16, 16)))


def test_networks_are_averaged_and_neighbours_come_along(reader: SliceReader) -> None:
    torch.manual_seed(0)
    networks = [build_model("compact", channels=9, dropout=0.0).eval() for _ in range(2)]
    reader_input = np.concatenate([reader.read(0, number) for number in (0, 1, 2)], axis=2)
    slice_1XRC = scale(torch.from_numpy(reader_input)[None])
    label = np.array([4])
    mean = sum(grad_cam(network, slice_1XRC, label) for network in networks)
    assert isinstance(mean, torch.Tensor)
    assert mean.amax() > 0
    found = explain_slices(networks, reader, np.array([[0, 1]]), label, neighbours=1, device=torch.device("cpu"))
    np.testing.assert_allclose(found, (mean / mean.amax()).numpy(), rtol=1e-5, atol=1e-6)


def test_damage_is_named(reader: SliceReader) -> None:
    shard = reader.pixels / shard_name(0, 0)
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamageError, match="slice 0"):
        explain_slices(
            [brightness()], reader, np.array([[0, 0]]), np.array([0]), neighbours=0, device=torch.device("cpu")
        )


def test_colour_lies_only_where_the_map_is_hot() -> None:
    grey = np.full((2, 2), 100, np.uint8)
    blended = blend_heat(grey, np.array([[0.0, 1.0], [0.5, 0.0]], np.float32))
    np.testing.assert_array_equal(blended[[0, 1], [0, 1]], np.full((2, 3), 100))
    red, green, blue = blended[0, 1].tolist()
    assert min(red, green) > blue > 100, "the hottest is a pale yellow, in that order of colours"
