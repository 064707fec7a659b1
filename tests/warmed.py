"""What a server that forks imports beforehand: the stages, and the loops that they compile, each called once."""

import numpy as np

import stages.index
import stages.inspect
import stages.preprocess
from pipeline.config import Window
from pipeline.garbage import is_garbage
from pipeline.head import Box
from pipeline.resample import Converter

__all__ = ["stages"]

for kind in (np.int16, np.uint16):
    stored = np.zeros((64, 64), kind)
    is_garbage(stored, slope=1.0, intercept=0.0)
    converter = Converter(image_size=32, windows={"brain": Window(centre=40, width=80)})
    converter.window(stored, slope=1.0, intercept=0.0, spacing_mm=(1.0, 1.0), box=Box(-32.0, -32.0, 64.0))
