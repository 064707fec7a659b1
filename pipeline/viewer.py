"""The viewer: a local page to walk the store, study by study, with labels and predictions along the slices.

Served from memory to this machine alone: the socket is on loopback, every address begins with a secret drawn at the start, a Host
header of another name is refused (a foreign page whose name is made to point at 127.0.0.1 sends its own), and nothing but GET is
answered. No path of a request reaches the file system, and nothing is kept in the browser's cache on disk. Each request has a
thread, so that slices scroll while a heat map is made.
"""

from __future__ import annotations

import errno
import hmac
import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd

from pipeline.errors import CheckpointError, DamageError, IchorError, ReplacedError, SourceError
from pipeline.gallery import UNDECIDED
from pipeline.heat import HeatMaps
from pipeline.held_out import Scored, decide, to_studies
from pipeline.labels import LABELS, UNKNOWN
from pipeline.manifest import USED
from pipeline.results import (
    COLUMNS,
    TrainedFold,
    average_folds,
    check_held_out_once,
    check_one_dealing,
    locate,
    read_results,
)
from pipeline.sheet import HEAT_SHARE, SHORT
from pipeline.store import Store

HOST = "127.0.0.1"
LOCAL_NAMES = {HOST, "localhost"}
"""What a Host header may say, with any port: through an SSH tunnel the browser's port may be another than ours."""

SECRET_BYTES = 24
"""192 bits: not to be guessed."""

IDLE_SECONDS = 60
"""After which a silent connection is closed and its thread ends."""

OBLIQUE = 0.2
"""A second letter of orientation is shown from here on: 12°, as most gantries are tilted by less or not at all."""

DECIMALS = 5
"""Of probabilities on the page; it shows three."""

NO_FOLD = -1

PAGE = Path(__file__).with_name("viewer.html")
NONCE = b"{{nonce}}"

Calls = npt.NDArray[np.int8]
"""1 called positive, 0 not, −1 where no label is known."""


@dataclass(frozen=True)
class Predictions:
    """What the trained folds said of the store's slices. S studies, K slots on the slice axis, L labels."""

    probabilities_SKL: npt.NDArray[np.float64]
    """NaN where nothing was predicted."""
    fold_S: npt.NDArray[np.int64]
    """The fold that held the study out; −1 where none did (not predicted, or without labels: then the folds' mean is shown)."""
    folds: tuple[int, ...]
    """Those that could be used."""
    notes: list[str]
    """What the reader of the page should know: what was left out, and why."""


def read_predictions(train: Path, store: Store) -> Predictions:
    """Read the predictions of every fold below `train`, by the evaluation's rules, but for these: it may have been trained with any
    parameters, and what cannot be used is noted, not raised.
    """
    folds: list[TrainedFold] = []
    notes: list[str] = []
    for folder in sorted(train.glob("fold-*"), key=lambda path: (len(path.name), path.name)):
        try:
            folds.append(_read_beside(folds, folder, store))
        except FileNotFoundError as error:
            notes.append(f"{folder.name} is left out: it has no {Path(error.filename).name}; it may still be training")
        except IchorError as error:
            notes.append(f"{folder.name} is left out. {error}")
    probabilities_SKL = np.full((*store.image_id.shape, len(LABELS)), np.nan)
    fold_S = np.full(len(store.study), NO_FOLD, np.int64)
    if folds:
        held_out = pd.concat([result.predictions for result in folds], ignore_index=True)
        fold_S[_put(held_out, store, probabilities_SKL)] = held_out["fold"]
        _put(average_folds(folds), store, probabilities_SKL)
    if np.isnan(probabilities_SKL).all():
        notes.append("No predictions yet; after `dvc repro` they stand here beside the labels")
    return Predictions(probabilities_SKL, fold_S, tuple(result.fold for result in folds), notes)


