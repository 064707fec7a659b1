"""The types of `params.yaml`: one section a stage, strict, every value said once (here are the types, there the values).

An unknown key, a missing key or a value out of range is refused with the key, the value and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigError
from pipeline.labels import LABELS

MODELS = (
    "compact",
    "densenet121",
    "densenet169",
    "densenet201",
    *(f"efficientnet-b{number}" for number in range(8)),
    "resnet18",
    "resnet34",
    "resnet50",
    "seresnet50",
    "seresnext50",
    "seresnext101",
)

SMALLEST_OF_BACKBONES = 32
"""Rows and columns that every one of MONAI's backbones can take: they halve them five times."""

SERIES_RULES = ("soft_tissue", "bone", "thin", "most_slices")
"""Which of a study's series is wanted: see `pipeline.series`."""

PositiveInt = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
PathText = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NaturalFloat = Annotated[float, Field(ge=0.0)]

ALL_WINDOWS = "all"
"""Where a window is asked for: every one of them."""


def _refuse_odd_name(name: str) -> str:
    if name == ALL_WINDOWS or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"expected as a window's name a small letter, then small letters, digits and _, and not {ALL_WINDOWS}, which stands for "
            f"every one"
        )
    return name


WindowName = Annotated[str, AfterValidator(_refuse_odd_name)]

UNION_MEMBERS = ("str", "bool", "int", "constrained-int", "constrained-str", "none", "literal['auto']")
"""What pydantic adds to a key whose value may have one of several types."""


PYDANTICS_WORDS = re.compile(
    r"^(Value error, |Input should be |(String|List|Dictionary) should have )| after validation| or instance of \w+"
)
"""What its messages have around that which is allowed."""

LONGEST_SALT = 64
"""Bytes of a BLAKE2b key."""


class Section(BaseModel):
    """A section of `params.yaml`: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Source(Section):
    """Where the studies and their labels lie."""

    dicom: PathText | Annotated[list[PathText], Field(min_length=1)]
    labels: PathText | None

    @property
    def entries(self) -> list[str]:
        """The sources as a list, whether one or several were given: folders, files, zips, globs and URLs."""
        return [self.dicom] if isinstance(self.dicom, str) else list(self.dicom)

    @property
    def is_phantom(self) -> bool:
        """Whether the labels are the made-up cohort's, of which no figure says anything about patients."""
        return Path(self.labels or "").parts[-2:] == ("phantom", "labels.csv")


class PhantomConfig(Section):
    """The made-up cohort for people with no data of their own."""

    studies: Annotated[int, Field(ge=1)]
    slices: Annotated[list[Annotated[int, Field(ge=8, le=60)]], Field(min_length=2, max_length=2)]
    size: Annotated[int, Field(ge=64, le=1024)]
    seed: Natural

    @model_validator(mode="after")
    def _fewest_before_most(self) -> PhantomConfig:
        if self.slices[0] > self.slices[1]:
            raise ValueError(f"slices is [fewest, most], and {self.slices[0]} is more than {self.slices[1]}")
        return self


class IndexConfig(Section):
    """How headers are read, and which slices are wanted."""

    patient_salt: Annotated[str, Field(min_length=1)]
    series: Literal[SERIES_RULES]  # type: ignore[valid-type]
    chosen_series: list[PathText]
    max_excluded_fraction: Fraction

    @model_validator(mode="after")
    def _short_enough_for_a_key(self) -> IndexConfig:
        if len(self.patient_salt.encode()) > LONGEST_SALT:
            raise ValueError(
                f"patient_salt has {len(self.patient_salt.encode())} bytes, at most {LONGEST_SALT} are allowed"
            )
        return self


class Window(Section):
    """A window in HU: its centre and its whole width (PS3.3 C.11.2.1.2, LINEAR_EXACT)."""

    centre: float
    width: Annotated[float, Field(ge=1.0)]

    @property
    def low_hu(self) -> float:
        """The HU that becomes 0."""
        return self.centre - self.width / 2

    @property
    def high_hu(self) -> float:
        """The HU that becomes 255."""
        return self.centre + self.width / 2


class PreprocessConfig(Section):
    """What becomes of the pixels, and who does the work."""

    image_size: Annotated[int, Field(ge=16, le=2048)]
    crop: Literal["none", "head"]
    windows: Annotated[dict[WindowName, Window], Field(min_length=1)]
    workers: Natural | Literal["auto"]
    scheduler: Annotated[str, Field(min_length=1)] | None


class FoldsConfig(Section):
    """How patients are dealt to folds."""

    count: Annotated[int, Field(ge=2, le=100)]
    seed: Natural


class AugmentConfig(Section):
    """Random changes to a training slice; 0 turns one off."""

    flip: Fraction
    rotate_deg: Annotated[float, Field(ge=0, le=180)]
    shift: Annotated[float, Field(ge=0, le=0.5)]
    scale: Annotated[float, Field(ge=0, lt=1)]
    brightness: Fraction
    contrast: Fraction
    noise: Fraction
    cutout: Fraction


class LossConfig(Section):
    """Options of the weighted multi-label log loss; at 0 each is the challenge's own metric."""

    focal_gamma: NaturalFloat
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    any_consistency: NaturalFloat
    positive_weights: Annotated[list[PositiveFloat], Field(min_length=len(LABELS), max_length=len(LABELS))]


class SamplingConfig(Section):
    """How often a slice is drawn in an epoch; `balance` 0 and `negatives` 1: each exactly once."""

    balance: Fraction
    negatives: Annotated[float, Field(gt=0, le=1)]


