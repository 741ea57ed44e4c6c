"""A real S3 server on loopback, and files to publish."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from tests.conftest import _die_with_pytest
from worker.push.files import PushFile

REGION = "us-east-1"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=_die_with_pytest(signal.SIGKILL)
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the S3 server ended"
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket, found by the environment as an operator would set it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    name = f"bucket-{os.urandom(4).hex()}"
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=name)
    yield name
    s3.close()


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place, once of each kind."""
    if request.param == "file":
        return f"file://{tmp_path / 'published' / 'tiny'}"
    return f"s3://{request.getfixturevalue('bucket')}/models/tiny"


MakeFiles = Callable[..., list[PushFile]]


@pytest.fixture
def make_files(tmp_path: Path) -> MakeFiles:
    """A result on this machine: name=content."""

    def make(folder: str, contents: dict[str, bytes]) -> list[PushFile]:
        files = []
        for name, content in contents.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            files.append(PushFile(name, str(path), len(content), hashlib.sha256(content).hexdigest()))
        return files

    return make
