"""The errors that a person can mend: each says what, where, expected and found, and the way out."""

from __future__ import annotations


class IchorError(ValueError):
    """A mistake in the input, the parameters or the files; a stage prints it without a traceback."""


class UsageError(IchorError):
    """Arguments that do not go together, or an argument's value that is not allowed; a stage ends with exit code 2."""


class ConfigError(IchorError):
    """A parameter is missing, unknown or has a value that is not allowed."""


class SourceError(IchorError):
    """The DICOM source is missing, empty, or changed underneath us."""


class LabelError(IchorError):
    """The label CSV is not in the Kaggle form, or contradicts itself."""


class StoreError(IchorError):
    """The store is absent, of another format version, or not what the caller needs."""


class DamageError(StoreError):
    """A chunk of the store is missing, cut short, or does not agree with its checksum."""


class ReplacedError(StoreError):
    """The store was replaced by another while it was read."""


class CheckpointError(IchorError):
    """A checkpoint or a finished fold belongs to other parameters or to another store."""
