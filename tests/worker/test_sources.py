import os
from pathlib import Path

import pytest

from hqq_core.errors import CheckpointError
from service.common.errors import SourceNotAllowed, SourceNotFound
from service.common.roots import SourceRoots
from tests.checkpoints import save_llama
from worker.sources import open_source, provenance_of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


def source(path: Path) -> dict[str, str]:
    return {"type": "folder", "path": str(path)}


def test_folder_below_a_root_is_read(root: Path) -> None:
    checkpoint = open_source(source(save_llama(root / "tiny")), SourceRoots([root]))
    assert checkpoint.files == ("model.safetensors",)


def test_folder_outside_the_roots_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceNotAllowed):
        open_source(source(save_llama(tmp_path / "outside")), SourceRoots([root]))


def test_folder_that_became_a_link_out_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "tiny").symlink_to(save_llama(tmp_path / "outside"))
    with pytest.raises(SourceNotAllowed):
        open_source(source(root / "tiny"), SourceRoots([root]))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_file_that_is_a_link_out_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    outside, inside = save_llama(tmp_path / "outside"), save_llama(root / "tiny")
    (inside / name).unlink()
    (inside / name).symlink_to(outside / name)
    with pytest.raises(SourceNotAllowed, match=name):
        open_source(source(inside), SourceRoots([root])).headers()


def test_link_within_the_roots_is_followed(root: Path) -> None:
    """As in a Hub cache, whose snapshots link to its blobs."""
    inside = save_llama(root / "snapshot")
    (inside / "model.safetensors").rename(root / "blob")
    (inside / "model.safetensors").symlink_to(root / "blob")
    assert open_source(source(inside), SourceRoots([root])).headers()


def test_pipe_is_refused_without_waiting_for_its_writer(root: Path) -> None:
    inside = save_llama(root / "tiny")
    (inside / "model.safetensors").unlink()
    os.mkfifo(inside / "model.safetensors")
    with pytest.raises(SourceNotAllowed, match="model.safetensors"):
        open_source(source(inside), SourceRoots([root])).headers()


def test_missing_folder_is_not_found(root: Path) -> None:
    with pytest.raises(SourceNotFound, match="gone: no such folder"):
        open_source(source(root / "gone"), SourceRoots([root]))


def test_file_in_place_of_a_folder_is_no_folder(root: Path) -> None:
    (root / "file").write_text("")
    with pytest.raises(SourceNotFound, match="file: no such folder"):
        open_source(source(root / "file"), SourceRoots([root]))


def test_folder_that_is_no_checkpoint_is_found_and_refused(root: Path) -> None:
    (root / "empty").mkdir()
    with pytest.raises(CheckpointError, match="in the folder"):
        open_source(source(root / "empty"), SourceRoots([root]))


def test_a_result_tells_the_folders_name_and_not_its_path(root: Path) -> None:
    provenance = provenance_of(source(root / "tiny"), "01JOB")
    assert (provenance.folder, provenance.repo_id, provenance.job_id) == ("tiny", None, "01JOB")


def test_a_result_tells_the_repository_and_its_commit() -> None:
    provenance = provenance_of({"type": "hub", "repo_id": "team-a/model", "commit": "abc"}, "01JOB")
    assert (provenance.folder, provenance.repo_id, provenance.commit) == (None, "team-a/model", "abc")