class SequenceConfig(Section):
    """The model over a study's slices, trained on what the CNN sees in each."""

    kind: Literal["none", "gru", "transformer"]
    width: Annotated[int, Field(ge=8, le=2048)]
    layers: Annotated[int, Field(ge=1, le=12)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    epochs: PositiveInt
    learning_rate: PositiveFloat
    weight_decay: NaturalFloat

    @model_validator(mode="after")
    def _even_width(self) -> SequenceConfig:
        if self.width % 8:
            raise ValueError(f"width is {self.width}, and must be a multiple of 8")
        return self


class TrainConfig(Section):
    """The model, and how it learns."""

    folds: Annotated[list[Natural], Field(min_length=1)]
    validation_fraction: Annotated[float, Field(gt=0, le=0.5)]
    model: Literal[MODELS]  # type: ignore[valid-type]
    pretrained: bool | PathText
    neighbours: Annotated[int, Field(ge=0, le=8)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    epochs: PositiveInt
    patience: PositiveInt
    batch_size: PositiveInt
    accumulate: PositiveInt
    sampling: SamplingConfig
    learning_rate: PositiveFloat
    schedule: Literal["cosine", "step"]
    step_decay: Annotated[float, Field(gt=0, le=1)]
    warmup_epochs: NaturalFloat
    weight_decay: NaturalFloat
    clip_norm: PositiveFloat
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    mixup: NaturalFloat
    snapshots: PositiveInt
    test_flips: bool
    seed: Natural
    augment: AugmentConfig
    loss: LossConfig
    sequence: SequenceConfig
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    compile: bool
    device: str
    loader_workers: Natural
    checkpoint_seconds: PositiveFloat

    @model_validator(mode="after")
    def _each_fold_once(self) -> TrainConfig:
        if len(set(self.folds)) != len(self.folds):
            raise ValueError(f"folds names a fold twice: {self.folds}")
        return self

    def shaping(self) -> dict[str, Any]:
        """The values that decide the weights: all but which folds to train and where and how conveniently."""
        return self.model_dump(exclude={"folds", "device", "loader_workers", "checkpoint_seconds"})


class EvaluateConfig(Section):
    """How scores are given."""

    prevalence: Annotated[float, Field(gt=0, lt=1)]
    bootstrap: Annotated[int, Field(ge=100, le=100_000)]
    seed: Natural


class Config(Section):
    """All of `params.yaml`."""

    source: Source
    phantom: PhantomConfig
    index: IndexConfig
    preprocess: PreprocessConfig
    folds: FoldsConfig
    train: TrainConfig
    evaluate: EvaluateConfig

    @model_validator(mode="after")
    def _folds_exist(self) -> Config:
        absent = [fold for fold in self.train.folds if fold >= self.folds.count]
        if absent:
            raise ValueError(
                f"train.folds = {self.train.folds} names fold {absent[0]}, but folds.count = {self.folds.count} makes "
                f"folds 0 to {self.folds.count - 1}"
            )
        return self

    @model_validator(mode="after")
    def _large_enough_for_the_model(self) -> Config:
        if self.train.model != "compact" and self.preprocess.image_size < SMALLEST_OF_BACKBONES:
            raise ValueError(
                f"preprocess.image_size = {self.preprocess.image_size} is too small for train.model = {self.train.model!r}, which "
                f"takes {SMALLEST_OF_BACKBONES} and more; compact takes smaller ones"
            )
        return self


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which of two equal keys would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def load_config(path: Path | str = "params.yaml") -> Config:
    """Read and check a parameter file.

    Raises:
        ConfigError: the file is absent, is not YAML, or holds a key or value that is not allowed; every fault is named.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such parameter file; run from the project's folder or give --params FILE"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: expected sections ({', '.join(Config.model_fields)}), found {type(values).__name__}"
        )
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        faults = _describe(error)
        raise ConfigError(
            f"{path}: {len(faults)} parameter(s) to mend\n" + "\n".join(f"  {fault}" for fault in faults)
        ) from None


def _describe(error: ValidationError) -> list[str]:
    """A line for each key at fault: key, value, what is allowed (pydantic has a fault for each type that a key may have)."""
    allowed: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    lines: list[str] = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"] if str(part) not in UNION_MEMBERS and "[" not in str(part))
        message = PYDANTICS_WORDS.sub("", fault["msg"])
        if fault["type"] == "missing":
            lines.append(f"{key}: missing; every key stands in the parameter file")
        elif fault["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key")
        elif fault["type"] == "value_error":
            lines.append(f"{key}: {message}" if key else message)
        else:
            values[key] = fault["input"]
            if fault["type"] == "float_type" and _is_number(fault["input"]):
                message += " (to YAML this is text: an exponent needs a point before it and a sign, as in 2.0e-3)"
            allowed.setdefault(key, []).append(message)
    return lines + [f"{key} = {values[key]!r}: expected {' or '.join(messages)}" for key, messages in allowed.items()]


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and float(value) == float(value)
    except ValueError:
        return False


def without_folders(train: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a training run for others' eyes: the folders on the way to pretrained weights may name a person."""
    pretrained = train["pretrained"]
    return {**train, "pretrained": Path(pretrained).name if isinstance(pretrained, str) else pretrained}


def differences(found: Any, expected: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key → (found, expected) wherever two nested mappings disagree."""
    if isinstance(found, dict) and isinstance(expected, dict):
        nested = {}
        for name in [*expected, *(name for name in found if name not in expected)]:
            nested.update(differences(found.get(name), expected.get(name), f"{key}.{name}" if key else name))
        return nested
    return {} if found == expected else {key: (found, expected)}
