"""The profile of a source: once for many jobs, stopped when asked, and done again by whoever is left."""

import json
import time
from pathlib import Path

import pytest

from hqq_core.checkpoint import REPORT
from hqq_core.convert import quantize_checkpoint
from hqq_core.recipe import Recipe
from tests.acceptance.conftest import RECIPE, Installation, command_line, kill, wait_until
from tests.checkpoints import jobless_bytes, save_llama

MEASURED = {**RECIPE, "energy": "synthetic"}


@pytest.fixture(scope="module")
def tiny(models: Path) -> Path:
    return save_llama(models / "tiny-to-profile", n_shards=2)


def wait_profiling(installation: Installation, job_id: str) -> None:
    """Until weights are being read."""

    def reading() -> bool:
        progress = installation.client.get(job_id)["progress"] or {}
        return progress.get("phase") == "profiling" and progress["completed"] > 0

    wait_until(reading, 60, lambda: f"profile of {installation.client.get(job_id)}:\n{installation.log_tail()}")


@pytest.mark.parametrize("energy", ["auto", "synthetic", "analytic", "none"])
def test_events_and_report_say_where_energies_come_from(
    service: Installation, tiny: Path, tmp_path: Path, energy: str
) -> None:
    recipe = {**RECIPE, "energy": energy}
    job = service.wait_succeeded(service.client.submit(tiny, recipe)["id"])
    events = [event for event in service.client.events(job["id"]) if event.type == "status"]
    profiling = [] if energy == "none" else ["profiling"]
    phases = [event.data["phase"] for event in events if event.data["status"] == "running"]
    assert phases == ["preflight", *profiling, "quantizing", "verifying"]
    report = json.loads(service.client.download(job["id"], REPORT, tmp_path / REPORT).read_text())
    assert report["recipe"]["energy"] == energy
    sources = {tensor["name"]: tensor["energy"] for tensor in report["tensors"] if tensor["spec"]}
    assert sources["model.layers.0.mlp.up_proj.weight"] == {"auto": "synthetic"}.get(energy, energy)
    if profiling:
        again = service.client.submit(tiny, {**recipe, "format": "hqq", "nbits": 3})["id"]
        service.wait_succeeded(again)
        found = [service.log_events(job_id, "energies_ready")[0] for job_id in (job["id"], again)]
        assert [data["cached"] for data in found] == [False, True]
        assert found[0]["energy"] == found[1]["energy"]


def test_energies_that_cannot_be_had_fail_the_job_and_say_why(service: Installation, models: Path) -> None:
    config = save_llama(models / "unheard-of") / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "unheard_of"'))
    job_id = service.client.submit(config.parent, MEASURED)["id"]
    wait_until(lambda: service.client.get(job_id)["status"] == "failed", 30, service.log_tail)
    error = service.client.get(job_id)["error"]
    assert (error["code"], error["type"], error["retryable"]) == ("energy_unavailable", "user", False)
    assert "unheard_of" in error["message"]


def test_cancel_stops_a_profile_and_leaves_nothing(embedded: Installation, whole: Path) -> None:
    embedded.start()
    job_id = embedded.client.submit(whole, MEASURED)["id"]
    wait_profiling(embedded, job_id)
    began = time.monotonic()
    assert embedded.client.cancel(job_id)["status"] == "cancelling"
    wait_until(lambda: embedded.client.get(job_id)["status"] == "cancelled", 5, "the end of the job")
    print(f"cancelled after {time.monotonic() - began:.1f} s")
    wait_until(lambda: not embedded.output(job_id).parent.exists(), 5, "its files to go")
    assert embedded.claims(job_id) == []


@pytest.mark.parametrize("whom", ["worker", "pool child"])
def test_killed_while_profiling(embedded: Installation, sharded: Path, tmp_path: Path, whom: str) -> None:
    embedded.start()
    job_id = embedded.client.submit(sharded, MEASURED)["id"]
    wait_profiling(embedded, job_id)
    if whom == "worker":
        embedded.kill_worker()
    else:
        kill(next(pid for pid in embedded.pids() if "billiard.spawn" in command_line(pid)))
    job = embedded.wait_succeeded(job_id)
    assert job["attempt"] == 2
    (found,) = embedded.log_events(job_id, "energies_ready")
    assert not found["cached"], "it was killed before the end"
    quantize_checkpoint(sharded, tmp_path / "undisturbed", Recipe(**MEASURED), threads=1)
    assert jobless_bytes(embedded.output(job_id)) == jobless_bytes(tmp_path / "undisturbed")
