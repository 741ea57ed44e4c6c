"""A Hub in trouble: tried again within bounds, waited for as it asks, or told as an error that a later start may not have."""

import os
from pathlib import Path

import pytest

from service.common.errors import HubUnavailable, SourceDamaged
from tests.fakehub.server import FakeHub
from tests.worker.hub.conftest import REPO, look
from worker.hub import Hub, Snapshot, part_of


@pytest.fixture
def snapshot(fakehub: FakeHub, hub: Hub, source: Path) -> Snapshot:
    fakehub.add_repo(REPO, source)
    snapshot = hub.resolve(REPO, "main", look=look)
    fakehub.requests.clear()
    return snapshot


def test_a_short_wait_is_waited(fakehub: FakeHub, hub: Hub, snapshot: Snapshot) -> None:
    fakehub.faults.add("/revision/", status=429, retry_after_s=1, count=2)
    fakehub.faults.add("/tree/", status=503)
    assert hub.resolve(REPO, "main", look=look) == snapshot
    assert [request.status for request in fakehub.requests.find("/revision/")] == [429, 429, 200]


@pytest.mark.parametrize("path", ["/revision/", "/tree/", "/resolve/"])
def test_a_long_wait_is_an_error_at_once_that_tells_it(
    path: str, fakehub: FakeHub, hub: Hub, snapshot: Snapshot
) -> None:
    fakehub.faults.add(path, status=429, retry_after_s=3600, count=None)
    with pytest.raises(HubUnavailable, match="answered 429") as error:
        hub.resolve(REPO, "main", look=look)
    assert error.value.retry_after_s == 3600
    assert len(fakehub.requests.find(path)) == 1


def test_a_long_wait_in_a_download_too(fakehub: FakeHub, hub: Hub, snapshot: Snapshot, tmp_path: Path) -> None:
    fakehub.faults.add("^/storage/", status=429, retry_after_s=3600, count=None)
    with pytest.raises(HubUnavailable) as error:
        hub.download(snapshot, snapshot.weights[0], tmp_path / "w", look=look)
    assert error.value.retry_after_s == 3600
    assert len(fakehub.requests.find("^/storage/")) == 1


def test_an_error_without_end_is_told_after_some_tries(fakehub: FakeHub, hub: Hub, snapshot: Snapshot) -> None:
    fakehub.faults.add("/revision/", status=500, count=None)
    with pytest.raises(HubUnavailable, match="answered 500: A fault on demand"):
        hub.resolve(REPO, "main", look=look)
    assert len(fakehub.requests.find("/revision/")) == 4


@pytest.mark.parametrize(
    "fault", [{"status": 500}, {"status": 408}, {"reset": True}, {"truncate_at": 30_000}, {"truncate_at": 0}], ids=str
)
def test_a_download_goes_on_where_it_was(
    fault: dict, fakehub: FakeHub, hub: Hub, snapshot: Snapshot, source: Path, tmp_path: Path
) -> None:
    file = snapshot.weights[1]
    fakehub.faults.add("^/storage/", **fault)
    hub.download(snapshot, file, tmp_path / "w", look=look)
    assert (tmp_path / "w").read_bytes() == (source / file.path).read_bytes()
    sent = sum(request.sent_nbytes for request in fakehub.requests.find("^/storage/") if request.status in (200, 206))
    assert sent <= file.nbytes + fault.get("truncate_at", 0)  # the client drops the piece in which a connection breaks


@pytest.mark.parametrize("fault", [{"status": 502}, {"reset": True}, {"truncate_at": 10}], ids=str)
def test_small_files_are_had_again(
    fault: dict, fakehub: FakeHub, hub: Hub, snapshot: Snapshot, source: Path, tmp_path: Path
) -> None:
    fakehub.faults.add("/resolve/.*/tokenizer.json$|^/storage/", count=3, **fault)
    hub.fetch_small(snapshot, tmp_path / "source", look=look)
    for file in snapshot.files:
        path = tmp_path / "source" / file.path
        assert path.stat().st_size == file.nbytes
        assert file.is_weights or path.read_bytes() == (source / file.path).read_bytes()


@pytest.mark.parametrize("change", [0, -1000, 1000], ids=["as long", "shorter", "longer"])
def test_other_bytes_than_listed_are_damage_after_a_second_try(
    change: int, fakehub: FakeHub, hub: Hub, snapshot: Snapshot, tmp_path: Path
) -> None:
    file = snapshot.weights[0]
    fakehub.files(REPO)[file.path].write_bytes(os.urandom(file.nbytes + change))
    with pytest.raises(SourceDamaged, match=f"{file.path}: what comes is not the file of {file.nbytes} bytes"):
        hub.download(snapshot, file, tmp_path / "w", look=look)
    assert not (tmp_path / "w").exists()
    assert not part_of(tmp_path / "w").exists()


def test_other_bytes_of_a_small_file_too(fakehub: FakeHub, hub: Hub, snapshot: Snapshot, tmp_path: Path) -> None:
    fakehub.files(REPO)["tokenizer.json"].write_bytes(b" " * 1000)
    with pytest.raises(SourceDamaged, match=r"tokenizer\.json: what comes is not"):
        hub.fetch_small(snapshot, tmp_path / "source", look=look)
    assert not (tmp_path / "source" / "tokenizer.json").exists()