def _read_beside(folds: list[TrainedFold], folder: Path, store: Store) -> TrainedFold:
    """A fold's results, if they stand beside those of the others as in an evaluation."""
    number = folder.name.removeprefix("fold-")
    if not (number.isascii() and number.isdecimal()):
        raise CheckpointError(f"{folder}: not a fold's folder, such as fold-0")
    result = read_results(folder, int(number), store_digest=store.digest)
    together = [*folds, result]
    check_one_dealing(together)
    check_held_out_once(pd.concat([one.predictions[["image_id", "fold"]] for one in together], ignore_index=True))
    locate(store, pd.concat([result.predictions[COLUMNS], result.unlabelled[COLUMNS]], ignore_index=True))
    return result


def _put(table: pd.DataFrame, store: Store, probabilities_SKL: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Put a table's probabilities where their slices are; the study of each row, int64 [N]."""
    study_N, slice_N = store.slices[locate(store, table)].T
    probabilities_SKL[study_N, slice_N] = table[list(LABELS)].to_numpy(np.float64)
    return study_N


def choose_explainers(predictions: Predictions, study: int) -> tuple[tuple[int, ...], str]:
    """The folds whose networks may explain a study, and who they are, or why there are none.

    Only networks that never learned from the study: where they look in what they know by heart would say little.
    """
    fold = int(predictions.fold_S[study])
    if fold != NO_FOLD:
        return (fold,), f"the CNN of fold {fold}, which never saw this patient"
    if not np.isnan(predictions.probabilities_SKL[study]).all():
        named = ", ".join(map(str, predictions.folds))
        return (
            predictions.folds,
            f"the mean of the CNNs of fold(s) {named}; without labels, none learned from this study",
        )
    if predictions.folds:
        return (), (
            "No heat map: no fold that is trained held this study out, and a network that may have learned from it does not "
            "explain it. With all folds in train.folds (params.yaml), `dvc repro` holds every study out once."
        )
    return (), "No heat map: there are no trained networks of this store yet; `dvc repro` makes them."


Findings = dict[str, dict[str, int]]
"""Study uid → what was done to its files and why, such as ``excluded: garbage`` → how many."""


def read_findings(data: Path) -> Findings:
    """What `index` and `preprocess` excluded and repaired, by study; nothing where their tables are not beside the store.

    Raises:
        SourceError: a table is there and cannot be read.
    """
    columns = ["study_uid", "status", "reason"]
    tables = []
    for path in (data / "index" / "manifest.parquet", data / "preprocess" / "faults.parquet"):
        try:
            tables.append(pd.read_parquet(path, columns=columns, filters=[("status", "!=", USED)]))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError) as error:
            raise SourceError(
                f"{path}: cannot be read ({type(error).__name__}); run `dvc repro` to make it anew"
            ) from None
    findings: Findings = {}
    for table in tables:
        for (uid, status, reason), count in table.value_counts(columns).sort_index().items():
            found = findings.setdefault(uid, {})
            words = f"{status}: {reason.replace('_', ' ')}"
            found[words] = found.get(words, 0) + int(count)
    return findings


