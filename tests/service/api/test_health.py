from fastapi.testclient import TestClient

from service.app import create_app
from service.common import repository
from service.common.schema import downgrade
from tests.mounts import read_only


def test_alive_without_anything_else(api, migrated):
    downgrade(migrated, "base")
    assert api.get("/livez").json() == {"status": "ok"}


def test_ready_without_workers_is_degraded(api, migrated):
    response = api.get("/readyz")
    assert response.status_code == 200
    assert response.json()["status"] == "degraded"
    assert response.json()["checks"]["workers"] == {"ok": False, "detail": "no worker is online: jobs wait"}
    with migrated.write() as session:
        repository.worker_seen(session, "one", ttl_s=60)
    assert api.get("/readyz").json()["status"] == "ok"


def test_each_missing_part_makes_it_unready(settings, migrated, tmp_path):
    changes = {
        "broker": {"broker_url": f"redis+socket://{tmp_path}/nobody.sock"},
        "disk": {"min_free_nbytes": 2**62},
    }
    for name, change in changes.items():
        with TestClient(create_app(settings.model_copy(update=change))) as api:
            response = api.get("/readyz")
        assert response.status_code == 503
        assert response.json()["status"] == "unavailable"
        assert [key for key, check in response.json()["checks"].items() if not check["ok"]] == [name, "workers"]


def test_a_store_that_cannot_be_written_to_makes_it_unready(api, settings):
    store = settings.data_dir / "jobs"
    store.mkdir(parents=True, exist_ok=True)
    with read_only(store):
        response = api.get("/readyz")
    assert response.status_code == 503
    assert response.json()["checks"]["disk"] == {"ok": False, "detail": "the data directory cannot be written to"}
    assert api.get("/readyz").status_code == 200


def test_database_behind_makes_it_unready(api, migrated):
    downgrade(migrated, "base")
    response = api.get("/readyz")
    assert response.status_code == 503
    assert "halfquad migrate" in response.json()["checks"]["migration"]["detail"]
