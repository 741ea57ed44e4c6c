"""Results at a folder and at a bucket of a real S3 server: whole or told to be unfinished, once, and nobody else's files."""

import json
from pathlib import Path

import boto3
import pytest

from service.common.errors import RepoExists, TargetNotAllowed
from tests.worker.push.conftest import MakeFiles
from worker.push import at_url
from worker.push import store as store_module
from worker.push.at_url import MARKER
from worker.push.files import PushFile
from worker.push.store import Store, check_url
from worker.push.target import check_links

JOB, OTHER = "job_01JAAAAAAAAAAAAAAAAAAAAAAA", "job_01JBBBBBBBBBBBBBBBBBBBBBBB"


def result(make_files: MakeFiles, folder: str, **contents: bytes) -> list[PushFile]:
    """Files and, last, the manifest that names them."""
    named = {name.replace("__", "/"): content for name, content in contents.items()}
    manifest = json.dumps({"files": [{"name": name} for name in named], "made": folder}).encode()
    return make_files(folder, {**named, "halfquad_manifest.json": manifest})


def publish(store: Store, job_id: str, files: list[PushFile], *, overwrite: bool = False) -> None:
    marker = at_url.begin(store, job_id, files, overwrite=overwrite)
    if marker is None:
        return
    at_url.upload(store, [file for file in files if not file.is_manifest], lambda nbytes: None)
    at_url.publish(store, marker, [file for file in files if file.is_manifest])


def contents(store: Store) -> dict[str, bytes]:
    return {name: store.read(name) for name in store.sizes()}


def expected(files: list[PushFile]) -> dict[str, bytes]:
    return {file.name: Path(file.path).read_bytes() for file in files}


def test_all_of_it_and_nothing_else_is_there(url: str, make_files: MakeFiles) -> None:
    files = result(make_files, "a", weights=b"w" * 1000, sub__config=b"{}", empty=b"")
    publish(Store(url), JOB, files)
    assert contents(Store(url)) == expected(files)
    assert at_url.is_complete(Store(url), files)


def test_same_job_again_changes_nothing(url: str, make_files: MakeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    files = result(make_files, "a", weights=b"w")
    publish(Store(url), JOB, files)
    monkeypatch.setattr(Store, "put", lambda *arguments: pytest.fail("sent again"))
    publish(Store(url), JOB, files)


def test_progress_counts_up_to_all_bytes(url: str, make_files: MakeFiles) -> None:
    files = result(make_files, "a", one=b"1" * 10, two=b"2" * 20)
    told: list[int] = []
    at_url.upload(Store(url), files, told.append)
    assert told == sorted(told)
    assert told[-1] == sum(file.nbytes for file in files)


STEPS = ["create", "remove", "put", "sync"]


@pytest.mark.parametrize("earlier", [False, True], ids=["empty", "over an earlier result"])
@pytest.mark.parametrize(("step", "calls"), [(step, calls) for step in STEPS for calls in range(4)])
def test_cut_off_anywhere_it_is_never_taken_for_complete_and_goes_on(
    url: str, make_files: MakeFiles, monkeypatch: pytest.MonkeyPatch, step: str, calls: int, earlier: bool
) -> None:
    files = result(make_files, "new", weights=b"new", config=b"{}")
    old = result(make_files, "old", weights=b"old", gone=b"gone", config=b"{}")
    if earlier:
        publish(Store(url), OTHER, old)
    real, left = getattr(Store, step), iter(range(calls))

    def dying(*arguments: object, **options: object) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Store, step, dying)
        try:
            publish(Store(url), JOB, files, overwrite=earlier)
        except KeyboardInterrupt:
            found = contents(Store(url))
            manifest = found.get("halfquad_manifest.json")
            named = [file for file in (files, old) if manifest == expected(file)["halfquad_manifest.json"]]
            assert all(expected(of).items() <= found.items() for of in named), (
                "a manifest stands for whole results only"
            )
    publish(Store(url), JOB, files, overwrite=earlier)
    assert contents(Store(url)) == expected(files)


