"""A Hub that means ill, or is none: what it lists, sends and points to is believed as far as it was checked."""

import dataclasses
import json
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urljoin

import pytest

from hqq_core.errors import CheckpointError
from service.common.errors import HubUnavailable
from tests.fakehub.server import FakeHub
from tests.worker.hub.conftest import REPO, look
from worker.hub import Endpoint, Hub

INDEX = "model.safetensors.index.json"
COMMIT = "c" * 40


@pytest.mark.parametrize(
    "path",
    [
        "../x.json",
        "a/../../x.json",
        "/etc/x.json",
        "a//x.json",
        "./x.json",
        "a/",
        "a\\..\\x.json",
        "config.json/x.json",
    ],
)
def test_names_that_lead_elsewhere_are_refused(path: str, source: Path, tmp_path: Path) -> None:
    listed = {path: {"size": 2, "oid": "a" * 40}, "config.json": {"size": 2, "oid": "b" * 40}}
    with answering(listing(listed)) as (endpoint, asked), pytest.raises(CheckpointError, match=REPO):
        Hub(endpoint, None).resolve(REPO, "main", look=look)
    assert not [path for path, _ in asked if "/resolve/" in path]


def test_names_that_hide_or_hurt_are_left_out(fakehub: FakeHub, hub: Hub, source: Path) -> None:
    fakehub.add_repo(REPO, source)
    paths = [".git/config.json", "a/.hidden/x.json", ".x.json", "a\nb.json", "1/2/3/4/x.json", "é" * 120 + ".json"]
    fakehub.commit(REPO, dict.fromkeys(paths, "{}"))
    snapshot = hub.resolve(REPO, "main", look=look)
    assert not set(paths) & {file.path for file in snapshot.files}
    assert {path if path.isprintable() else ascii(path) for path in paths} <= set(snapshot.left_out)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin", "", ".x.safetensors", 3]
)
def test_an_index_names_plain_files_beside_it(name: object, fakehub: FakeHub, hub: Hub, source: Path) -> None:
    fakehub.add_repo(REPO, source)
    fakehub.commit(REPO, {INDEX: json.dumps({"weight_map": {"w": name}})})
    with pytest.raises(CheckpointError, match="wanted a plain"):
        hub.resolve(REPO, "main", look=look)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps({"weight_map": {"w": "gone.safetensors"}}),
            r"names gone\.safetensors, which is not there \(1 missing\)",
        ),
        ("[" * 100_000, "no JSON text"),
        ("[]", "a JSON list: wanted an object"),
        ("{}", "weight_map is NoneType"),
    ],
    ids=["missing", "deep", "list", "empty"],
)
def test_an_index_that_is_none_is_refused(content: str, message: str, fakehub: FakeHub, hub: Hub, source: Path) -> None:
    fakehub.add_repo(REPO, source)
    fakehub.commit(REPO, {INDEX: content})
    with pytest.raises(CheckpointError, match=message):
        hub.resolve(REPO, "main", look=look)


@pytest.mark.parametrize("path", ["config.json", INDEX])
def test_small_files_are_small(path: str, fakehub: FakeHub, hub: Hub, source: Path) -> None:
    fakehub.add_repo(REPO, source)
    files = fakehub.commits(REPO)[0].files
    files[path] = dataclasses.replace(files[path], nbytes=64_000_001)
    with pytest.raises(CheckpointError, match=f"{path}: 64000001 bytes: wanted at most 64000000"):
        hub.resolve(REPO, "main", look=look)


