import os
import stat

import pytest

from service.common.errors import SourceNotAllowed
from service.common.roots import SourceRoots


@pytest.fixture
def tree(tmp_path):
    """A root with a model and its links, and something outside."""
    model = tmp_path / "allowed" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text("{}")
    return tmp_path


@pytest.fixture
def roots(tree):
    return SourceRoots([tree / "allowed"])


def read(roots, path):
    with os.fdopen(roots.open(path), "rb") as file:
        return file.read()


def test_folder_below_a_root_is_allowed(tree, roots):
    assert roots.resolve(f"{tree}/allowed/model") == tree / "allowed" / "model"
    assert roots.resolve(f"{tree}/allowed") == tree / "allowed"
    assert roots.resolve(f"{tree}/allowed/not/there") == tree / "allowed" / "not" / "there"
    assert read(roots, tree / "allowed" / "model" / "config.json") == b"{}"


def test_links_within_the_root_are_followed(tree, roots):
    (tree / "allowed" / "latest").symlink_to("model")
    (tree / "allowed" / "model" / "copy.json").symlink_to("config.json")
    assert roots.resolve(f"{tree}/allowed/latest") == tree / "allowed" / "model"
    assert read(roots, tree / "allowed" / "latest" / "copy.json") == b"{}"


def test_root_may_itself_be_a_link(tree):
    (tree / "alias").symlink_to("allowed")
    roots = SourceRoots([tree / "alias"])
    assert roots.resolve(f"{tree}/alias/model") == roots.resolve(f"{tree}/allowed/model") == tree / "allowed" / "model"


@pytest.mark.parametrize(
    "path",
    [
        "{tree}/outside",
        "{tree}/outside/not-there",
        "{tree}/allowed-not",
        "{tree}/allowed/../outside",
        "{tree}/allowed/model/../model",
        "allowed/model",
        "",
        "/",
        "{tree}/allowed/\0",
        "{tree}/into/model",
        "{tree}/allowed/out",
        "{tree}/allowed/out/deeper",
        "{tree}/allowed/absolute",
    ],
)
def test_everything_else_is_refused(tree, roots, path):
    (tree / "into").symlink_to("allowed")
    (tree / "allowed" / "out").symlink_to("../outside")
    (tree / "allowed" / "absolute").symlink_to(tree / "outside")
    with pytest.raises(SourceNotAllowed):
        roots.resolve(path.format(tree=tree))


def test_refusal_does_not_tell_what_exists_outside(tree, roots):
    messages = set()
    for name in ("outside", "not-there", "outside/secret.json"):
        with pytest.raises(SourceNotAllowed) as refusal:
            roots.resolve(f"{tree}/{name}")
        messages.add(str(refusal.value))
    assert len(messages) == 1


def test_without_roots_nothing_is_allowed(tree):
    with pytest.raises(SourceNotAllowed):
        SourceRoots([]).resolve(f"{tree}/allowed/model")


def test_only_plain_files_below_a_root_are_opened(tree, roots):
    model = tree / "allowed" / "model"
    (model / "link.json").symlink_to("../../outside/secret.json")
    os.mkfifo(model / "pipe.json")
    (model / "folder.json").mkdir()
    (model / "null.json").symlink_to("/dev/null")
    for name in ("link.json", "pipe.json", "folder.json", "null.json", "../../outside/secret.json"):
        with pytest.raises(SourceNotAllowed):
            roots.open(model / name)


def test_missing_file_is_missing(tree, roots):
    with pytest.raises(FileNotFoundError):
        roots.open(tree / "allowed" / "model" / "gone.json")


def test_folder_that_becomes_a_link_is_noticed(tree, roots, monkeypatch):
    (tree / "outside" / "config.json").write_text("secret")
    real = os.path.realpath(tree / "allowed" / "model" / "config.json")
    (tree / "allowed" / "model").rename(tree / "allowed" / "old")
    (tree / "allowed" / "model").symlink_to("../outside")
    monkeypatch.setattr(os.path, "realpath", lambda path: real)  # as it was a moment ago
    with pytest.raises(SourceNotAllowed):
        roots.open(tree / "allowed" / "model" / "config.json")


def test_hard_link_to_another_owners_file_is_refused(tree, roots, monkeypatch):
    model = tree / "allowed" / "model"
    os.link(model / "config.json", model / "again.json")
    assert read(roots, model / "again.json") == b"{}"
    fstat = os.fstat

    def another_owners(descriptor):
        status = list(fstat(descriptor))
        status[stat.ST_UID] += 1  # only root could give the file away
        return os.stat_result(status)

    monkeypatch.setattr(os, "fstat", another_owners)
    with pytest.raises(SourceNotAllowed, match="hard link"):
        roots.open(model / "again.json")
    (model / "config.json").unlink()
    os.close(roots.open(model / "again.json"))  # one name only: its owner put it there


def test_refused_files_leave_no_descriptor(tree, roots):
    model = tree / "allowed" / "model"
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SourceNotAllowed):
        roots.open(model)
    assert len(os.listdir("/proc/self/fd")) == before
