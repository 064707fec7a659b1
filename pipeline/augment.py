"""Random changes to a training slice, by albumentations behind one thin function, because that library is archived.

The draw depends on (seed, epoch, slice) alone: not on the batch, the worker or what came before, so that a resumed run sees
what an uninterrupted one would have seen. A slice and its neighbours are changed as one: K of them, each of W windows.

Where the library's own way is slow on such stacks, a transform of ours says how to apply what the library has drawn. Measured
at 256² × 3 windows × 3 slices, one core, medians: params.yaml's changes take 0.87 ms, not 2.60; params.rsna.yaml's 1.06, not 4.68.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.config import AugmentConfig

if TYPE_CHECKING:
    import albumentations as alb

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the internet for a newer release when imported

Pixels = npt.NDArray[np.uint8]

NOISE_LEVELS = 32
"""Levels of the noise table to a standard deviation: it reaches to 4 of them."""


def build_augment(config: AugmentConfig) -> Callable[[Pixels, int], Pixels]:
    """Make the function (pixels_KRCW, seed) → pixels_KRCW, uint8; it may write into what it is given.

    K slices are changed alike, but for their noise. It is not for two threads at a time.
    """
    steps = _build_steps(config)
    if not steps:
        return lambda pixels_KRCW, _seed: pixels_KRCW

    def augment(pixels_KRCW: Pixels, seed: int) -> Pixels:
        # One stream for all steps: Compose would start each with the same seed, and turn left whatever it flips.
        numbers, generator = random.Random(seed), np.random.Generator(np.random.PCG64(seed))
        for step in steps:
            step.set_random_state(generator, numbers)
            pixels_KRCW = step(images=np.ascontiguousarray(pixels_KRCW))["images"]
        return pixels_KRCW

    return augment


def _build_steps(config: AugmentConfig) -> list[alb.BasicTransform]:
    """The transforms that are not off."""
    import albumentations as alb

    steps: list[alb.BasicTransform] = []
    if config.flip:
        steps.append(_stacked(alb.HorizontalFlip, _flip)(p=config.flip))
    if config.rotate_deg or config.shift or config.scale:
        steps.append(
            _stacked(alb.Affine, _warp)(
                rotate=(-config.rotate_deg, config.rotate_deg),
                translate_percent=(-config.shift, config.shift),
                scale=(1 - config.scale, 1 + config.scale),
                p=1.0,
            )
        )
    if config.brightness or config.contrast:
        steps.append(
            alb.RandomBrightnessContrast(brightness_limit=config.brightness, contrast_limit=config.contrast, p=1.0)
        )
    if config.noise:
        steps.append(_stacked(alb.GaussNoise, _add_noise, draw=_draw_noise)(std_range=(0.0, config.noise), p=0.5))
    if config.cutout:
        steps.append(
            alb.CoarseDropout(
                num_holes_range=(1, 3), hole_height_range=(0.05, 0.2), hole_width_range=(0.05, 0.2), p=config.cutout
            )
        )
    return steps


def _stacked(
    transform: type[alb.BasicTransform],
    change: Callable[..., Pixels],
    draw: Callable[..., dict[str, Any]] | None = None,
) -> type[alb.BasicTransform]:
    """A transform of albumentations that applies what it has drawn to a stack by `change(pixels_KRCW, **drawn)`."""

    class Stacked(transform):
        def apply_to_images(self, images: Pixels, *_: Any, **drawn: Any) -> Pixels:
            return change(images, **drawn)

        if draw:

            def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
                return draw(self, data["images"])

    return Stacked


def _flip(pixels_KRCW: Pixels, **_: Any) -> Pixels:
    """Left to right."""
    for pixels_RCW in pixels_KRCW:
        pixels_RCW[...] = cv2.flip(pixels_RCW, 1).reshape(pixels_RCW.shape)
    return pixels_KRCW


def _warp(pixels_KRCW: Pixels, *, matrix: npt.NDArray[np.float64], **_: Any) -> Pixels:
    """One map for all; what comes in from outside is 0, below the window, as air is.

    OpenCV is fast at one channel and at four: three go as four, in 0.21 ms, not 0.45 (256²; nine at once take 1.4).
    """
    rows, columns, windows = pixels_KRCW.shape[1:]
    for pixels_RCW in pixels_KRCW:
        source = cv2.cvtColor(pixels_RCW, cv2.COLOR_BGR2BGRA) if windows == 3 else pixels_RCW
        warped = cv2.warpAffine(source, matrix[:2], (columns, rows), flags=cv2.INTER_LINEAR)
        if windows == 3:
            cv2.cvtColor(warped, cv2.COLOR_BGRA2BGR, dst=pixels_RCW)
        else:
            pixels_RCW[...] = warped.reshape(pixels_RCW.shape)
    return pixels_KRCW


def _draw_noise(transform: Any, pixels_KRCW: Pixels) -> dict[str, Any]:
    """How strong the noise is, and where in the table each slice's begins."""
    pixels = pixels_KRCW[0, ..., 0].size
    return {
        "deviation": transform.py_random.uniform(*transform.std_range),
        "starts": [transform.py_random.randrange(pixels) for _ in pixels_KRCW],
    }


def _add_noise(pixels_KRCW: Pixels, *, deviation: float, starts: list[int], **_: Any) -> Pixels:
    """Normal noise, of its own in each slice, the same in all its windows."""
    rows, columns, windows = pixels_KRCW.shape[1:]
    table, scale = _noise_table(rows * columns, windows), deviation * 255 / NOISE_LEVELS
    for pixels_RCW, start in zip(pixels_KRCW, starts, strict=True):
        noise, flat = table[start : start + rows * columns].reshape(rows, -1), pixels_RCW.reshape(rows, -1)
        cv2.addWeighted(flat, 1.0, noise, scale, -128 * scale, dst=flat)
    return pixels_KRCW


@lru_cache(maxsize=2)
def _noise_table(pixels: int, windows: int) -> Pixels:
    """Standard normal numbers around 128, uint8 [2 · pixels, window]: a run from any start serves as a slice's noise.

    Drawing anew takes 0.7 ms a slice of 256²; adding a run of the table 0.05.
    """
    normal = np.random.Generator(np.random.PCG64(0)).standard_normal((2 * pixels, 1), np.float32)
    return np.clip(np.rint(128 + NOISE_LEVELS * normal), 0, 255).astype(np.uint8).repeat(windows, axis=1)


def slice_seed(seed: int, epoch: int, number: int, draw: int = 0) -> int:
    """A 32-bit seed for one slice in one epoch, for each time that it is drawn; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence((seed, epoch, number, draw)).generate_state(1)[0])
