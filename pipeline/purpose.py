"""What a slice was made to show, by the words that scanners and people write into its header: bone or soft tissue, which part of the
body, with contrast medium or without, or a projection of many slices. The words themselves, which may hold anything, stay in the file.
"""

from __future__ import annotations

import re
from functools import lru_cache

BONE_WORDS = re.compile(
    r"bone|knochen|osteo|hueso|\b(os|osseux|osso|oseo)\b|inner ?ear|petrous|felsenbein|temporal bone", re.I
)
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

HEAD_WORDS = re.compile(
    r"head|brain|skull|crani|cr[aâ]ne|cereb|hirn|kopf|sch(ä|ae)del|t[eê]te|cabeza|neuro|stroke", re.I
)
BODY_WORDS = re.compile(
    r"neck|\bhals|spine|spinal|cervical|thorac|lumbar|\b[CTL][- ]?spin|\b[HBL]WS\b|wirbel|chest|thorax|lung|heart|cardiac|coronar(y|ies)|"
    r"abdom|pelvi|becken|liver|kidney|renal|aorta|extremit|shoulder|\bhand\b|wrist|elbow|\bhip\b|knee|\blegs?\b|\bfoot\b|ankle|"
    r"sinus|facial|\bface|orbit|dental|mandib|maxill",
    re.I,
)
"""Asked in this order: "head and neck" is of the head. What shows a face or its sinuses is no series of the brain either."""

CONTRAST_WORDS = re.compile(
    r"\b(contrast|CT[AVP]|angio\w*|perfusion|bolus|arteriell?|arterial|ven(ous|ös)|KM|enhanced)\b|\bC\+|\+C\b", re.I
)
PLAIN_WORDS = re.compile(
    r"\b(w/?o|without|non|nativ\w*|plain|unenhanced|ohne|sans|sin|senza)\b|\b(no|pre)[ -](iv )?contrast|\bC-(?!\w)",
    re.I,
)
"""The second are asked first: "without contrast"."""

NO_AGENT = re.compile("(NO|NON|NONE|NIL|WITHOUT|WO|OHNE|SANS|SENZA|SIN)(IV|ORAL)?((C|K)ONTRAST.*|KM|GIVEN|USED)?")
"""Letters of an agent's name that say that there was none, as some scanners write where nothing belongs. "Non-ionic" is an agent."""

NO_NAME = frozenset(("", "NA", "UNKNOWN", "UNK", "NULL"))
"""Letters of one that say that nobody knows; none, where only dots, dashes or noughts are written."""

PROJECTION = re.compile(r"\b(M(IN)?IP|MAXIMUM|MINIMUM|PROJECTION)\b", re.I)
"""In Image Type or Frame Type (PS3.3 C.8.2.1.1.1, C.8.16.1.4), or in a description."""

GIVEN, NOT_GIVEN, NOT_TOLD = 1, 0, -1


@lru_cache(maxsize=256)  # the slices of a series say the same
def kernel_class(kernel: str, description: str) -> str:
    """``bone``, ``soft`` or nothing, from (0018,1210) Convolution Kernel, else (0008,103E) Series Description."""
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


@lru_cache(maxsize=256)
def body_class(part: str, description: str) -> str:
    """``head``, ``other`` or nothing, from (0008,103E) Series Description, else (0018,0015) Body Part Examined, which is often what
    the protocol began with."""
    for text in (description, part):
        for words, kind in ((HEAD_WORDS, "head"), (BODY_WORDS, "other")):
            if words.search(text):
                return kind
    return ""


@lru_cache(maxsize=256)
def contrast_class(agent: str, *, has_agents: bool, description: str) -> int:
    """Whether contrast medium was given: `GIVEN`, `NOT_GIVEN` or `NOT_TOLD`.

    Args:
        agent: (0018,0010) Contrast/Bolus Agent.
        has_agents: (0018,0012), its sequence, is not empty.
        description: (0008,103E) Series Description, asked where the others do not tell.
    """
    if has_agents or re.search(r"[1-9\x80-\xff]", agent):  # a dose, or a name in another script
        return GIVEN
    letters = re.sub("[^A-Z]", "", agent.upper())
    if letters not in NO_NAME:
        return NOT_GIVEN if NO_AGENT.fullmatch(letters) else GIVEN
    if PLAIN_WORDS.search(description):
        return NOT_GIVEN
    return GIVEN if CONTRAST_WORDS.search(description) else NOT_TOLD


@lru_cache(maxsize=256)
def is_projection(image_type: str, description: str) -> bool:
    """Whether a slice is the brightest or darkest of many (MIP, MinIP): no place in it is a place in the patient."""
    return bool(PROJECTION.search(image_type) or re.search(r"\bm(in)?ip\b", description, re.I))
