import os
import stat

import pytest

from service.common.errors import SourceNotAllowed
from service.common.roots import SourceRoots


@pytest.fixture
def tree(tmp_path):
    """A root with a model and its links, and something outside."""
    model = tmp_path / "root" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text("{}")
    return tmp_path


@pytest.fixture
def roots(tree):
    return SourceRoots([tree / "root"])


def read(roots, path):
    with os.fdopen(roots.open(path), "rb") as file:
        return file.read()


def test_folder_below_a_root_is_allowed(tree, roots):
    assert roots.resolve(f"{tree}/root/model") == tree / "root" / "model"
    assert roots.resolve(f"{tree}/root") == tree / "root"
    assert roots.resolve(f"{tree}/root/not/there") == tree / "root" / "not" / "there"
    assert read(roots, tree / "root" / "model" / "config.json") == b"{}"


def test_links_within_the_root_are_followed(tree, roots):
    (tree / "root" / "latest").symlink_to("model")
    (tree / "root" / "model" / "copy.json").symlink_to("config.json")
    assert roots.resolve(f"{tree}/root/latest") == tree / "root" / "model"
    assert read(roots, tree / "root" / "latest" / "copy.json") == b"{}"


def test_root_may_itself_be_a_link(tree):
    (tree / "alias").symlink_to("root")
    roots = SourceRoots([tree / "alias"])
    assert roots.resolve(f"{tree}/alias/model") == roots.resolve(f"{tree}/root/model") == tree / "root" / "model"


@pytest.mark.parametrize(
    "path",
    [
        "{tree}/outside",
        "{tree}/outside/not-there",
        "{tree}/rootless",
        "{tree}/root/../outside",
        "{tree}/root/model/../model",
        "root/model",
        "",
        "/",
        "{tree}/root/\0",
        "{tree}/into/model",
        "{tree}/root/out",
        "{tree}/root/out/deeper",
        "{tree}/root/absolute",
    ],
)
def test_everything_else_is_refused(tree, roots, path):
    (tree / "into").symlink_to("root")
    (tree / "root" / "out").symlink_to("../outside")
    (tree / "root" / "absolute").symlink_to(tree / "outside")
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
        SourceRoots([]).resolve(f"{tree}/root/model")


def test_only_plain_files_below_a_root_are_opened(tree, roots):
    model = tree / "root" / "model"
    (model / "link.json").symlink_to("../../outside/secret.json")
    os.mkfifo(model / "pipe.json")
    (model / "folder.json").mkdir()
    (model / "null.json").symlink_to("/dev/null")
    for name in ("link.json", "pipe.json", "folder.json", "null.json", "../../outside/secret.json"):
        with pytest.raises(SourceNotAllowed):
            roots.open(model / name)


def test_missing_file_is_missing(tree, roots):
    with pytest.raises(FileNotFoundError):
        roots.open(tree / "root" / "model" / "gone.json")


def test_folder_that_becomes_a_link_is_noticed(tree, roots, monkeypatch):
    (tree / "outside" / "config.json").write_text("secret")
    real = os.path.realpath(tree / "root" / "model" / "config.json")
    (tree / "root" / "model").rename(tree / "root" / "old")
    (tree / "root" / "model").symlink_to("../outside")
    monkeypatch.setattr(os.path, "realpath", lambda path: real)  # as it was a moment ago
    with pytest.raises(SourceNotAllowed):
        roots.open(tree / "root" / "model" / "config.json")


def test_hard_link_to_another_owners_file_is_refused(tree, roots, monkeypatch):
    model = tree / "root" / "model"
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
    model = tree / "root" / "model"
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SourceNotAllowed):
        roots.open(model)
    assert len(os.listdir("/proc/self/fd")) == before
