"""Whatever is killed in mid-job, the job ends `succeeded` and its files are those of an undisturbed run."""

import os
import signal
from pathlib import Path

import redis

from hqq_core.convert import quantize_checkpoint
from hqq_core.recipe import Recipe
from tests.acceptance.conftest import RECIPE, Installation, command_line, kill, wait_until
from tests.checkpoints import jobless_bytes


def start_job(installation: Installation, source: Path) -> str:
    installation.start()
    job_id = installation.client.submit(source, RECIPE)["id"]
    installation.wait_mid_job(job_id)
    return job_id


def assert_as_undisturbed(installation: Installation, job_id: str, undisturbed: Path) -> dict:
    job = installation.wait_succeeded(job_id)
    assert jobless_bytes(installation.output(job_id)) == jobless_bytes(undisturbed)
    return job


def test_killed_with_two_formats(embedded: Installation, sharded: Path, undisturbed: Path, tmp_path: Path) -> None:
    recipes = [RECIPE, {**RECIPE, "format": "mlx"}]
    embedded.start()
    job_id = embedded.client.submit(sharded, recipes=recipes)["id"]
    embedded.wait_mid_job(job_id)
    embedded.kill_worker()
    job = embedded.wait_succeeded(job_id)
    assert job["attempt"] == 2
    folders = [output["folder"] for output in job["result"]["outputs"]]
    assert folders == ["compressed-tensors-4bit-g64", "mlx-4bit-g64"]
    quantize_checkpoint(sharded, tmp_path / "mlx", Recipe(**recipes[1]), threads=1)
    for folder, alone in zip(folders, (undisturbed, tmp_path / "mlx"), strict=True):
        assert jobless_bytes(embedded.output(job_id) / folder) == jobless_bytes(alone)
    artifact = next(file for file in embedded.client.artifacts(job_id) if file["name"] == "mlx-4bit-g64/config.json")
    embedded.client.download(job_id, artifact["name"], tmp_path / "copy" / artifact["name"])


def test_worker_killed(installation: Installation, sharded: Path, undisturbed: Path) -> None:
    job_id = start_job(installation, sharded)
    installation.kill_worker()
    if not installation.embedded:  # there, the supervisor does this
        installation.launch("worker")
    job = assert_as_undisturbed(installation, job_id, undisturbed)
    assert job["attempt"] == 2


def test_pool_child_killed(embedded: Installation, sharded: Path, undisturbed: Path) -> None:
    job_id = start_job(embedded, sharded)
    kill(next(pid for pid in embedded.pids() if "billiard.spawn" in command_line(pid)))
    job = assert_as_undisturbed(embedded, job_id, undisturbed)
    assert job["attempt"] == 2


def test_everything_killed_and_started_again(installation: Installation, sharded: Path, undisturbed: Path) -> None:
    job_id = start_job(installation, sharded)
    installation.kill_everything()
    installation.start()
    assert_as_undisturbed(installation, job_id, undisturbed)


def test_broker_emptied(installation: Installation, sharded: Path, undisturbed: Path) -> None:
    job_id = start_job(installation, sharded)
    with open_broker(installation) as broker:
        broker.flushall()
    job = assert_as_undisturbed(installation, job_id, undisturbed)
    assert job["attempt"] == 1


def test_broker_killed(embedded: Installation, sharded: Path, undisturbed: Path) -> None:
    job_id = start_job(embedded, sharded)
    kill(next(pid for pid in embedded.pids() if "valkey-server" in command_line(pid)))
    assert_as_undisturbed(embedded, job_id, undisturbed)


def test_broker_log_damaged(embedded: Installation, sharded: Path, undisturbed: Path) -> None:
    job_id = start_job(embedded, sharded)
    embedded.kill_everything()
    for log in (embedded.data_dir / "valkey" / "appendonlydir").glob("*.incr.aof"):
        log.write_bytes(b"no such command\r\n" + log.read_bytes())
    embedded.start()
    assert "broker_emptied" in embedded.log.read_text()
    assert_as_undisturbed(embedded, job_id, undisturbed)


def test_api_killed(embedded: Installation, sharded: Path, undisturbed: Path) -> None:
    job_id = start_job(embedded, sharded)
    kill(next(pid for pid in embedded.pids() if "service.cli api" in command_line(pid)))
    wait_until(lambda: not embedded.look("/livez"), 5, "the end of the API")
    wait_until(lambda: embedded.look("/livez"), 20, "the API to come back")
    assert_as_undisturbed(embedded, job_id, undisturbed)


def test_stopping_hands_the_unit_back(installation: Installation, whole: Path) -> None:
    installation.start()
    job_id = installation.client.submit(whole, RECIPE)["id"]
    wait_until(lambda: installation.claims(job_id), 30, "the shard to be taken")
    assert installation.stop() < 8
    installation.wait_gone()
    installation.start()
    job = installation.wait_succeeded(job_id)
    assert job["attempt"] == 1, "a start that was handed back does not count"
    assert len(installation.log_events(job_id, "unit_handed_back")) == 1
    assert installation.claims(job_id) == [0, 0]


def test_supervisor_killed_takes_all_along(embedded: Installation) -> None:
    embedded.start()
    assert len(embedded.pids()) >= 5  # supervisor, broker, API, worker and its child
    os.kill(embedded.started[0].pid, signal.SIGKILL)
    embedded.wait_gone()


def test_interrupt_stops_all(embedded: Installation) -> None:
    embedded.start()
    embedded.started[0].send_signal(signal.SIGINT)
    assert embedded.started[0].wait(10) == 0
    embedded.wait_gone()


def open_broker(installation: Installation) -> redis.Redis:
    if installation.embedded:
        return redis.Redis(unix_socket_path=str(installation.data_dir / "run" / "valkey.sock"))
    return redis.Redis.from_url(installation.environment["HALFQUAD_BROKER_URL"])