class Catalogue:
    """What the page is told of the store and of its studies; pixels are read when a study is opened.

    Args:
        store: the opened store.
        predictions: of its slices.
        findings: what was excluded and repaired on the way into the store.
        heat: makes its heat maps.
    """

    def __init__(self, store: Store, predictions: Predictions, findings: Findings, heat: HeatMaps) -> None:
        self.store, self.predictions, self.findings, self.heat = store, predictions, findings, heat
        probabilities_SKL = predictions.probabilities_SKL
        self.calls_SKL: Calls = np.full(probabilities_SKL.shape, UNKNOWN, np.int8)
        self.study_calls_SL: Calls = np.full((len(store.study), len(LABELS)), UNKNOWN, np.int8)
        self.undecided: list[str] = []
        study_N, slice_N = np.nonzero(~np.isnan(probabilities_SKL[..., 0]))
        if len(study_N):
            slices = Scored(
                store.labels[study_N, slice_N],
                probabilities_SKL[study_N, slice_N],
                study_N,
                store.patient_key[study_N],
                predictions.fold_S[study_N],
            )
            studies = to_studies(slices)
            self.calls_SKL[study_N, slice_N], _ = call(slices)
            self.study_calls_SL[studies.study_N], self.undecided = call(studies)

    def overview(self) -> dict[str, Any]:
        """The store, and of all studies what the list sorts and filters by: one list a fact, six a label, one value a study."""
        store = self.store
        count_S, labels_SL, slices_SL = store.num_slices, store.labels.max(axis=1), (store.labels == 1).sum(axis=1)
        probabilities_SKL = self.predictions.probabilities_SKL
        wrong_SKL = (self.calls_SKL != UNKNOWN) & (self.calls_SKL != store.labels)
        return {
            "digest": store.digest[:12],
            "image_size": store.image_size,
            "windows": [
                {"name": name, "centre": window.centre, "width": window.width} for name, window in store.windows.items()
            ],
            "labels": list(LABELS),
            "short": [SHORT.get(name, "ICH") for name in LABELS],
            "heat": {"colours": heat_colours(), "share": HEAT_SHARE},
            "notes": self.predictions.notes,
            "undecided": self.undecided,
            "studies": {
                "uid": store.study.tolist(),
                "slices": count_S.tolist(),
                "fold": self.predictions.fold_S.tolist(),
                "label": labels_SL.T.tolist(),
                "positives": slices_SL.T.tolist(),
                "probability": _columns(_highest(probabilities_SKL, ~np.isnan(probabilities_SKL))),
                "lowest_of_positives": _columns(1 - _highest(1 - probabilities_SKL, store.labels == 1)),
                "highest_of_negatives": _columns(_highest(probabilities_SKL, store.labels == 0)),
                "call": self.study_calls_SL.T.tolist(),
                "findings": [sum(self.findings.get(uid, {}).values()) for uid in store.study.tolist()],
                "missed": (wrong_SKL & (store.labels == 1)).sum(axis=1).T.tolist(),
                "false": (wrong_SKL & (store.labels == 0)).sum(axis=1).T.tolist(),
            },
        }

    def describe_study(self, study: int) -> dict[str, Any]:
        """All but the pixels of one study: its slices' positions, labels, probabilities and calls."""
        store, count = self.store, int(self.store.num_slices[study])
        right, bottom = name_directions(store.per_study["orientation"][study])
        folds, explainers = choose_explainers(self.predictions, study)
        facts = {name: float(store.per_study[name][study]) for name in ("slice_spacing_mm", "thickness_mm", "tilt_deg")}
        return {
            "study": study,
            "slices": count,
            "findings": self.findings.get(str(store.study[study]), {}),
            "right": right,
            "left": _opposite(right),
            "bottom": bottom,
            "top": _opposite(bottom),
            "side_mm": _number(float(store.per_study["box_mm"][study][2])),
            **{name: _number(value) for name, value in facts.items()},
            "position_mm": _numbers(store.position_mm[study, :count].astype(np.float64)),
            "labels": store.labels[study, :count].tolist(),
            "probabilities": [_numbers(row) for row in self.predictions.probabilities_SKL[study, :count]],
            "calls": self.calls_SKL[study, :count].tolist(),
            "explainable": bool(folds),
            "explainers": explainers,
        }

    def read_study(self, study: int) -> bytes:
        """One study in one piece: a line of JSON (`describe_study`, and `damaged`: slice → what is wrong with it), then its pixels.

        The pixels are uint8 [slice, row, column, window]; a damaged slice is black there.
        """
        pixels_SRCW = np.zeros((int(self.store.num_slices[study]), *self.store.reader.shape), np.uint8)
        damaged = {}
        for number in range(len(pixels_SRCW)):
            try:
                self.store.reader.read_into(study, number, pixels_SRCW[number])
            except DamageError as damage:
                pixels_SRCW[number] = 0
                damaged[number] = str(damage)
        head = {**self.describe_study(study), "damaged": damaged}
        return _to_json(head) + b"\n" + pixels_SRCW.tobytes()

    def read_heat(self, study: int, slice_number: int, label: int) -> bytes:
        """A heat map: a line of JSON (`trouble`: why there is none), then uint8 [row, column] if there is one."""
        folds, explainers = choose_explainers(self.predictions, study)
        try:
            if not folds:
                raise IchorError(explainers)
            heat = self.heat.make(study, slice_number, label, folds=folds)
        except IchorError as error:
            return _to_json({"trouble": str(error)}) + b"\n"
        return _to_json({"trouble": ""}) + b"\n" + heat.tobytes()

    def has(self, study: int, slice_number: int = 0, label: int = 0) -> bool:
        """Whether there is such a study, with such a slice, and such a label."""
        counts = self.store.num_slices
        return study < len(counts) and slice_number < counts[study] and label < len(LABELS)


