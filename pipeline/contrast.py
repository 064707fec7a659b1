"""Whether a contrast medium was given, as far as a file's header tells.

Asked by `predict` alone, of one file a study.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

from pydicom.dataset import Dataset

from pipeline.errors import SourceError
from pipeline.header import HEADER_LIMIT_BYTES, read_quietly
from pipeline.place import Place, read_head

AGENT, AGENTS = 0x00180010, 0x00180012
"""Contrast/Bolus Agent, and Contrast/Bolus Agent Sequence (PS3.3 C.7.6.4 and C.7.6.4b)."""

SHARED, PER_FRAME, USAGE = 0x52009229, 0x52009230, 0x00189341
"""The functional groups of a multi-frame file, and in them Contrast/Bolus Usage Sequence (PS3.3 C.7.6.16.2.12)."""

SAID = ("ContrastBolusAgentAdministered", "ContrastBolusAgentDetected")

NO_AGENT = re.compile("(NO|NON|NONE|NIL|WITHOUT|WO|OHNE|SANS|SENZA|SIN)(IV|ORAL)?((C|K)ONTRAST.*|KM|GIVEN|USED)?")
"""Letters of an agent's name that say that there was none, as some scanners write where nothing belongs. "Non-ionic" is an agent."""

NOT_TOLD = frozenset(("", "NA", "UNKNOWN", "UNK", "NULL"))
"""Letters of one that say that nobody knows; none, where only dots, dashes or noughts are written."""


def read_contrast(place: Place) -> bool | None:
    """Whether contrast medium was given for what a file shows. The agent's name, which may hold anything, goes no further.

    Args:
        place: a file whose header `pipeline.header` could read.

    Returns:
        None where the header doesn't tell, as RSNA's don't.

    Raises:
        SourceError: the storage does not answer.
    """
    try:
        content = io.BytesIO(read_head(place, HEADER_LIMIT_BYTES))
        dataset = read_quietly(content, specific_tags=[AGENT, AGENTS, SHARED, PER_FRAME], force=True)
        return _interpret(dataset)
    except SourceError:  # the storage itself is out of reach, which is no fault of the file
        raise
    except Exception:  # a damaged header makes a parser raise anything; what it does not tell is not known
        return None


def _interpret(dataset: Dataset) -> bool | None:
    usage = set(_list_usage(dataset))
    if usage:
        return "YES" in usage
    if len(dataset.get("ContrastBolusAgentSequence") or ()):
        return True
    element = dataset.get_item(AGENT)
    # as bytes: an unknown character set must not hide that something is written there
    value = element.value if element is not None else b""
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value or "")
    if re.search(r"[1-9\x80-\xff]", text):  # a dose, or a name in another script
        return True
    letters = re.sub("[^A-Z]", "", text.upper())
    return None if letters in NOT_TOLD else NO_AGENT.fullmatch(letters) is None


def _list_usage(dataset: Dataset) -> Iterator[str]:
    """YES or NO of each frame and agent; nothing where a file is of one slice, or says nothing of it."""
    for tag in (SHARED, PER_FRAME):
        for group in dataset[tag].value if tag in dataset else ():
            for item in group[USAGE].value if USAGE in group else ():
                yield from (str(item.get(name)) for name in SAID if item.get(name) in ("YES", "NO"))
