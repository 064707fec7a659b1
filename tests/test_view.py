"""The viewer: what it serves and to whom, and that its page works in a real browser (driven over Chromium's own debugging pipe)."""

from __future__ import annotations

import base64
import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pipeline import heat
from pipeline.checkpoint import MODEL_FORMAT
from pipeline.config import load_config
from pipeline.errors import IchorError, SourceError
from pipeline.files import replace_folder
from pipeline.gradcam import explain_slices
from pipeline.heat import HeatMaps
from pipeline.index import build_manifest
from pipeline.labels import LABELS
from pipeline.manifest import write_manifest
from pipeline.model import SliceNet, build_model
from pipeline.preprocess import preprocess
from pipeline.reader import shard_name
from pipeline.results import SUMMARY
from pipeline.sheet import HEAT_SHARE, blend_heat
from pipeline.store import Store
from pipeline.viewer import Catalogue, ViewerServer, make_fragment, name_directions, read_findings, read_predictions
from tests.conftest import ROOT, Cohort

STUDIES, SLICES = 6, 8
SEED_OF_A_VARIED_MAP = 1
PATIENCE_S = 20


def write_fold(
    data: Path, store: Store, *, fold: int, studies: list[int], digest: str = "", dealing: str = ""
) -> pd.DataFrame:
    """A fold's results: slices labelled positive get 0.9, others 0.1, but for one miss and one false alarm in study 0."""
    rows = []
    for study in studies:
        for number in range(int(store.num_slices[study])):
            values = np.where(store.labels[study, number] == 1, 0.9, 0.1)
            if study == 0 and number in (3, 6):  # 3 is labelled, 6 is not
                values = 1 - values
            rows.append([store.image_id[study, number], store.study[study], fold, *values])
    table = pd.DataFrame(rows, columns=["image_id", "study_uid", "fold", *LABELS])
    folder = data / "train" / f"fold-{fold}"
    folder.mkdir(parents=True)
    table.to_parquet(folder / "predictions.parquet")
    table[:0].to_parquet(folder / "unlabelled.parquet")
    pd.DataFrame({"epoch": [1], "train_loss": 0.5, "valid_loss": 0.5}).to_csv(folder / "history.csv", index=False)
    summary = dict.fromkeys(SUMMARY, 1) | {
        "fold": fold,
        "store_digest": digest or store.digest,
        "folds_digest": dealing,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return table


def write_networks(store: Store, *, fold: int, seed: int = 0, changes: dict[str, Any] | None = None) -> SliceNet:
    """A fold's model.pt, as training leaves it, of a network that has learned nothing."""
    torch.manual_seed(seed)
    params = load_config(ROOT / "params.yaml").train.shaping()
    channels = store.reader.shape[2] * (2 * params["neighbours"] + 1)
    network = build_model("compact", channels=channels, dropout=0.0)
    content = {
        "format": MODEL_FORMAT,
        "members": [network.state_dict()],
        "sequence": None,
        "windows": {name: window.model_dump() for name, window in store.windows.items()},
        "image_size": store.image_size,
        "params": {**params, "sequence": {"kind": "none"}},
        "fold": fold,
        "store_digest": store.digest,
        "crop": "none",
        "scope": {},
        **(changes or {}),
    }
    torch.save(content, store.path.parent / "train" / f"fold-{fold}" / "model.pt")
    return network.eval()


def explain(store: Store, networks: list[SliceNet], study: int, number: int, label: int) -> np.ndarray:
    """The heat map by `pipeline.gradcam` itself, 0 to 1."""
    where, device = np.array([[study, number]]), torch.device("cpu")
    return explain_slices(networks, store.reader, where, np.array([label]), neighbours=1, device=device)[0]


def make_store(folder: Path) -> Store:
    """Even studies bleed (subdural) in slices 2 to 4, odd ones nowhere, the last has no labels."""
    cohort = Cohort(folder)
    for number in range(STUDIES):
        bleeding = [[0, 0, 0, 0, 1, 1] if number % 2 == 0 and k in (2, 3, 4) else [0] * 6 for k in range(SLICES)]
        cohort.add_study(number, SLICES, labels=[None] * SLICES if number == STUDIES - 1 else bleeding)
    config = cohort.config()
    manifest, _, _ = build_manifest(config)
    preprocess(config, manifest, data=cohort.data)
    return Store(cohort.data / "store.zarr")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort's data folder, for all tests; each works on its own copy."""
    return make_store(tmp_path_factory.mktemp("made")).path.parent


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    return Store(shutil.copytree(made, tmp_path / "data") / "store.zarr")


def catalogue_of(store: Store) -> Catalogue:
    data = store.path.parent
    heat = HeatMaps(store, data / "train")
    return Catalogue(store, read_predictions(data / "train", store), read_findings(data), heat)


def serve(store: Store) -> Iterator[ViewerServer]:
    with ViewerServer(catalogue_of(store)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(store: Store) -> Iterator[ViewerServer]:
    yield from serve(store)


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
        content: bytes = answer.read()
    return content


def ask(server: ViewerServer, method: str, path: str, **headers: str) -> http.client.HTTPResponse:
    """A request as it is said, word for word; the body is read."""
    lines = [
        f"{method} {path} HTTP/1.1",
        *(f"{name}: {value}" for name, value in {"Host": "localhost", **headers}.items()),
    ]
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=PATIENCE_S) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = http.client.HTTPResponse(connection, method=method)
        answer.begin()
        answer.read()
    return answer


def split(body: bytes, store: Store) -> tuple[dict[str, Any], np.ndarray]:
    head, _, pixels = body.partition(b"\n")
    return json.loads(head), np.frombuffer(pixels, np.uint8).reshape(-1, *store.reader.shape)


def test_a_study_comes_whole_and_equal_to_the_store(server: ViewerServer, store: Store) -> None:
    for study in range(STUDIES):
        head, pixels = split(get(f"{server.url}study/{study}"), store)
        np.testing.assert_array_equal(pixels, store.reader.read_study(study))
        assert head["labels"] == store.labels[study, :SLICES].tolist()
        np.testing.assert_allclose(head["position_mm"], store.position_mm[study, :SLICES], atol=1e-4)
        assert head["damaged"] == {}
        assert (head["left"], head["right"], head["top"], head["bottom"]) == ("R", "L", "A", "P")


def test_without_predictions_all_but_them_is_there(server: ViewerServer) -> None:
    overview = json.loads(get(f"{server.url}overview"))
    assert "No predictions yet" in overview["notes"][0]
    assert overview["studies"]["probability"] == [[None] * STUDIES] * len(LABELS)
    assert overview["studies"]["label"][5] == [1, 0, 1, 0, 1, -1]
    assert overview["studies"]["positives"][4] == [3, 0, 3, 0, 3, 0]
    assert [window["name"] for window in overview["windows"]] == ["brain", "subdural", "soft"]


def test_predictions_stand_beside_their_slices(store: Store) -> None:
    table = write_fold(store.path.parent, store, fold=1, studies=[0, 1, 2, 3])
    catalogue = catalogue_of(store)
    studies = catalogue.overview()["studies"]
    highest = table.groupby("study_uid")["any"].max()
    assert studies["probability"][5][:4] == [pytest.approx(highest[uid]) for uid in store.study[:4]]
    assert studies["probability"][5][4:] == [None, None]
    assert studies["fold"] == [1, 1, 1, 1, -1, -1]
    assert studies["lowest_of_positives"][5][:4] == [pytest.approx(0.1), None, pytest.approx(0.9), None]
    assert studies["highest_of_negatives"][5][:2] == [pytest.approx(0.9), pytest.approx(0.1)]
    assert (studies["missed"][5][0], studies["false"][5][0]) == (1, 1)
    assert sum(studies["missed"][5]) + sum(studies["false"][5]) == 2
    head = catalogue.describe_study(0)
    rows = table[table["study_uid"] == store.study[0]]
    np.testing.assert_allclose(head["probabilities"], rows[list(LABELS)].to_numpy(), atol=1e-5)
    assert [row[5] for row in head["calls"]] == [0, 0, 1, 0, 1, 0, 1, 0]


def test_calls_are_those_of_the_evaluation(store: Store) -> None:
    from pipeline.held_out import Scored, decide

    table = write_fold(store.path.parent, store, fold=0, studies=[0, 1, 2, 3, 4])
    catalogue = catalogue_of(store)
    slices = store.slices[: len(table)]
    scored = Scored(
        store.labels[slices[:, 0], slices[:, 1]],
        table[list(LABELS)].to_numpy(),
        slices[:, 0],
        store.patient_key[slices[:, 0]],
        table["fold"].to_numpy(np.int64),
    )
    decisions = decide(scored, LABELS.index("any"))
    assert decisions is not None
    np.testing.assert_array_equal(catalogue.calls_SKL[slices[:, 0], slices[:, 1], 5], decisions.called)
    assert set(catalogue.undecided) == set(LABELS) - {"subdural", "any"}  # nothing of theirs is labelled
    assert (catalogue.calls_SKL[5] == -1).all()  # without a label there is no right and wrong


def test_several_folds_are_one_and_unlabelled_studies_get_their_mean(store: Store) -> None:
    data = store.path.parent
    write_fold(data, store, fold=0, studies=[0, 1])
    write_fold(data, store, fold=1, studies=[2, 3, 4])
    for fold, value in ((0, 0.2), (1, 0.6)):
        rows = {"image_id": store.image_id[5, :SLICES], "study_uid": store.study[5], "fold": fold}
        table = pd.DataFrame({**rows, **dict.fromkeys(LABELS, value)})
        table.to_parquet(data / "train" / f"fold-{fold}" / "unlabelled.parquet")
    predictions = read_predictions(data / "train", store)
    assert predictions.fold_S.tolist() == [0, 0, 1, 1, 1, -1]
    np.testing.assert_allclose(predictions.probabilities_SKL[5, :SLICES], 0.4)
    assert predictions.notes == []


def test_folds_that_cannot_be_used_are_named_and_left_out(store: Store) -> None:
    data = store.path.parent
    write_fold(data, store, fold=0, studies=[0])
    write_fold(data, store, fold=1, studies=[1], digest="f" * 64)
    write_fold(data, store, fold=2, studies=[2])
    (data / "train" / "fold-2" / "predictions.parquet").write_bytes(b"PAR1 and nothing")
    write_fold(data, store, fold=3, studies=[0])
    (data / "train" / "fold-4").mkdir()
    table = write_fold(data, store, fold=5, studies=[3])
    table.assign(any=1.5).to_parquet(data / "train" / "fold-5" / "predictions.parquet")
    write_fold(data, store, fold=6, studies=[3])
    table.assign(fold=6, image_id=[f"x{row}" for row in range(len(table))]).to_parquet(
        data / "train" / "fold-6" / "predictions.parquet"
    )
    write_fold(data, store, fold=7, studies=[4], dealing="another")
    (write_fold(data, store, fold=8, studies=[4]).assign(subdural="high")).to_parquet(
        data / "train" / "fold-8" / "predictions.parquet"
    )
    write_fold(data, store, fold=9, studies=[4])
    (data / "train" / "fold-9" / "history.csv").unlink()
    (data / "train" / "fold-old").mkdir()
    predictions = read_predictions(data / "train", store)
    expected = {
        "fold-1": "was trained on store ffffffffffff",
        "fold-2": "cannot be read",
        "fold-3": "held out twice",
        "fold-4": "has no summary.json; it may still be training",
        "fold-5": "no probability in 0 to 1",
        "fold-6": "the store does not hold",
        "fold-7": "different fold tables",
        "fold-8": "no numbers",
        "fold-9": "has no history.csv",
        "fold-old": "not a fold's folder",
    }
    assert predictions.folds == (0,)
    assert len(predictions.notes) == len(expected)
    for note, (fold, why) in zip(predictions.notes, expected.items(), strict=True):
        assert note.startswith(f"{fold} is left out")
        assert why in note
    assert predictions.fold_S.tolist() == [0, -1, -1, -1, -1, -1]
    assert np.isnan(predictions.probabilities_SKL[1:]).all()


def test_a_damaged_slice_is_named_and_the_others_are_there(store: Store) -> None:
    sound = store.reader.read_study(1)
    path = store.path / "pixels" / shard_name(1, 0)
    content = bytearray(path.read_bytes())
    offset, length = store.reader._find_chunk(1, 5)
    content[offset + length // 2] ^= 1
    path.chmod(0o644)
    path.unlink()
    path.write_bytes(content)
    for server in serve(Store(store.path)):
        head, pixels = split(get(f"{server.url}study/1"), store)
        assert list(head["damaged"]) == ["5"]
        assert "slice 5: its checksum disagrees" in head["damaged"]["5"]
        assert not pixels[5].any()
        np.testing.assert_array_equal(np.delete(pixels, 5, axis=0), np.delete(sound, 5, axis=0))


def test_what_was_excluded_and_repaired_is_told_of_its_study(tmp_path: Path) -> None:
    cohort = Cohort(tmp_path)
    for number in range(3):
        cohort.add_study(number, 5)
    path = cohort.dicom / "ID_000010003.dcm"
    path.write_bytes(path.read_bytes()[:-700])  # cut short
    noise = cohort.rng.integers(0, 4096, (64, 64)).astype("<u2").tobytes()
    path = cohort.dicom / "ID_000010002.dcm"
    path.write_bytes(path.read_bytes()[: -len(noise)] + noise)
    config = cohort.config()
    manifest, _, _ = build_manifest(config)
    write_manifest(cohort.data / "index" / "manifest.parquet", manifest)
    preprocess(config, manifest, data=cohort.data)
    catalogue = catalogue_of(Store(cohort.data / "store.zarr"))
    assert catalogue.overview()["studies"]["findings"] == [0, 2, 0]
    assert catalogue.describe_study(1)["findings"] == {"excluded: garbage": 1, "excluded: truncated pixels": 1}
    assert catalogue.describe_study(0)["findings"] == {}
    (cohort.data / "index" / "manifest.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(SourceError, match=r"manifest\.parquet: cannot be read"):
        read_findings(cohort.data)
    assert read_findings(tmp_path / "elsewhere") == {}


@pytest.mark.parametrize(
    ("cosines", "letters"),
    [
        ((1, 0, 0, 0, 1, 0), ("L", "P")),
        ((-1, 0, 0, 0, -1, 0), ("R", "A")),
        ((1, 0, 0, 0, 0.95, -0.31), ("L", "PF")),
        ((0, 1, 0, 0, 0, -1), ("P", "F")),
        ((0.99, 0.1, 0, -0.1, 0.99, 0), ("L", "P")),
        ((np.nan,) * 6, ("", "")),
    ],
)
def test_letters_of_orientation(cosines: tuple[float, ...], letters: tuple[str, str]) -> None:
    assert name_directions(np.array(cosines, np.float32)) == letters


# ---- heat maps


def ask_heat(server: ViewerServer, study: int, number: int, label: int) -> tuple[str, np.ndarray]:
    """What is in the way of it, and the map."""
    head, _, pixels = get(f"{server.url}heat/{study}/{number}/{label}").partition(b"\n")
    return json.loads(head)["trouble"], np.frombuffer(pixels, np.uint8)


def test_a_heat_map_is_by_the_fold_that_never_saw_the_study(store: Store) -> None:
    data = store.path.parent
    networks = []
    for fold, studies in ((0, [0, 1]), (1, [2, 3])):
        write_fold(data, store, fold=fold, studies=studies)
        networks.append(write_networks(store, fold=fold, seed=fold))
        rows = {"image_id": store.image_id[5, :SLICES], "study_uid": store.study[5], "fold": fold}
        table = pd.DataFrame({**rows, **dict.fromkeys(LABELS, 0.5)})
        table.to_parquet(data / "train" / f"fold-{fold}" / "unlabelled.parquet")
    size = store.image_size
    for server in serve(store):
        for study, explainers, words in (
            (0, networks[:1], "the CNN of fold 0, which never saw this patient"),
            (2, networks[1:], "the CNN of fold 1, which never saw this patient"),
            (5, networks, "the mean of the CNNs of fold(s) 0, 1"),
        ):
            for label in (4, 5):
                trouble, found = ask_heat(server, study, 3, label)
                expected = explain(store, explainers, study, 3, label)
                assert trouble == ""
                assert expected.max() == 1
                np.testing.assert_allclose(found.reshape(size, size), expected * 255, atol=0.51)
            assert words in server.catalogue.describe_study(study)["explainers"]
        assert not np.allclose(explain(store, networks[:1], 2, 3, 4), explain(store, networks[1:], 2, 3, 4), atol=0.1)
        trouble, found = ask_heat(server, 4, 3, 5)  # no fold held it out
        assert "may have learned from it" in trouble
        assert not found.size
        assert not server.catalogue.describe_study(4)["explainable"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "fold-0/model.pt: not there, and heat maps need the networks; run `dvc repro`"),
        ({"store_digest": "e" * 64}, "fold-0/model.pt: trained on store eeeeeeeeeeee, and this is"),
        ({"fold": 3}, "fold-0/model.pt: expected fold 0, found 3"),
        ({"members": [{}]}, "its weights do not fit compact"),
        (b"PK and nothing", "not a model, nor a whole file of torch.save"),
    ],
)
def test_networks_that_cannot_explain_are_named(server: ViewerServer, store: Store, changes: Any, message: str) -> None:
    write_fold(store.path.parent, store, fold=0, studies=[0])
    path = store.path.parent / "train" / "fold-0" / "model.pt"
    if isinstance(changes, bytes):
        path.write_bytes(changes)
    elif changes is not None:
        write_networks(store, fold=0, changes=changes)
    server.catalogue = catalogue_of(store)
    trouble, found = ask_heat(server, 0, 3, 4)
    assert message in trouble
    assert not found.size
    assert split(get(f"{server.url}study/0"), store)[0]["damaged"] == {}
    write_networks(store, fold=0)  # mended, it is there without a new start
    assert ask_heat(server, 0, 3, 4)[0] == ""


def test_while_a_map_is_made_the_rest_is_answered(server: ViewerServer, store: Store) -> None:
    write_fold(store.path.parent, store, fold=0, studies=[0, 1])
    write_networks(store, fold=0)
    server.catalogue = catalogue_of(store)
    kept = ask_heat(server, 0, 2, 4)[1]
    waiting: list[tuple[str, np.ndarray]] = []
    asking = threading.Thread(target=lambda: waiting.append(ask_heat(server, 0, 3, 4)), daemon=True)
    with server.catalogue.heat.lock:  # as long as another map is being made
        asking.start()
        assert split(get(f"{server.url}study/1"), store)[0]["study"] == 1
        np.testing.assert_array_equal(ask_heat(server, 0, 2, 4)[1], kept)
        assert waiting == []
    asking.join(PATIENCE_S)
    assert [trouble for trouble, _ in waiting] == [""]


def test_a_damaged_slice_has_no_map_and_others_have(store: Store) -> None:
    write_fold(store.path.parent, store, fold=0, studies=[0, 1])
    write_networks(store, fold=0)
    (store.path / "pixels" / shard_name(0, 0)).unlink()
    for server in serve(Store(store.path)):
        assert "shard is missing" in ask_heat(server, 0, 3, 4)[0]
        assert ask_heat(server, 1, 3, 4)[0] == ""


def test_only_the_latest_maps_are_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fold(store.path.parent, store, fold=0, studies=[0])
    write_networks(store, fold=0)
    monkeypatch.setattr(heat, "KEPT_BYTES", 2 * store.image_size**2)
    maps = HeatMaps(store, store.path.parent / "train")
    made = [maps.make(0, number, 4, folds=(0,)) for number in (1, 2, 3, 1)]
    assert [number for _, number, _ in maps._maps] == [3, 1]
    np.testing.assert_array_equal(made[0], made[3])


# ---- who is answered


def test_without_the_secret_nothing_is_answered(server: ViewerServer) -> None:
    right = f"/{server.secret}/overview"
    assert ask(server, "GET", right).status == 200
    for path in (
        "/",
        "/overview",
        f"/{server.secret[:-1]}/overview",
        f"/{server.secret}x/overview",
        "/%/",
        "/é/",
        "//",
        f"/{server.secret}",
        "/heat/0/0/0",
        f"/{server.secret[:-1]}/heat/0/0/0",
    ):
        assert ask(server, "GET", path).status == 404, path


def test_no_path_leads_out(server: ViewerServer, store: Store) -> None:
    for path in (
        "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "study/../../store.zarr/zarr.json", "study/-1", f"study/{STUDIES}",
        "study/0/0", "study/٣", "study/" + "9" * 400, "study/", "study/0.0", "zarr.json", "viewer.html", "study/0?x",
        "heat/0/0", f"heat/0/{SLICES}/0", f"heat/{STUDIES}/0/0", "heat/0/0/6", "heat/0/-1/0", "heat/0/0/0/0", "heat/0/0/any", "heat//0/0",
    ):  # fmt: skip
        answer = ask(server, "GET", f"/{server.secret}/{path}")
        assert answer.status == 404, path


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:{port}", 200),
        ("127.0.0.1:{port}", 200),
        ("127.0.0.1:1234", 200),  # an SSH tunnel's other end
        ("LOCALHOST", 200),
        ("evil.example:{port}", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:{port}", 403),
        ("127.0.0.1:{port}@evil.example", 403),
        ("", 403),
    ],
)
def test_other_host_names_are_refused(server: ViewerServer, host: str, status: int) -> None:
    answer = ask(server, "GET", f"/{server.secret}/overview", Host=host.format(port=server.server_port))
    assert answer.status == status


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_it_only_reads(server: ViewerServer, method: str) -> None:
    answer = ask(server, method, f"/{server.secret}/overview")
    assert answer.status == 405
    assert answer.getheader("Allow") == "GET"
    assert answer.getheader("Access-Control-Allow-Origin") is None