def call(scored: Scored) -> tuple[Calls, list[str]]:
    """Call every row as the evaluation does: at a threshold that was chosen on other patients.

    Returns:
        int8 [N, L]; and the labels that have too few patients for that, which are called at 0.5.
    """
    calls_NL = np.full(scored.labels_NL.shape, UNKNOWN, np.int8)
    undecided = []
    for label, name in enumerate(LABELS):
        known_N, _, probability = scored.of(label)
        decisions = decide(scored, label)
        calls_NL[known_N, label] = probability >= UNDECIDED if decisions is None else decisions.called
        if decisions is None:
            undecided.append(name)
    return calls_NL, undecided


def heat_colours() -> str:
    """The colours of a heat map, coldest to hottest, each as six hexadecimal digits: those of `pipeline.sheet.blend_heat`."""
    ramp_1C = np.arange(256, dtype=np.uint8)[None]
    return cv2.applyColorMap(ramp_1C, cv2.COLORMAP_INFERNO)[..., ::-1].tobytes().hex()


LIKELIEST = "likeliest"
"""Instead of a label's name: the subtype that each slice is said to show most probably."""


def make_fragment(store: Store, *, study: str | None, slice_number: int | None, heat: str | None) -> str:
    """What follows the page's address to show a study, a slice of it (from 1, as the page counts) and a label's heat map.

    Raises:
        IchorError: there is no such study or slice.
    """
    if study is None:
        if slice_number is not None:
            raise IchorError(f"--slice {slice_number}: of which study? Give --study UID or N too")
        return f"#heat={heat}" if heat else ""
    number = store.find_study(study)
    words = [f"study={number}"]
    if slice_number is not None:
        count = int(store.num_slices[number])
        if not 1 <= slice_number <= count:
            raise IchorError(f"--slice {slice_number}: study {number} has slices 1 to {count}")
        words.append(f"slice={slice_number}")
    return "#" + "&".join([*words, f"heat={heat}"] if heat else words)


def name_directions(cosines: npt.NDArray[np.floating]) -> tuple[str, str]:
    """The letters at a slice's right and lower edge, from the direction cosines of its rows and columns, [6].

    R and L, A and P, H and F, for where that edge lies in the patient (PS3.3 C.7.6.1.1.1); the larger first, as in ``PF``.
    """
    return _name_direction(cosines[:3].tolist()), _name_direction(cosines[3:].tolist())


def _name_direction(cosines: Sequence[float]) -> str:
    letters = [pair[int(value < 0)] for pair, value in zip(("LR", "PA", "HF"), cosines, strict=True)]
    order = sorted(range(3), key=lambda axis: -abs(cosines[axis]))
    return "".join(letters[axis] for axis in order[:2] if abs(cosines[axis]) > OBLIQUE)


def _opposite(letters: str) -> str:
    return letters.translate(str.maketrans("LRPAHF", "RLAPFH"))


