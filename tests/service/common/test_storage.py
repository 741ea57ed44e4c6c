import pytest
from ulid import ULID

from hqq_core.errors import StorageFullError
from service.common.storage import ArtifactStore


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "data")


@pytest.fixture
def job_id():
    return f"job_{ULID()}"


def test_folders_are_private(store, job_id):
    folder = store.create(job_id)
    assert store.create(job_id) == folder
    for path in (store.root, folder, store.output(job_id)):
        assert path.stat().st_mode & 0o777 == 0o700


def test_plan_round_trip(store, job_id):
    store.create(job_id)
    store.write_plan(job_id, {"shards": [1]})
    store.write_plan(job_id, {"shards": [1, 2]})
    assert store.read_plan(job_id) == {"shards": [1, 2]}
    store.write_plan(job_id, {"shards": [3]}, profiled=True)
    assert (store.read_plan(job_id), store.read_plan(job_id, profiled=True)) == ({"shards": [1, 2]}, {"shards": [3]})
    assert sorted(path.name for path in store.folder(job_id).iterdir() if path.is_file()) == [
        "plan.json",
        "plan.profiled.json",
    ]


def test_checks_are_there_until_nobody_waits_for_them(store, job_id):
    store.create(job_id)
    assert store.read_checks(job_id) == {}
    store.write_check(job_id, 10, [{"index": 10}, None])
    store.write_check(job_id, 2, [None, None])
    assert list(store.read_checks(job_id).items()) == [(2, [None, None]), (10, [{"index": 10}, None])]
    (store.folder(job_id) / "checks" / "3.json").write_text('{"version": 0, "found": []}')
    assert list(store.read_checks(job_id)) == [2, 10]
    store.remove_ahead(job_id)
    assert store.read_checks(job_id) == {}
    with pytest.raises(FileNotFoundError):
        store.write_check(job_id, 1, [None])


def test_removed_job_is_gone(store, job_id):
    store.create(job_id)
    (store.output(job_id) / "model.safetensors").write_bytes(b"x")
    assert list(store.job_ids()) == [job_id]
    store.remove(job_id)
    store.remove(job_id)
    assert list(store.job_ids()) == []


@pytest.mark.parametrize("name", ["..", "job_../../etc", "", "job_x", "job_01K8Z3V4TQ8M3W1B0G6C2N9R5A/.."])
def test_only_job_ids_make_a_path(store, name):
    for use in (store.folder, store.output, store.energies, store.create, store.remove):
        with pytest.raises(ValueError, match="not a job id"):
            use(name)


def test_reserve_stays_free(store, tmp_path):
    free = store.free_nbytes()
    store.check_room(0, reserve_nbytes=0)
    with pytest.raises(StorageFullError, match="in reserve"):
        store.check_room(0, reserve_nbytes=2 * free)
    with pytest.raises(StorageFullError, match=f"{2 * free} bytes to write"):
        store.check_room(2 * free, reserve_nbytes=0)
