"""A repository on the Hub of the tests, and the Hub as the worker sees it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import llama_config, llama_tensors, save_checkpoint
from tests.fakehub.server import FakeHub
from worker.hub import Endpoint, Hub

REPO = "team-a/tiny"

MakeHub = Callable[..., Hub]


def look() -> None:
    """Nobody cancels."""


@pytest.fixture
def hub(fakehub: FakeHub) -> Hub:
    return Hub(Endpoint(fakehub.endpoint, xet=False), fakehub.read_token, "team-a")


@pytest.fixture
def stranger(fakehub: FakeHub) -> Hub:
    """Without a credential."""
    return Hub(Endpoint(fakehub.endpoint, xet=False), None)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three shards, and what repositories have beside one."""
    folder = save_checkpoint(tmp_path_factory.mktemp("source"), llama_tensors(hidden=128), llama_config(hidden=128), 3)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}}))
    (folder / "LICENSE").write_text("Do what you like.\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (folder / "empty.txt").touch()
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    (folder / "original" / "consolidated.safetensors").write_bytes(b"not ours")
    (folder / "consolidated.safetensors").write_bytes(b"not ours")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "modeling_tiny.py").write_text("raise SystemExit\n")
    return folder
