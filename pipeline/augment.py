"""Random changes to a training slice, by albumentations behind one thin function, because that library is archived.

The draw depends on (seed, epoch, slice) alone: not on the batch, the worker or what came before, so that a resumed run sees
what an uninterrupted one would have seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.config import AugmentConfig

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the internet for a newer release when imported

Pixels = npt.NDArray[np.uint8]


def build_augment(config: AugmentConfig) -> Callable[[Pixels, int], Pixels]:
    """Make the function (pixels, seed) → pixels, on uint8 [row, column, channel]; one transform serves all channels."""
    import albumentations as alb

    steps: list[alb.BasicTransform] = []
    if config.flip:
        steps.append(alb.HorizontalFlip(p=config.flip))
    if config.rotate_deg or config.shift or config.scale:
        steps.append(
            alb.Affine(
                rotate=(-config.rotate_deg, config.rotate_deg),
                translate_percent=(-config.shift, config.shift),
                scale=(1 - config.scale, 1 + config.scale),
                interpolation=cv2.INTER_LINEAR,
                border_mode=cv2.BORDER_CONSTANT,
                fill=0,  # below the window, as air is
                p=1.0,
            )
        )
    if config.brightness or config.contrast:
        steps.append(
            alb.RandomBrightnessContrast(brightness_limit=config.brightness, contrast_limit=config.contrast, p=1.0)
        )
    if config.noise:
        # One draw for all channels takes 0.5 ms, one a channel 1.5.
        steps.append(alb.GaussNoise(std_range=(0.0, config.noise), per_channel=False, p=0.5))
    if config.cutout:
        steps.append(
            alb.CoarseDropout(
                num_holes_range=(1, 3), hole_height_range=(0.05, 0.2), hole_width_range=(0.05, 0.2), p=config.cutout
            )
        )
    if not steps:
        return lambda pixels, _seed: pixels
    chain = alb.Compose(steps)

    def augment(pixels: Pixels, seed: int) -> Pixels:
        chain.set_random_seed(seed)
        return np.asarray(chain(image=pixels)["image"])

    return augment


def slice_seed(seed: int, epoch: int, number: int) -> int:
    """A 32-bit seed for one slice in one epoch; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence((seed, epoch, number)).generate_state(1)[0])