def _highest(values_SKL: npt.NDArray[np.float64], chosen_SKL: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The highest of a study's chosen slices, float64 [study, label]; NaN where none of them has a value."""
    highest_SL = np.where(chosen_SKL & ~np.isnan(values_SKL), values_SKL, -np.inf).max(axis=1)
    return np.where(np.isfinite(highest_SL), highest_SL, np.nan)


def _columns(values_SL: npt.NDArray[np.float64]) -> list[list[float | None]]:
    """One list a label, with a number a study."""
    return [_numbers(column) for column in values_SL.T]


def _numbers(values: npt.NDArray[np.float64]) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | None:
    """Rounded; None for what is no number, as JSON has no word for it."""
    return round(value, DECIMALS) if np.isfinite(value) else None


def _to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


class ViewerServer(ThreadingHTTPServer):
    """Serves the page and the studies on loopback.

    Args:
        catalogue: what there is to see.
        port: 0 takes any free one.

    Raises:
        IchorError: the port is taken, or not ours to take.
    """

    daemon_threads = True  # a browser keeps connections open; leaving must not wait for them

    def __init__(self, catalogue: Catalogue, *, port: int = 0) -> None:
        self.catalogue = catalogue
        self.secret, self.knock = secrets.token_urlsafe(SECRET_BYTES), secrets.token_urlsafe(SECRET_BYTES)
        self.overview, self.page = _to_json(catalogue.overview()), PAGE.read_bytes()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            why = "another program has it" if error.errno == errno.EADDRINUSE else "the system keeps it for itself"
            raise IchorError(f"--port {port}: {why}; give another, or none, and a free one is taken") from None

    @property
    def url(self) -> str:
        """The page's address, which holds the secret."""
        return f"http://{HOST}:{self.server_port}/{self.secret}/"

    @property
    def knock_url(self) -> str:
        """An address that leads to the page once: a browser's command line, where it will stand, may be read by other users."""
        return f"http://{HOST}:{self.server_port}/{self.knock}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up amid an answer is no fault."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: ViewerServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "ichor", ""
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        if not self._asks_us():
            self._say(
                HTTPStatus.FORBIDDEN, "This page is served to this machine under the name 127.0.0.1 or localhost."
            )
            return
        secret, slash, rest = self.path.removeprefix("/").partition("/")
        if self._is(secret, self.server.knock):
            self.server.knock = secrets.token_urlsafe(SECRET_BYTES)
            self._answer(HTTPStatus.SEE_OTHER, b"", "text/plain", {"Location": f"/{self.server.secret}/"})
        elif slash and self._is(secret, self.server.secret):
            try:
                self._route(rest)
            except ReplacedError as error:
                self._say(HTTPStatus.CONFLICT, str(error))
        else:
            self._say(
                HTTPStatus.NOT_FOUND, "Nothing here: open the whole address that `python -m stages.view` printed."
            )

    def _route(self, path: str) -> None:
        catalogue, (name, *rest) = self.server.catalogue, path.split("/")
        numbers = _to_numbers(rest)
        if path == "":
            self._answer_page()
        elif path == "overview":
            self._answer(HTTPStatus.OK, self.server.overview, "application/json")
        elif name == "study" and len(numbers) == 1 and catalogue.has(*numbers):
            self._answer(HTTPStatus.OK, catalogue.read_study(*numbers), "application/octet-stream")
        elif name == "heat" and len(numbers) == 3 and catalogue.has(*numbers):
            self._answer(HTTPStatus.OK, catalogue.read_heat(*numbers), "application/octet-stream")
        else:
            self._say(HTTPStatus.NOT_FOUND, "No such page, study or slice.")

    def _answer_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        page = self.server.page.replace(NONCE, nonce.encode())
        self._answer(HTTPStatus.OK, page, "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def _asks_us(self) -> bool:
        hosts = self.headers.get_all("Host", [])
        name, _, port = hosts[0].partition(":") if len(hosts) == 1 else ("", "", "")
        return name.lower() in LOCAL_NAMES and (not port or port.isdecimal())

    @staticmethod
    def _is(given: str, expected: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())

    def _refuse(self) -> None:
        self.close_connection = True  # what follows may be a body that nobody reads
        self._say(HTTPStatus.METHOD_NOT_ALLOWED, "Read only: GET is all there is.", {"Allow": "GET"})

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_CONNECT = do_TRACE = _refuse

    def _say(self, status: HTTPStatus, text: str, headers: dict[str, str] | None = None) -> None:
        self._answer(status, f"{text}\n".encode(), "text/plain; charset=utf-8", headers)

    def _answer(self, status: HTTPStatus, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        always = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",  # pictures of patients stay off the disk; the page keeps what it needs in memory
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in {**always, **(headers or {})}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: an address holds the secret."""


def _to_numbers(words: list[str]) -> list[int]:
    """Each as a number; none of them where one is not."""
    fit = all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words)
    return [int(word) for word in words] if fit else []
