"""Whether a series was made to look at bone or at soft tissue, by the names that vendors give their reconstruction kernels."""

from __future__ import annotations

import re

BONE_WORDS = re.compile(r"bone|knochen|osteo|hueso|\b(os|osseux|osso|oseo)\b|inner ?ear|petrous|temporal", re.I)
SOFT_WORDS = re.compile(r"soft|stnd|standard|\bstd\b|smooth|brain|cereb|hirn|stroke|posterior fossa|weichteil", re.I)
SHARP_WORDS = re.compile(r"sharp|edge|lung|detail|ultra", re.I)
"""Asked in this order: "brain bone" is for bone, "brain sharp" for the brain; GE's words are STANDARD, SOFT, DETAIL, BONE, EDGE."""

SIEMENS_KERNEL = re.compile(r"(?!FC)[A-Z][a-z]{0,2}(\d\d)[a-z]{0,2}\b", re.I)
SHARPEST_SOFT = 49
"""Siemens has a letter for the part of the body and a number for sharpness (H31s, J40s, Hr38, Hc44): to 49 soft, from 50 on bone."""

TOSHIBA_KERNEL = re.compile(r"FC(\d\d)", re.I)
TOSHIBA_SHARP = (3, 5, 8)
"""Tens of Toshiba's and Canon's numbers for bone (FC30), lung (FC51) and high resolution (FC81); FC2x, FC4x and FC6x are for the
brain, FC0x and FC1x for the body."""

PHILIPS_KERNEL = dict.fromkeys(("A", "B", "UA", "UB", "UC", "EC"), "soft") | dict.fromkeys(
    ("D", "E", "YA", "YB", "YC", "YD"), "bone"
)
"""Smooth, standard, and the brain's three; detail, and the Y-sharp ones."""


def kernel_class(kernel: str, description: str) -> str:
    """``bone``, ``soft`` or nothing, from (0018,1210) Convolution Kernel, else (0008,103E) Series Description. The text itself,
    which may hold anything, stays in the file."""
    first = kernel.split("\\")[0].strip()
    if first.upper() in PHILIPS_KERNEL:
        return PHILIPS_KERNEL[first.upper()]
    if toshiba := TOSHIBA_KERNEL.match(first):
        return "bone" if int(toshiba[1]) // 10 in TOSHIBA_SHARP else "soft"
    if siemens := SIEMENS_KERNEL.match(first):
        return "soft" if int(siemens[1]) <= SHARPEST_SOFT else "bone"
    for text in (first, description):
        for words, kind in ((BONE_WORDS, "bone"), (SOFT_WORDS, "soft"), (SHARP_WORDS, "bone")):
            if words.search(text):
                return kind
    return ""