def test_answers_stay_on_this_machine_and_off_its_disk(server: ViewerServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    for path in ("", "overview", "study/0", "heat/0/0/0"):
        answer = ask(server, "GET", f"/{server.secret}/{path}", Origin="https://evil.example")
        assert answer.status == 200
        assert answer.getheader("Access-Control-Allow-Origin") is None
        assert answer.getheader("Cache-Control") == "no-store"
        assert answer.getheader("Cross-Origin-Resource-Policy") == "same-origin"
        assert answer.getheader("Referrer-Policy") == "no-referrer"
        assert "Python" not in (answer.getheader("Server") or "")
    policy = ask(server, "GET", f"/{server.secret}/").getheader("Content-Security-Policy") or ""
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy


def test_the_page_asks_nothing_of_others(server: ViewerServer) -> None:
    page = get(server.url).decode()
    assert "http:" not in page
    assert "https:" not in page
    assert "{{nonce}}" not in page
    assert page != get(server.url).decode()  # a nonce is used once


def test_a_store_that_was_replaced_is_said_and_shows_nothing_of_the_new_one(server: ViewerServer, store: Store) -> None:
    again = store.path.with_name("again.zarr")
    shutil.copytree(store.path, again)
    replace_folder(again, store.path)
    with pytest.raises(urllib.error.HTTPError) as raised:
        get(f"{server.url}study/0")
    assert raised.value.code == 409
    assert b"the store was replaced while it was read; run the same command again" in raised.value.read()


def test_the_browsers_address_works_once(server: ViewerServer) -> None:
    path = server.knock_url.partition(str(server.server_port))[2]
    first = ask(server, "GET", path)
    assert (first.status, first.getheader("Location")) == (303, f"/{server.secret}/")
    assert ask(server, "GET", path).status == 404


def test_two_servers_have_two_secrets_and_a_taken_port_is_said(server: ViewerServer) -> None:
    catalogue = server.catalogue
    with ViewerServer(catalogue) as other:
        assert other.secret != server.secret
        assert len(other.secret) >= 32
    with pytest.raises(IchorError, match=rf"--port {server.server_port}: another program has it"):
        ViewerServer(catalogue, port=server.server_port)


# ---- the door


def test_the_door_prints_an_address_and_ctrl_c_ends_it(store: Store) -> None:
    command = [sys.executable, "-m", "stages.view", "--data", str(store.path.parent), "--no-browser"]
    command += ["--study", str(store.study[2]), "--slice", "4", "--heat", "subdural"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"{STUDIES} studies, {STUDIES * SLICES} slices: http://127.0.0.1:")
        assert line.endswith("/#study=2&slice=4&heat=subdural\n")
        assert b"<title>Ichor viewer</title>" in get(line.split()[-1])
        process.send_signal(signal.SIGINT)
        fuse = threading.Timer(PATIENCE_S, process.kill)
        fuse.start()
        _, said = process.communicate()
        fuse.cancel()
    assert process.returncode == 130
    assert "Traceback" not in said


def test_the_address_of_a_slice_that_is_not_there_is_refused(store: Store) -> None:
    assert make_fragment(store, study=None, slice_number=None, heat=None) == ""
    assert make_fragment(store, study=None, slice_number=None, heat="any") == "#heat=any"
    assert make_fragment(store, study="3", slice_number=None, heat=None) == "#study=3"
    for study, number, message in (
        ("3", 0, "study 3 has slices 1 to 8"),
        ("3", 9, "study 3 has slices 1 to 8"),
        ("99", 1, "a number from 0 to 5"),
        (None, 1, "--slice 1: of which study"),
    ):
        with pytest.raises(IchorError, match=message):
            make_fragment(store, study=study, slice_number=number, heat=None)


def test_the_door_says_what_is_wrong(tmp_path: Path) -> None:
    for arguments, code, said in (
        (["--data", str(tmp_path / "nowhere")], 1, "no store; run `python -m stages.preprocess`"),
        (["--port", "70000"], 2, "'70000' is no port"),
    ):
        command = [sys.executable, "-m", "stages.view", "--no-browser", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr


# ---- the page in a browser


def _pipe() -> tuple[int, int]:
    """A pipe whose ends have high numbers, out of the way of those that the browser expects."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 16) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]


class Chromium:
    """A headless Chromium, told what to do over its debugging pipe: messages of JSON, each ended by a zero byte."""

    def __init__(self, profile: Path) -> None:
        ours_in, theirs_out = _pipe()
        theirs_in, ours_out = _pipe()
        self.descriptors = ours_in, ours_out
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        self.process = os.posix_spawnp(
            "chromium",
            ["chromium", *options, f"--user-data-dir={profile}", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs_in, 3),  # the browser reads 3 and writes 4
                (os.POSIX_SPAWN_DUP2, theirs_out, 4),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.waiting, self.number, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.say("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.say("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.say(f"{domain}.enable")

    def say(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        os.write(
            self.descriptors[1],
            json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0",
        )
        while True:
            while b"\0" not in self.waiting:
                received = os.read(self.descriptors[0], 1 << 16)
                assert received, "Chromium has ended"
                self.waiting += received
            one, _, self.waiting = self.waiting.partition(b"\0")
            answer = json.loads(one)
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def run(self, script: str) -> Any:
        answer = self.say("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Until a script gives something true."""
        end = time.monotonic() + PATIENCE_S
        while not self.run(script):
            assert time.monotonic() < end, (
                f"never came true: {script}; the page says: {self.run('document.body.innerText')}"
            )
            time.sleep(0.02)

    def open(self, url: str, *, wide: int = 1280, high: int = 800) -> None:
        self.say("Emulation.setDeviceMetricsOverride", width=wide, height=high, deviceScaleFactor=1, mobile=False)
        self.say("Page.navigate", url="about:blank")
        self.say("Page.navigate", url=url)
        self.wait("!!document.querySelector('.view .sw')?.textContent")

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.say("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.say("Input.dispatchKeyEvent", type="keyUp", key=key)

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.say("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def shown(self) -> str:
        """The corner that says which slice is shown, of how many, once drawing is done."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return str(self.run("document.querySelector('.view .sw').textContent"))

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.say("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self.session = ""
        self.say("Browser.close")
        os.waitpid(self.process, 0)
        for descriptor in self.descriptors:
            os.close(descriptor)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(store: Store) -> Iterator[ViewerServer]:
    """With predictions of four studies."""
    write_fold(store.path.parent, store, fold=0, studies=[0, 1, 2, 3])
    yield from serve(store)


def drawn(browser: Chromium, canvas: str = "grey", channel: int = 0) -> np.ndarray:
    """What the first view's canvas shows in one of its four channels, uint8 [row, column]."""
    browser.shown()
    script = (
        f"(() => {{ const canvas = document.querySelector('.view .{canvas}');"
        "const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
        f"const one = Array.from(data.filter((_, i) => i % 4 === {channel}), (v) => String.fromCharCode(v)).join('');"
        "return [canvas.width, canvas.height, btoa(one)]; })()"
    )
    width, height, grey = browser.run(script)
    return np.frombuffer(base64.b64decode(grey), np.uint8).reshape(height, width)


def rows(browser: Chromium) -> list[int]:
    return [int(name) for name in browser.run("[...document.querySelectorAll('.row')].map((row) => row.id.slice(6))")]


def choose(browser: Chromium, name: str, value: str) -> None:
    browser.run(
        f"{{ const e = document.getElementById('{name}'); e.value = '{value}'; e.dispatchEvent(new Event('change')); }}"
    )
    browser.shown()


@pytest.mark.program("chromium")
def test_the_page_scrolls_by_wheel_keys_strip_and_drag(chromium: Chromium, page: ViewerServer) -> None:
    chromium.events.clear()
    chromium.open(f"{page.url}#study=1&slice=1")
    assert chromium.shown() == "slice 1 of 8"
    chromium.mouse("mouseWheel", 800, 350, deltaX=0, deltaY=120)
    chromium.mouse("mouseWheel", 800, 350, deltaX=0, deltaY=120)
    assert chromium.shown() == "slice 3 of 8"
    chromium.mouse("mouseWheel", 800, 350, deltaX=0, deltaY=-120)
    assert chromium.shown() == "slice 2 of 8"
    for key, expected in (("ArrowDown", 3), ("ArrowUp", 2), ("End", 8), ("ArrowDown", 8), ("Home", 1), ("PageDown", 6)):
        chromium.press(key)
        assert chromium.shown() == f"slice {expected} of 8", key
    left, top, width = chromium.run(
        "(() => { const b = document.getElementById('lane').getBoundingClientRect(); return [b.left, b.top, b.width]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        chromium.mouse(kind, left + width * 3.5 / 8, top + 10, button="left", buttons=1, clickCount=1)
    assert chromium.shown() == "slice 4 of 8"
    assert chromium.run("document.getElementById('lane').getAttribute('aria-valuenow')") == "4"
    chromium.mouse("mousePressed", 800, 300, button="left", buttons=1)
    chromium.mouse("mouseMoved", 800, 314, button="left", buttons=1)
    chromium.mouse("mouseReleased", 800, 314, button="left")
    assert chromium.shown() == "slice 6 of 8"
    chromium.wait("location.hash === '#study=1&slice=6&window=brain'")
    faults = [event for event in chromium.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert faults == []


@pytest.mark.program("chromium")
def test_the_page_scrolls_by_touch(chromium: Chromium, page: ViewerServer) -> None:
    chromium.open(f"{page.url}#study=1&slice=2", wide=420)
    for kind, points in (
        ("touchStart", [{"x": 200, "y": 300}]),
        ("touchMove", [{"x": 200, "y": 315}]),
        ("touchMove", [{"x": 200, "y": 321}]),
        ("touchEnd", []),
    ):
        chromium.say("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    assert chromium.shown() == "slice 5 of 8"


@pytest.mark.program("chromium")
def test_what_is_drawn_is_the_stores_slice_in_each_window(chromium: Chromium, page: ViewerServer, store: Store) -> None:
    chromium.open(f"{page.url}#study=2&slice=4")
    for key, window in (("1", 0), ("2", 1), ("3", 2), ("3", 2)):
        chromium.press(key)
        pixels = store.reader.read(2, 3)[..., window]
        picture = drawn(chromium)
        side = min(picture.shape)
        top, left = (np.array(picture.shape) - side) // 2
        scale = side / pixels.shape[0]
        centres = ((np.arange(pixels.shape[0]) + 0.5) * scale).astype(
            int
        )  # there, smoothing leaves a pixel as it is, nearly
        shown = picture[top + centres][:, left + centres].astype(int)
        assert np.abs(shown - pixels).mean() < 3
        assert np.abs(shown - pixels[:, ::-1]).mean() > 3
    chromium.press("i")
    assert np.abs((255 - shown) - drawn(chromium)[top + centres][:, left + centres]).mean() < 1
    chromium.press("s")
    chromium.shown()
    assert chromium.run("document.querySelectorAll('.view').length") == 3
    names = chromium.run("[...document.querySelectorAll('.view .nw')].map((corner) => corner.textContent)")
    assert sorted(names) == ["brain 40/80", "soft 40/380", "subdural 80/200"]
    chromium.press("2")
    chromium.shown()
    assert chromium.run("document.querySelector('.view .nw').textContent") == "subdural 80/200"


@pytest.mark.program("chromium")
def test_right_drag_zooms_middle_drag_pans_and_space_resets(chromium: Chromium, page: ViewerServer) -> None:
    chromium.open(f"{page.url}#study=1&slice=4")
    fitted = drawn(chromium)
    changed = []
    for button, buttons, (right, down) in (("right", 2, (0, 60)), ("middle", 4, (40, -60))):
        chromium.mouse("mousePressed", 800, 300, button=button, buttons=buttons)
        chromium.mouse("mouseMoved", 800 + right, 300 + down, button=button, buttons=buttons)
        chromium.mouse("mouseReleased", 800 + right, 300 + down, button=button)
        changed.append(drawn(chromium))
    zoomed, panned = changed
    assert (zoomed > 0).sum() > (fitted > 0).sum() * 1.5
    left, top = chromium.run(
        "(() => { const b = document.querySelector('.grey').getBoundingClientRect(); return [b.left, b.top]; })()"
    )
    under = 300 - int(top), 800 - int(left)  # what lies under the pointer stays there
    assert abs(int(zoomed[under]) - int(fitted[under])) < 3
    np.testing.assert_allclose(panned[:-60, 40:].astype(int), zoomed[60:, :-40], atol=2)  # smoothing rounds anew
    assert chromium.shown() == "slice 4 of 8"
    chromium.press(" ")
    np.testing.assert_array_equal(drawn(chromium), fitted)


def heat_text(browser: Chromium) -> str:
    browser.shown()
    return str(
        browser.run(
            "document.getElementById('heat-note').hidden ? '' : document.getElementById('heat-text').textContent"
        )
    )


def centres_on_screen(browser: Chromium, path: Path, size: int) -> np.ndarray:
    """What the screen shows at the middle of each of the slice's pixels, int [row, column, 3]."""
    browser.shown()
    browser.picture(path)
    left, top, width, height = browser.run(
        "(() => { const b = document.querySelector('.grey').getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
    )
    side = min(width, height)
    at = ((np.arange(size) + 0.5) * side / size).astype(int)
    screen = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return screen[int(top + (height - side) / 2) + at][:, int(left + (width - side) / 2) + at]


IS_WARM = "!document.querySelector('.heat').hidden"


@pytest.mark.program("chromium")
def test_a_heat_map_lies_over_the_slice(chromium: Chromium, page: ViewerServer, store: Store, tmp_path: Path) -> None:
    network = write_networks(store, fold=0, seed=SEED_OF_A_VARIED_MAP)
    heat_RC = explain(store, [network], 2, 3, 4)
    cold, hot = heat_RC == 0, heat_RC > 0.5
    assert cold.any()
    assert hot.any()
    chromium.events.clear()
    chromium.open(f"{page.url}#study=2&slice=4")
    plain = centres_on_screen(chromium, tmp_path / "plain.png", store.image_size)
    chromium.run("document.getElementById('name-4').click()")
    chromium.wait(IS_WARM)
    assert "Heat map of subdural, probability 0.900, by the CNN of fold 0, which never saw" in heat_text(chromium)
    assert "Scaled to its own maximum; it explains the CNN, not the bleed." in heat_text(chromium)
    chromium.wait("location.hash.endsWith('&heat=subdural')")
    warm = centres_on_screen(chromium, tmp_path / "warm.png", store.image_size)
    assert np.abs(warm - plain)[cold].max() < 5  # the slice is drawn a little smaller, beside the note
    assert (np.abs(warm - plain)[hot].max(axis=1) > 10).all()
    expected = blend_heat(plain[..., 0].astype(np.uint8), heat_RC).astype(int)
    assert np.abs(warm - expected).max() < 8
    chromium.press("g")
    assert heat_text(chromium) == ""
    again = centres_on_screen(chromium, tmp_path / "again.png", store.image_size)
    np.testing.assert_array_equal(again, plain)
    assert [
        event for event in chromium.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")
    ] == []


@pytest.mark.program("chromium")
def test_a_heat_map_goes_where_the_slice_goes(chromium: Chromium, page: ViewerServer, store: Store) -> None:
    write_networks(store, fold=0, seed=SEED_OF_A_VARIED_MAP)
    chromium.open(f"{page.url}#study=2&slice=4&heat=subdural")
    chromium.wait(IS_WARM)
    fitted = drawn(chromium, canvas="heat", channel=3)
    assert fitted.max() == round(255 * HEAT_SHARE)
    for button, buttons, (right, down) in (("right", 2, (0, 60)), ("middle", 4, (40, -60))):
        before = drawn(chromium, canvas="heat", channel=3)
        chromium.mouse("mousePressed", 800, 300, button=button, buttons=buttons)
        chromium.mouse("mouseMoved", 800 + right, 300 + down, button=button, buttons=buttons)
        chromium.mouse("mouseReleased", 800 + right, 300 + down, button=button)
    panned = drawn(chromium, canvas="heat", channel=3)
    np.testing.assert_allclose(panned[:-60, 40:].astype(int), before[60:, :-40], atol=2)
    assert np.abs(before.astype(int) - fitted).max() > 20
    chromium.press(" ")
    np.testing.assert_array_equal(drawn(chromium, canvas="heat", channel=3), fitted)
    chromium.press("s")  # each window under the same map
    chromium.shown()
    assert chromium.run("[...document.querySelectorAll('.heat')].map((one) => one.hidden)") == [False] * 3


@pytest.mark.program("chromium")
def test_labels_are_chosen_by_key_and_by_click(chromium: Chromium, page: ViewerServer, store: Store) -> None:
    write_networks(store, fold=0)
    chromium.open(f"{page.url}#study=0&slice=3&heat=likeliest")
    pressed = "[...document.querySelectorAll('#strip button')].filter((one) => one.ariaPressed === 'true').map((one) => one.innerText)"
    assert "subdural, probability 0.900" in heat_text(chromium)  # any has as much, but is no subtype
    assert chromium.run(pressed) == []
    for label in ("epidural", "intraparenchymal"):
        chromium.press("l")
        assert f"map of {label}, probability 0.100" in heat_text(chromium)
        assert chromium.run(pressed) == [label]
    for label in ("any", "subdural"):  # the second click on any leads back to the likeliest
        chromium.run("document.getElementById('name-5').click()")
        assert f"map of {label}, probability 0.900" in heat_text(chromium)


@pytest.mark.program("chromium")
def test_slices_scroll_while_a_map_is_made_and_those_out_of_date_are_dropped(
    chromium: Chromium, page: ViewerServer, store: Store
) -> None:
    write_networks(store, fold=0)
    maps = page.catalogue.heat
    with maps.lock:
        chromium.open(f"{page.url}#study=2&slice=1&heat=any")
        assert "Making the heat map of any" in heat_text(chromium)
        for number in range(2, 7):
            chromium.press("ArrowDown")
            assert chromium.shown() == f"slice {number} of 8"
        assert not chromium.run(IS_WARM)
    chromium.wait(IS_WARM)
    chromium.wait("heats.size === 5")
    assert [number for _, number, _ in maps._maps] == [
        0,
        5,
        6,
        7,
        4,
    ]  # the first, the shown, those ahead, the one behind


@pytest.mark.program("chromium")
def test_without_networks_the_page_says_so_and_goes_on(chromium: Chromium, page: ViewerServer, store: Store) -> None:
    chromium.open(f"{page.url}#study=2&slice=4")
    chromium.press("g")
    chromium.wait("document.getElementById('heat-text').textContent.includes('model.pt: not there')")
    chromium.press("ArrowDown")
    assert chromium.shown() == "slice 5 of 8"
    assert drawn(chromium).any()
    assert not chromium.run(IS_WARM)
    chromium.press("g")
    write_networks(store, fold=0)
    chromium.press("g")  # asked for again, it is there
    chromium.wait(IS_WARM)
    chromium.open(f"{page.url}#study=4&slice=4&heat=any")
    assert "no fold that is trained held this study out" in heat_text(chromium)
    assert not chromium.run(IS_WARM)


@pytest.mark.program("chromium")
def test_one_click_shows_the_worst_miss(chromium: Chromium, page: ViewerServer) -> None:
    chromium.open(f"{page.url}#study=3")
    chromium.run("document.getElementById('worst').click()")
    chromium.wait("document.getElementById('title').textContent.startsWith('Study 0 ')")
    assert chromium.shown() == "slice 4 of 8"
    assert rows(chromium) == [0]


@pytest.mark.program("chromium")
def test_studies_are_filtered_and_sorted(chromium: Chromium, page: ViewerServer) -> None:
    chromium.open(page.url)
    assert rows(chromium) == [0, 1, 2, 3, 4, 5]
    for value, expected in (
        ("positive", [0, 2, 4]),
        ("negative", [1, 3]),
        ("unlabelled", [5]),
        ("findings", []),
        ("predicted", [0, 1, 2, 3]),
        ("missed_slice", [0]),
        ("false_slice", [0]),
    ):
        choose(chromium, "show", value)
        assert rows(chromium) == expected, value
    assert chromium.shown() == "slice 7 of 8"  # the one that was called falsely
    choose(chromium, "show", "missed_slice")
    choose(chromium, "sort", "slice_error")
    assert chromium.shown() == "slice 4 of 8"
    assert "1 missed, 1 false" in chromium.run("document.querySelector('.row').textContent")
    assert chromium.run("document.getElementById('value-5').title") == "missed"
    chromium.wait("location.hash.endsWith('show=missed_slice&sort=slice_error')")
    choose(chromium, "label", "epidural")
    assert chromium.run("document.getElementById('count-text').textContent") == "No study fits"
    chromium.run("document.getElementById('clear').click()")
    assert sorted(rows(chromium)) == [0, 1, 2, 3, 4, 5]
    chromium.press("/")
    chromium.say("Input.insertText", text="00000004")
    assert rows(chromium) == [4]
    chromium.press("Enter")
    chromium.wait("document.getElementById('title').textContent.startsWith('Study 4')")


@pytest.mark.program("chromium")
def test_keys_walk_the_list_of_studies(chromium: Chromium, page: ViewerServer) -> None:
    chromium.open(f"{page.url}#show=positive")
    for key, study in (("n", 2), ("n", 4), ("n", 4), ("p", 2)):
        chromium.press(key)
        chromium.wait(f"document.getElementById('title').textContent.startsWith('Study {study} ')")
    chromium.run("document.getElementById('list').focus()")
    chromium.press("ArrowDown")
    chromium.wait("document.getElementById('list').getAttribute('aria-activedescendant') === 'study-4'")


@pytest.mark.program("chromium")
def test_the_page_shows_letters_positions_and_notes(chromium: Chromium, page: ViewerServer) -> None:
    chromium.open(f"{page.url}#study=0&slice=3&window=subdural")
    letters = [chromium.run(f"document.querySelector('.view .{place}').textContent") for place in "nesw"]
    assert letters == ["A", "L", "P", "R"]
    assert chromium.run("document.querySelector('.view .se').textContent") == "10.0 mm"
    assert chromium.run("document.querySelector('.view .nw').textContent") == "subdural 80/200"
    assert "held out by fold 0" in chromium.run("document.querySelector('.view .ne').textContent")
    assert [chromium.run(f"document.getElementById('value-{label}').textContent") for label in (4, 5)] == ["0.900"] * 2
    assert "too few patients" in chromium.run("document.getElementById('notes').textContent")
    chromium.press("?")
    assert chromium.run("document.getElementById('keys').open")


@pytest.mark.program("chromium")
@pytest.mark.parametrize("wide", [420, 1280])
def test_nothing_lies_beside_the_page(chromium: Chromium, page: ViewerServer, wide: int) -> None:
    chromium.open(f"{page.url}#study=0&window=all", wide=wide)
    assert chromium.run("document.documentElement.scrollWidth <= innerWidth")
    assert chromium.run("document.getElementById('stage').clientHeight") > 300
    if wide == 420:
        assert chromium.run("document.getElementById('pane').clientHeight") == 0
        chromium.run("document.getElementById('open-list').click()")
        chromium.run("document.getElementById('study-3').click()")
        chromium.wait("document.getElementById('title').textContent.startsWith('Study 3')")
        assert chromium.run("document.getElementById('pane').clientHeight") == 0


@pytest.mark.program("chromium")
def test_the_page_does_without_predictions_and_with_damage(chromium: Chromium, store: Store) -> None:
    path = store.path / "pixels" / shard_name(0, 0)
    content = bytearray(path.read_bytes())
    offset, _ = store.reader._find_chunk(0, 2)
    content[offset + 40] ^= 1
    path.unlink()
    path.write_bytes(content)
    (store.path / "pixels" / shard_name(1, 0)).unlink()
    for server in serve(Store(store.path)):
        chromium.open(f"{server.url}#study=0&slice=3")
        trouble = "document.getElementById('trouble').hidden ? '' : document.getElementById('trouble').textContent"
        chromium.wait(f"({trouble}).startsWith('Slice 3 is damaged')")
        chromium.press("ArrowDown")
        assert chromium.shown() == "slice 4 of 8"
        assert chromium.run(trouble) == ""
        assert drawn(chromium).any()
        chromium.press("n")
        chromium.wait(f"({trouble}).includes('the shard is missing')")
        assert "No predictions yet" in chromium.run("document.getElementById('notes').textContent")
        assert chromium.run("document.querySelector('#show option[value=missed_slice]').disabled")
        chromium.say(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        chromium.run("document.getElementById('list').focus()")
        chromium.press("End")
        chromium.wait(f"({trouble}).startsWith('The viewer has ended')")
        chromium.say(
            "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        chromium.press("Home")
        chromium.press("End")  # what has failed once is asked for again
        chromium.wait("document.getElementById('title').textContent.startsWith('Study 5')")