def test_what_was_sent_is_not_sent_again(url: str, make_files: MakeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    files = result(make_files, "a", one=b"1", two=b"2", three=b"3")
    sent: list[str] = []
    real = Store.put

    def put(store: Store, file: PushFile, progress: object) -> None:
        if len(sent) == 2 and "cut" not in sent:
            sent.append("cut")
            raise KeyboardInterrupt
        sent.append(file.name)
        real(store, file, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "put", put)
    with pytest.raises(KeyboardInterrupt):
        publish(Store(url), JOB, files)
    publish(Store(url), JOB, files)
    assert sent == ["one", "two", "cut", "three", "halfquad_manifest.json"]


def test_others_are_in_the_way_unless_told_and_their_files_stay(url: str, make_files: MakeFiles) -> None:
    (foreign,) = make_files("foreign", {"notes.txt": b"mine"})
    old = result(make_files, "old", weights=b"old", part2=b"old")
    store = Store(url)
    store.put(foreign, lambda nbytes: None)
    files = result(make_files, "new", weights=b"new")
    with pytest.raises(RepoExists, match="1 files are there already"):
        publish(store, JOB, files)
    publish(store, OTHER, old, overwrite=True)
    with pytest.raises(RepoExists):
        at_url.check(store, JOB, overwrite=False)
    publish(store, JOB, files, overwrite=True)
    assert contents(store) == expected([*files, foreign]), "part2 was the earlier result's, notes.txt nobody's we know"


def test_one_of_two_jobs_has_the_place(url: str, make_files: MakeFiles) -> None:
    files, others = result(make_files, "a", one=b"1"), result(make_files, "b", one=b"2", left=b"2")
    store = Store(url)
    at_url.begin(store, OTHER, others, overwrite=False)
    with pytest.raises(RepoExists, match=OTHER):
        at_url.begin(store, JOB, files, overwrite=False)
    at_url.upload(store, others[:2], lambda nbytes: None)
    publish(store, JOB, files, overwrite=True)
    assert contents(store).keys() == {"one", "halfquad_manifest.json", "left"}, "no manifest ever named it"
    store.create(MARKER, b"{}")
    with pytest.raises(FileExistsError):
        store.create(MARKER, b"{}")


def test_manifest_of_another_leads_to_no_file_outside(url: str, make_files: MakeFiles) -> None:
    (outside,) = make_files("outside", {"kept": b"kept"})
    beside = Store(url.rsplit("/", 1)[0])
    beside.put(outside, lambda nbytes: None)
    hostile = json.dumps({"files": [{"name": "../kept"}, {"name": "/etc/passwd"}, {"name": 3}, 4]}).encode()
    planted = make_files("planted", {"halfquad_manifest.json": hostile})
    Store(url).put(planted[0], lambda nbytes: None)
    publish(Store(url), JOB, result(make_files, "new", weights=b"w"), overwrite=True)
    assert "kept" in beside.sizes()


def test_damage_on_the_way_is_noticed(url: str, make_files: MakeFiles) -> None:
    (file,) = make_files("a", {"weights": b"right"})
    store = Store(url)
    store.put(file, lambda nbytes: None)
    assert store.holds(file)
    wrong = PushFile(file.name, file.path, file.nbytes, "0" * 64)
    Path(file.path).write_bytes(b"wrong")
    assert not store.holds(wrong)
    with pytest.raises(OSError, match="other bytes"):
        store.put(PushFile(file.name, file.path, 4, "0" * 64), lambda nbytes: None)


def test_file_of_several_parts_is_known_by_its_etag(
    bucket: str, make_files: MakeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PART_NBYTES", 5 * 1024**2)
    (file,) = make_files("a", {"weights": bytes(range(256)) * 4 * 11 * 1024})
    store = Store(f"s3://{bucket}/m")
    told: list[int] = []
    store.put(file, told.append)
    assert told[-1] == file.nbytes
    etag = boto3.client("s3").head_object(Bucket=bucket, Key="m/weights")["ETag"]
    assert etag.endswith('-3"')
    monkeypatch.setattr(Store, "_sha256", lambda *arguments: pytest.fail("read back"))
    assert store.holds(file)


@pytest.mark.parametrize(
    "url",
    [
        "http://host/x", "/srv/x", "file://host/x", "file:///", "file:///srv/../etc", "s3://", "s3://key:secret@bucket/x",
        "s3://b/x?endpoint=evil", "file:///a::s3://b", "s3://b/../x", "memory://x", "simplecache::s3://b/x",
    ],
)  # fmt: skip
def test_urls_that_are_no_targets(url: str) -> None:
    with pytest.raises(ValueError, match="target|folder|bucket"):
        check_url(url)


def test_results_in_other_folders_stay(url: str, make_files: MakeFiles) -> None:
    other = [
        PushFile(f"other/{file.name}", file.path, file.nbytes, file.sha256)
        for file in result(make_files, "old", weights=b"old")
    ]
    publish(Store(url), OTHER, other)
    files = result(make_files, "new", weights=b"new")
    publish(Store(url), JOB, files, overwrite=True)
    assert contents(Store(url)) == expected([*other, *files])


def test_marker_that_came_after_the_look_is_respected(
    url: str, make_files: MakeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = result(make_files, "new", weights=b"new")
    listed = Store.sizes

    def late(store: Store) -> dict[str, int]:
        found = listed(store)
        monkeypatch.setattr(Store, "sizes", listed)
        assert at_url.begin(Store(url), OTHER, files, overwrite=False)
        return found

    monkeypatch.setattr(Store, "sizes", late)
    with pytest.raises(RepoExists, match="another job began"):
        at_url.begin(Store(url), JOB, files, overwrite=False)


def test_folder_that_a_link_leads_out_of_is_refused(tmp_path: Path) -> None:
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "second").symlink_to(tmp_path / "allowed")
    allowed = [f"file://{tmp_path}/allowed", f"file://{tmp_path}/second"]
    check_links(f"file://{tmp_path}/allowed/result", allowed)
    check_links(f"file://{tmp_path}/second/result", allowed)
    check_links("s3://bucket/result", allowed)
    for name in ("link", "link/result"):
        with pytest.raises(TargetNotAllowed, match="a link out of"):
            check_links(f"file://{tmp_path}/allowed/{name}", allowed)
