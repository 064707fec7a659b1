"""S3-compatible storage, and whatever else fsspec knows by a URL: asked so that an outage is told from a file that is not there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from pipeline.errors import SourceError

URL = re.compile(r"^[a-z][a-z0-9+.-]+://", re.I)


def open_storage(url: str) -> tuple[Any, str]:
    """The storage of a URL, a file system as fsspec has them, and the URL's path in it."""
    protocol, path = url.split("://", 1)
    system = _open_system(protocol.lower())
    return system, str(system._strip_protocol(f"{protocol.lower()}://{path}"))


def ask(url: str, question: Callable[[Any, str], Any]) -> Any:
    """The storage's answer about a URL.

    Raises:
        OSError: it is about that one object: not there, not allowed.
        SourceError: the storage itself cannot be reached. Nothing is excluded for that: the run stops and can go on later.
    """
    try:
        return question(*open_storage(url))
    except (OSError, SourceError):
        raise
    except Exception as error:  # each storage has its own family of errors
        raise unreachable(url, error) from None


def unreachable(url: str, error: Exception) -> SourceError:
    said = " ".join(str(error).split())[:200]
    return SourceError(
        f"source.dicom: {url} cannot be read ({type(error).__name__}: {said}); check the name, the credentials and the endpoint "
        f"(AWS_ENDPOINT_URL)"
    )


def stamp_of(facts: dict[str, Any]) -> int:
    """What stands for the content of a stored object: its ETag, or where there is none its time of change."""
    mark = str(facts.get("ETag") or facts.get("etag") or facts.get("LastModified") or facts.get("mtime") or "")
    return stand_in(mark)


def stand_in(text: str) -> int:
    """56 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


@lru_cache(maxsize=8)
def _open_system(protocol: str) -> Any:
    """Nothing of it is cached: what is asked is how things are now.

    Where nobody answers S3's address, that is said after 1 to 3 s; where somebody is silent there, after 90. By itself s3fs takes
    7 s and 6 minutes.
    """
    import fsspec  # only where a URL is given: its S3 part takes a second to import

    options = {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 3}}} if protocol == "s3" else {}
    system = fsspec.filesystem(protocol, use_listings_cache=False, **options)
    if protocol == "s3":
        system.retries = 2  # times those three: for an answer that breaks off
    return system
