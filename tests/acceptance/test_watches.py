"""A branch followed by real workers, from the command to the pull request, through the loss of all of them."""

import json
from pathlib import Path

from tests.acceptance.conftest import Installation, wait_until
from tests.checkpoints import save_llama
from tests.fakehub.server import FakeHub

REPO, RESULTS = "team-a/tiny", "team-a/tiny-4bit"


def test_a_new_head_becomes_one_job_and_a_pull_request(
    installation: Installation, fakehub: FakeHub, tmp_path: Path
) -> None:
    fakehub.add_repo(REPO, save_llama(tmp_path / "first", layers=1), private=True)
    installation.environment |= {
        "HALFQUAD_HUB_ENDPOINT": fakehub.endpoint,
        "HALFQUAD_HUB_TOKEN": fakehub.write_token,
    }
    installation.start()
    added = installation.run("watch", "add", REPO, "--push-to", RESULTS, "--energy", "none", "--json")
    watch_id = json.loads(added)["id"]
    wait_until(lambda: installation.client.get_watch(watch_id)["last_commit"], 30, "the first look")
    second = fakehub.commit(REPO, {p.name: p for p in save_llama(tmp_path / "second", layers=2).iterdir()})
    fakehub.requests.clear()
    fakehub.faults.add("/revision/main", delay_s=60.0)
    installation.client.change_watch(watch_id, enabled=True)
    fakehub.requests.wait("/revision/main")
    installation.kill_everything()  # while the answer is awaited
    installation.start()
    assert list(installation.client.list()) == []
    installation.client.change_watch(watch_id, enabled=True)
    wait_until(lambda: list(installation.client.list()), 30, "the job")
    (job,) = installation.client.list(label=f"watch:{watch_id}")
    assert job["source"]["commit"] == second
    job = installation.wait_succeeded(job["id"])
    assert job["result"]["pushed"]["pull_request"] == f"{fakehub.endpoint}/{RESULTS}/discussions/1"
    assert "config.json" in fakehub.files(RESULTS, "refs/pr/1")
    assert len(list(installation.client.list())) == 1
    installation.stop()
