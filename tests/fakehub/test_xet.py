"""Xet by hf_xet itself, in processes of their own: it is chosen before huggingface_hub is imported."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from tests.fakehub.server import FakeHub

REPO = "team-a/model"


def run(hub: FakeHub, folder: Path, script: str, *, xet: bool = True) -> str:
    """What a client's script prints; it runs in a folder that others share."""
    folder.mkdir(exist_ok=True)
    begin = f"from huggingface_hub import *; api = HfApi(token='{hub.write_token}'); "
    home = folder.parent / f"home-{os.urandom(4).hex()}"
    environment = hub.environment(home) | {"HF_HUB_DISABLE_XET": "0" if xet else "1"}
    command = [sys.executable, "-c", begin + script]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_folder_goes_up_and_comes_down_by_xet_alone(xethub: FakeHub, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    weights = os.urandom(3_000_000)
    (work / "w.safetensors").write_bytes(weights)
    xethub.add_repo(REPO)
    run(xethub, work, f"api.upload_folder(folder_path='.', repo_id='{REPO}')")
    assert xethub.files(REPO)["w.safetensors"].read_bytes() == weights
    assert xethub.requests.find("xet-write-token")
    got = run(xethub, work, f"print(api.snapshot_download('{REPO}', local_dir='../down'))")
    assert (Path(got) / "w.safetensors").read_bytes() == weights
    assert xethub.requests.find("xet-read-token")
    assert not xethub.requests.find("^/storage/|objects/batch")


def test_by_commit_with_a_known_hash_and_seeded_from_a_folder(xethub: FakeHub, tmp_path: Path) -> None:
    weights = os.urandom(500_000)
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "w.safetensors").write_bytes(weights)
    xethub.add_repo(REPO, tmp_path / "seed")
    script = (
        f"operation = CommitOperationAdd('v.safetensors', b'v' * 1000); api.preupload_lfs_files('{REPO}', [operation]); "
        f"api.create_commit('{REPO}', [operation], commit_message='x'); "
        f"print(*(api.hf_hub_download('{REPO}', name) for name in ('v.safetensors', 'w.safetensors')))"
    )
    v, w = run(xethub, tmp_path / "work", script).split()
    assert (Path(v).read_bytes(), Path(w).read_bytes()) == (b"v" * 1000, weights)
    assert not xethub.requests.find("^/storage/")


def test_clients_without_xet_have_the_same_files(xethub: FakeHub, tmp_path: Path) -> None:
    xethub.add_repo(REPO)
    up = f"api.upload_file(path_or_fileobj=b'w' * 1000, path_in_repo='w.safetensors', repo_id='{REPO}')"
    run(xethub, tmp_path / "work", up)
    got = run(xethub, tmp_path / "work", f"print(api.hf_hub_download('{REPO}', 'w.safetensors'))", xet=False)
    assert hashlib.sha256(Path(got).read_bytes()).digest() == hashlib.sha256(b"w" * 1000).digest()
    assert xethub.requests.find("^/storage/", "GET")


def test_a_hub_without_xet_offers_no_token(fakehub: FakeHub, tmp_path: Path) -> None:
    fakehub.add_repo(REPO)
    script = (
        "\ntry:\n"
        f"    api.upload_file(path_or_fileobj=b'w' * 1000, path_in_repo='w.safetensors', repo_id='{REPO}')\n"
        "except ConnectionError: print('ConnectionError')"
    )
    assert run(fakehub, tmp_path / "work", script) == "ConnectionError"
    assert len(fakehub.commits(REPO)) == 1
