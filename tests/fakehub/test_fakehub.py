"""The Hub of our own as the real client sees it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from safetensors.torch import save_file

from tests.fakehub.server import FakeHub

BIG = 9 * 2**20 + 7  # beyond what goes into a commit itself
REPO = "team-a/model"


def test_a_new_repo_holds_one_commit_that_the_hub_made(fakehub: FakeHub, api: HfApi) -> None:
    url = api.create_repo(REPO, private=True)
    assert (url.repo_id, str(url)) == (REPO, f"{fakehub.endpoint}/{REPO}")
    assert api.list_repo_files(REPO) == [".gitattributes"]
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["initial commit"]
    assert api.model_info(REPO).private
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(REPO)
    assert error.value.response.status_code == 409
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_small_lfs_and_multipart_files_come_back_as_they_went(fakehub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    fakehub.limits.multipart_nbytes, fakehub.limits.part_nbytes = 8 * 2**20, 2**20 + 1
    api.create_repo(REPO)
    files = {
        "config.json": b"{}",
        "empty.txt": b"",
        "one.safetensors": os.urandom(1000),
        "in/a folder/of 20 %.safetensors": os.urandom(BIG),
    }
    made = api.create_commit(
        REPO, [CommitOperationAdd(*each) for each in files.items()], commit_message="All", commit_description="of it"
    )
    assert fakehub.contents(REPO) == files
    newest = api.list_repo_commits(REPO)[0]
    assert (newest.commit_id, newest.title, newest.message, newest.authors) == (made.oid, "All", "of it", ["alice"])
    assert len(fakehub.requests.find("/storage/[0-9a-f]+/", "PUT")) == 9  # parts
    for path, content in files.items():
        got = Path(api.hf_hub_download(REPO, path, cache_dir=tmp_path / "cache", revision=made.oid))
        assert got.read_bytes() == content
    folder = Path(
        api.snapshot_download(REPO, local_dir=tmp_path / "all", allow_patterns=["*.safetensors", "config.json"])
    )
    assert (folder / "in/a folder/of 20 %.safetensors").read_bytes() == files["in/a folder/of 20 %.safetensors"]
    assert not (folder / "empty.txt").exists()
    assert not any(request.authorized for request in fakehub.requests.find("^/storage/"))


def test_an_old_commit_keeps_its_files(fakehub: FakeHub, api: HfApi, tmp_path: Path) -> None:
    first = fakehub.add_repo(REPO)
    second = fakehub.commit(REPO, {"a.txt": "old", "b.txt": "b", "w.safetensors": b"old weights"})
    third = fakehub.commit(REPO, {"a.txt": "new", "b.txt": None, "w.safetensors": b"new weights"})
    assert fakehub.contents(REPO, second) == {"a.txt": b"old", "b.txt": b"b", "w.safetensors": b"old weights"}
    assert [commit.oid for commit in fakehub.commits(REPO)] == [third, second, first]
    for path, content in fakehub.contents(REPO, second).items():
        assert Path(api.hf_hub_download(REPO, path, revision=second, cache_dir=tmp_path)).read_bytes() == content
    assert [each.rfilename for each in api.model_info(REPO, revision=second[:8]).siblings or []] == [
        ".gitattributes", "a.txt", "b.txt", "w.safetensors"
    ]  # fmt: skip


def test_files_that_are_there_already_are_neither_uploaded_nor_committed(fakehub: FakeHub, api: HfApi) -> None:
    weights = os.urandom(1000)
    head = fakehub.add_repo(REPO)
    api.preupload_lfs_files(REPO, [CommitOperationAdd("w.safetensors", weights)])
    assert len(fakehub.requests.find("^/storage/", "PUT")) == 1
    assert fakehub.commits(REPO)[0].oid == head
    operations = {"w.safetensors": weights, "a.txt": b"a"}.items()
    made = api.create_commit(REPO, [CommitOperationAdd(*each) for each in operations], commit_message="x")
    again = api.create_commit(REPO, [CommitOperationAdd(*each) for each in operations], commit_message="y")
    assert len(fakehub.requests.find("^/storage/", "PUT")) == 1
    assert again.oid == made.oid
    assert [commit.title for commit in fakehub.commits(REPO)] == ["x", "initial commit"]


def test_deleting_files_and_folders(fakehub: FakeHub, api: HfApi) -> None:
    fakehub.add_repo(REPO)
    fakehub.commit(REPO, {"a/1.txt": "1", "a/2.txt": "2", "b.txt": "b", "c.txt": "c"})
    api.create_commit(REPO, [CommitOperationDelete("a/"), CommitOperationDelete("b.txt")], commit_message="x")
    assert fakehub.contents(REPO) == {"c.txt": b"c"}
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit(REPO, [CommitOperationDelete("b.txt")], commit_message="x")


def test_listings_come_by_pages_and_tell_sizes_and_hashes(fakehub: FakeHub, api: HfApi) -> None:
    fakehub.limits.page_nitems = 2
    fakehub.add_repo(REPO)
    weights = os.urandom(100)
    oid = fakehub.commit(REPO, {"a.txt": "a", "in/b.txt": "b", "in/w.safetensors": weights, "z.txt": "z"})
    fakehub.commit(REPO, {"z.txt": "zz"})
    tree = list(api.list_repo_tree(REPO, recursive=True))
    assert [each.path for each in tree] == [
        ".gitattributes", "a.txt", "in", "in/b.txt", "in/w.safetensors", "z.txt"
    ]  # fmt: skip
    assert len(fakehub.requests.find("/tree/")) == 3
    assert [each.path for each in api.list_repo_tree(REPO, "in")] == ["in/b.txt", "in/w.safetensors"]
    (info,) = api.get_paths_info(REPO, ["in/w.safetensors", "nothing"], expand=True)
    assert isinstance(info, RepoFile)
    assert info.lfs is not None
    assert (info.size, info.lfs.size, info.lfs.pointer_size) == (100, 100, 128)
    assert info.last_commit is not None
    assert info.last_commit.oid == oid
    siblings = {each.rfilename: each for each in api.model_info(REPO, files_metadata=True).siblings or []}
    assert siblings["in/w.safetensors"].lfs == info.lfs
    assert siblings["z.txt"].size == 2


def test_long_histories_come_by_pages(fakehub: FakeHub, api: HfApi) -> None:
    fakehub.add_repo(REPO)
    made = [fakehub.commit(REPO, {"a.txt": str(number)}) for number in range(60)]
    assert [commit.commit_id for commit in api.list_repo_commits(REPO)][:-1] == made[::-1]


def test_branches_and_tags(fakehub: FakeHub, api: HfApi) -> None:
    first = fakehub.add_repo(REPO)
    api.create_branch(REPO, branch="side/way")
    api.create_tag(REPO, tag="v1", revision="main")
    made = api.create_commit(REPO, [CommitOperationAdd("a.txt", b"a")], commit_message="x", revision="side/way")
    assert api.model_info(REPO).sha == first
    assert api.model_info(REPO, revision="side/way").sha == made.oid
    refs = api.list_repo_refs(REPO)
    assert {each.name: each.target_commit for each in refs.branches} == {"main": first, "side/way": made.oid}
    assert {each.name: each.target_commit for each in refs.tags} == {"v1": first}
    with pytest.raises(HfHubHTTPError) as error:
        api.create_branch(REPO, branch="side/way")
    assert error.value.response.status_code == 409
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(REPO, [CommitOperationAdd("a.txt", b"b")], commit_message="x", revision="nowhere")
    api.delete_branch(REPO, branch="side/way")
    api.delete_tag(REPO, tag="v1")
    assert not api.revision_exists(REPO, "side/way")


def test_a_stale_parent_is_refused(fakehub: FakeHub, api: HfApi) -> None:
    head = fakehub.add_repo(REPO)
    newer = fakehub.commit(REPO, {"a.txt": "a"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api.create_commit(REPO, [CommitOperationAdd("b.txt", b"b")], commit_message="x", parent_commit=head)
    assert error.value.response.status_code == 412
    assert fakehub.contents(REPO) == {"a.txt": b"a"}
    api.create_commit(REPO, [CommitOperationAdd("b.txt", b"b")], commit_message="x", parent_commit=newer)
    assert fakehub.contents(REPO) == {"a.txt": b"a", "b.txt": b"b"}


def test_safetensors_headers_are_read_by_range_in_a_process_of_its_own(fakehub: FakeHub, tmp_path: Path) -> None:
    """By the module's functions, which go to HF_ENDPOINT."""
    names = [f"layers.{number}.{'long' * 20}.weight" for number in range(1500)]  # a header of more than 100 kB
    save_file({name: torch.zeros(2, 3, dtype=torch.bfloat16) for name in names}, tmp_path / "1.safetensors")
    save_file({"big": torch.zeros(1000, 1000)}, tmp_path / "2.safetensors")
    shards = dict.fromkeys(names, "1.safetensors") | {"big": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    fakehub.add_repo(REPO, tmp_path, private=True)
    script = (
        "import json, sys; from huggingface_hub import get_safetensors_metadata as get\n"
        "found = get(sys.argv[1], token=sys.stdin.read())\n"
        "print(json.dumps({name: file.parameter_count for name, file in found.files_metadata.items()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, REPO],
        input=fakehub.read_token,
        env=fakehub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"1.safetensors": {"BF16": 9000}, "2.safetensors": {"F32": 1_000_000}}
    weights = fakehub.requests.find("^/storage/", "GET")
    assert {request.status for request in weights} == {206}
    assert max(request.sent_nbytes for request in weights) < 300_000


def test_by_hand_it_keeps_its_repos_for_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    seed = f"{REPO}={tmp_path / 'tiny'}"
    command = [sys.executable, "-m", "tests.fakehub", "--folder", str(tmp_path / "hub"), "--repo", seed]
    heads = []
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            endpoint = process.stdout.readline().strip().removeprefix("HF_ENDPOINT=")
            info = HfApi(endpoint=endpoint, token=False).model_info(REPO)
            heads.append((info.sha, [each.rfilename for each in info.siblings or []]))
            process.terminate()
        assert process.returncode == 0
    assert heads[0] == heads[1]
    assert heads[0][1] == [".gitattributes", "config.json"]