@pytest.mark.parametrize(
    "entry", [{"size": -1}, {"size": "9"}, {"size": 1 << 60}, {"size": True}, {"oid": "../b"}], ids=str
)
def test_sizes_and_ids_that_are_none_are_refused(entry: dict) -> None:
    listed = {"config.json": {"size": 2, "oid": "b" * 40} | entry}
    with (
        answering(listing(listed)) as (endpoint, _),
        pytest.raises(CheckpointError, match=r"config\.json: listed with"),
    ):
        Hub(endpoint, None).resolve(REPO, "main", look=look)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<Q", 1 << 63) + b"{}", "header of 9223372036854775808 bytes in a file of 10"),
        (struct.pack("<Q", 25_000_001) + bytes(100), "header of 25000001 bytes in a file of 108"),
        (struct.pack("<Q", 0) + bytes(100), "header of 0 bytes"),
        (b"abc", "3 bytes are too few"),
    ],
    ids=["endless", "large", "none", "short"],
)
def test_headers_are_within_bounds(
    content: bytes, message: str, fakehub: FakeHub, hub: Hub, source: Path, tmp_path: Path
) -> None:
    fakehub.add_repo(REPO, source)
    fakehub.commit(REPO, {"model-00002-of-00003.safetensors": content})
    snapshot = hub.resolve(REPO, "main", look=look)
    with pytest.raises(CheckpointError, match=rf"model-00002-of-00003\.safetensors: {message}"):
        hub.fetch_small(snapshot, tmp_path / "source", look=look)


@pytest.mark.parametrize(
    "answer",
    [b"<html>Please log in</html>", b"[]", b"{}", b'{"id": "../..", "sha": "x"}', b'{"id": "a/b", "sha": 3}'],
    ids=str,
)
def test_what_is_no_hub_is_told_so(answer: bytes) -> None:
    with answering(lambda path: answer) as (endpoint, _), pytest.raises(HubUnavailable, match="is it one?"):
        Hub(endpoint, None).resolve(REPO, "main", look=look)


def test_a_list_without_end_is_cut_off() -> None:
    page = json.dumps([{"type": "file", "path": f"{n}.json", "size": 1, "oid": "b" * 40} for n in range(9000)]).encode()

    def answer(path: str) -> bytes:
        return page if "/tree/" in path else info()

    with (
        answering(answer, next_page=lambda path: path) as (endpoint, asked),
        pytest.raises(CheckpointError, match="more than 20000 files"),
    ):
        Hub(endpoint, None).resolve(REPO, "main", look=look)
    assert len([path for path, _ in asked if "/tree/" in path]) == 3


def test_an_address_in_an_answer_is_not_given_the_token() -> None:
    """The client itself takes it along to the next page of a list, wherever that is said to be."""
    token = "hf_canary_elsewhere"
    with (
        answering(listing({})) as (elsewhere, asked_elsewhere),
        answering(listing({}), next_page=lambda path: f"{elsewhere.url}{path}") as (endpoint, asked),
        pytest.raises(CheckpointError, match=r"no config\.json"),
    ):
        Hub(endpoint, token).resolve(REPO, "main", look=look)
    assert [authorization for _, authorization in asked] == [f"Bearer {token}"] * 2
    assert [authorization for _, authorization in asked_elsewhere] == [None]


def info() -> bytes:
    return json.dumps({"id": REPO, "sha": COMMIT, "siblings": [], "private": False, "gated": False}).encode()


def listing(files: dict[str, dict]) -> Callable[[str], bytes]:
    """A Hub with one repository, whose files are listed so."""
    tree = json.dumps([{"type": "file", "path": path} | entry for path, entry in files.items()]).encode()
    return lambda path: tree if "/tree/" in path else info()


@contextmanager
def answering(
    answer: Callable[[str], bytes], next_page: Callable[[str], str] | None = None
) -> Iterator[tuple[Endpoint, list[tuple[str, str | None]]]]:
    """A server that gives `answer` of the path; the paths it was asked, each with its Authorization."""
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            body = answer(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            if next_page and "/tree/" in self.path:
                url = urljoin(f"http://{self.headers['Host']}", next_page(self.path))
                self.send_header("Link", f'<{url}>; rel="next"')
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield Endpoint(f"http://127.0.0.1:{server.server_port}", xet=False), asked
        finally:
            server.shutdown()
            thread.join()
