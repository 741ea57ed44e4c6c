"""What is read from a Hub, and what is refused."""

import dataclasses
import hashlib
import os
from pathlib import Path

import pytest
import structlog
import torch
from safetensors.torch import save_file

from hqq_core import Recipe, build_plan
from hqq_core.checkpoint import Checkpoint
from tests.fakehub.server import FakeHub
from tests.worker.hub.conftest import REPO, look
from worker.hub import Endpoint, Hub, RemoteFile, Snapshot, part_of


@pytest.fixture
def snapshot(fakehub: FakeHub, hub: Hub, source: Path) -> Snapshot:
    fakehub.add_repo(REPO, source)
    return hub.resolve(REPO, "main", look=look)


def file_of(snapshot: Snapshot, path: str) -> RemoteFile:
    return next(file for file in snapshot.files if file.path == path)


def test_a_revision_becomes_a_commit_and_the_files_of_a_source(
    fakehub: FakeHub, hub: Hub, source: Path, snapshot: Snapshot
) -> None:
    assert snapshot.commit == fakehub.commits(REPO)[0].oid
    assert [file.path for file in snapshot.files] == [
        "LICENSE", "README.md", "config.json", "empty.txt", "generation_config.json",
        "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
        "model.safetensors.index.json", "original/params.json", "tokenizer.json",
    ]  # fmt: skip
    assert snapshot.left_out == (
        ".gitattributes", "consolidated.safetensors", "modeling_tiny.py", "original/consolidated.safetensors",
        "pytorch_model.bin",
    )  # fmt: skip
    for file in snapshot.files:
        content = (source / file.path).read_bytes()
        assert file.nbytes == len(content)
        if file.is_weights:
            assert file.sha256 == hashlib.sha256(content).hexdigest()
    fakehub.commit(REPO, {"config.json": "{}"})
    assert hub.resolve(REPO, snapshot.commit[:8], look=look) == snapshot


def test_small_files_and_headers_make_the_plan_of_the_whole_checkpoint(
    fakehub: FakeHub, hub: Hub, source: Path, snapshot: Snapshot, tmp_path: Path
) -> None:
    fakehub.commit(REPO, {"config.json": "{}", "model-00001-of-00003.safetensors": b"moved on"})
    hub.fetch_small(snapshot, tmp_path / "source", look=look)
    here, there = Checkpoint.open(tmp_path / "source"), Checkpoint.open(source)
    assert here.headers() == there.headers()
    plans = [build_plan(checkpoint, Recipe()) for checkpoint in (here, there)]
    assert dataclasses.replace(plans[0], left_out=()) == dataclasses.replace(plans[1], left_out=())
    for name in here.carried_files()[0]:
        assert (tmp_path / "source" / name).read_bytes() == (source / name).read_bytes()
    sent = sum(request.sent_nbytes for request in fakehub.requests.find("^/storage/"))
    assert sent < snapshot.nbytes / 2
    assert not [path for path in (tmp_path / "source").rglob("*") if path.name.startswith(".")]


def test_a_header_longer_than_the_first_request_is_read_whole(fakehub: FakeHub, hub: Hub, tmp_path: Path) -> None:
    names = [f"layers.{number}.{'long' * 20}.weight" for number in range(1500)]
    (tmp_path / "many").mkdir()
    save_file({name: torch.zeros(2, 3) for name in names}, tmp_path / "many" / "model.safetensors")
    (tmp_path / "many" / "config.json").write_text("{}")
    fakehub.add_repo(REPO, tmp_path / "many")
    hub.fetch_small(hub.resolve(REPO, "main", look=look), tmp_path / "source", look=look)
    assert Checkpoint.open(tmp_path / "source").headers() == Checkpoint.open(tmp_path / "many").headers()


def test_a_download_is_whole_checked_and_told_of(
    fakehub: FakeHub, hub: Hub, source: Path, snapshot: Snapshot, tmp_path: Path
) -> None:
    told: list[int] = []
    for file in snapshot.files:
        path = tmp_path / "files" / Path(file.path).name
        path.parent.mkdir(exist_ok=True)
        sha256 = hub.download(snapshot, file, path, look=look, progress=told.append)
        assert path.read_bytes() == (source / file.path).read_bytes()
        assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert told
    assert max(told) <= max(file.nbytes for file in snapshot.files)
    assert not list((tmp_path / "files").glob(".*"))
    assert not any(request.authorized for request in fakehub.requests.find("^/storage/"))
    assert fakehub.requests.find("^/storage/")
    assert all(request.authorized for request in fakehub.requests.find(f"^/{REPO}/resolve/"))


def test_what_was_had_before_a_stop_is_not_fetched_again(
    fakehub: FakeHub, hub: Hub, source: Path, snapshot: Snapshot, tmp_path: Path
) -> None:
    file = snapshot.weights[0]
    content = (source / file.path).read_bytes()
    part_of(tmp_path / "w").write_bytes(content[:20_000])
    hub.download(snapshot, file, tmp_path / "w", look=look)
    assert (tmp_path / "w").read_bytes() == content
    (got,) = fakehub.requests.find("^/storage/")
    assert (got.range, got.sent_nbytes) == ("bytes=20000-", len(content) - 20_000)


def test_a_part_of_something_else_is_thrown_away(
    fakehub: FakeHub, hub: Hub, source: Path, snapshot: Snapshot, tmp_path: Path
) -> None:
    file = snapshot.weights[0]
    for rest in (os.urandom(20_000), os.urandom(file.nbytes), os.urandom(2 * file.nbytes)):
        part_of(tmp_path / "w").write_bytes(rest)
        hub.download(snapshot, file, tmp_path / "w", look=look)
        assert (tmp_path / "w").read_bytes() == (source / file.path).read_bytes()
        (tmp_path / "w").unlink()


def test_xet_files_come_by_xet(xethub: FakeHub, source: Path, tmp_path: Path) -> None:
    xethub.add_repo(REPO, source)
    hub = Hub(Endpoint(xethub.endpoint, xet=True), xethub.read_token)
    snapshot = hub.resolve(REPO, "main", look=look)
    hub.fetch_small(snapshot, tmp_path / "source", look=look)
    assert Checkpoint.open(tmp_path / "source").headers() == Checkpoint.open(source).headers()
    xethub.requests.clear()
    told: list[int] = []
    with structlog.testing.capture_logs() as logs:
        for file in snapshot.weights:
            hub.download(snapshot, file, tmp_path / file.path, look=look, progress=told.append)
            assert (tmp_path / file.path).read_bytes() == (source / file.path).read_bytes()
    assert max(told) <= max(file.nbytes for file in snapshot.weights)
    assert "Traceback" not in repr(logs)
    assert xethub.requests.find("/xet-read-token/")
    assert not xethub.requests.find("^/storage/")
