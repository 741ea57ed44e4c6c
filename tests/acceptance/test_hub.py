"""From a repo to a repo: the README's own commands, run by a shell; real processes and clients, a Hub on loopback."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hqq_core.recipe import Recipe
from hqq_core.verify import verify_folder
from service.client import ApiError
from tests.acceptance.conftest import RECIPE, Installation, wait_until
from tests.fakehub.server import FakeHub
from tests.families import build, replaced
from tests.hqq_core.card.test_snippets import QUIET, sections
from tests.solved import dequantized
from tests.vocabularies import save_tokenizer

README = (Path(__file__).parents[2] / "README.md").read_text()
NAMED, QUANTIZED = "HuggingFaceTB/SmolLM2-135M", "me/SmolLM2-135M-4bit"  # by the README
SOURCE, TARGET = "team-a/tiny", "team-a/tiny-4bit"


def readme_blocks(section: str) -> list[str]:
    """What a section has to be copied into a shell."""
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def source(models: Path) -> Path:
    """A Llama that writes, in shards."""
    folder = models / "tiny-to-publish"
    build("llama", hidden_size=128, intermediate_size=256, head_dim=32).save_pretrained(folder, max_shard_size="400KB")
    return save_tokenizer(folder, "llama-bpe")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Iterator[FakeHub]:
    """Has the model, for those alone who may read it."""
    with FakeHub(tmp_path_factory.mktemp("hub")) as hub:
        hub.add_repo(SOURCE, source, private=True)
        yield hub


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, models: Path, hub: FakeHub) -> Iterator[Installation]:
    """`halfquad up` with that Hub as its endpoint."""
    environment = {"HALFQUAD_HUB_ENDPOINT": hub.endpoint, "HALFQUAD_HUB_TOKEN": hub.write_token}
    installation = Installation(tmp_path_factory.mktemp("up"), models, environment, embedded=True)
    installation.start()
    yield installation
    installation.close()


class User:
    """Somebody with a shell, and a token of their own for the Hub."""

    def __init__(self, up: Installation, hub: FakeHub, folder: Path) -> None:
        self.up, self.hub, self.folder = up, hub, folder
        self.environment = hub.environment(folder / "home") | QUIET
        self.environment |= {"HF_TOKEN": hub.read_token, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0", "HALFQUAD_URL": up.url}
        (folder / ".venv").symlink_to(sys.prefix)

    def sh(self, command: str) -> str:
        """Run the README's command: in it, ports and names are those of this test."""
        for theirs, ours in {"localhost:8000": f"127.0.0.1:{self.up.port}", NAMED: SOURCE, QUANTIZED: TARGET}.items():
            command = command.replace(theirs, ours)
        return self._run(["sh", "-ec", command])

    def python(self, code: str) -> str:
        return self._run([sys.executable, "-c", code])

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def snapshot(self, repo_id: str, revision: str = "main") -> Path:
        """A copy of a repository's files, by the Hub's own client."""
        call = f"snapshot_download({repo_id!r}, revision={revision!r})"
        return Path(self.python(f"from huggingface_hub import snapshot_download; print({call})").strip())


@pytest.fixture
def user(up: Installation, hub: FakeHub, tmp_path: Path) -> User:
    return User(up, hub, tmp_path)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.float().eval()(ids).logits


def assert_computes_what_was_solved(source: Path, result: Path, recipe: Recipe, folder: Path) -> None:
    """Transformers' logits are those of the dequantized weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, told = AutoModelForCausalLM.from_pretrained(result, output_loading_info=True)
    assert not any(told.values())
    ids = AutoTokenizer.from_pretrained(result)("The capital of France is", return_tensors="pt").input_ids
    wanted = replaced(source, result, folder, dequantized(source, recipe))
    assert torch.equal(logits(model, ids), logits(wanted, ids))


def test_readme_commands_lead_from_a_repo_to_a_repo(
    user: User, up: Installation, hub: FakeHub, source: Path, tmp_path: Path
) -> None:
    start, curl, others = readme_blocks("From a repo to a repo")
    assert start == "HALFQUAD_HUB_TOKEN=hf_... .venv/bin/halfquad up"  # which is what the fixture did
    submit, verify, watch = others.splitlines()

    job = up.wait_succeeded(json.loads(user.sh(curl))["id"])
    (commit, *before) = hub.commits(TARGET)
    assert job["result"]["pushed"] == {"url": f"{hub.endpoint}/{TARGET}", "commit": commit.oid, "pull_request": None}
    assert len(before) == 1, "one commit after that of the repository's making"
    result = user.snapshot(TARGET)
    assert_computes_what_was_solved(source, result, Recipe(), tmp_path / "dequantized")
    told = user.sh(verify)
    assert f"{commit.oid} of {TARGET}" in told
    assert f"14 tensors, compared with what was solved and with {SOURCE}" in told

    user.sh(submit)
    assert hub.commits(f"{TARGET}-pr", "refs/pr/1")[0].title.startswith("Weights quantized by Halfquad")

    user.sh(watch)
    (watched,) = up.http.get("/v1/watches").json()["data"]
    assert (watched["source"]["repo_id"], watched["target"]["repo_id"]) == (SOURCE, TARGET)
    up.http.delete(f"/v1/watches/{watched['id']}").raise_for_status()


def test_published_card_is_valid_and_its_snippet_runs(user: User, up: Installation, hub: FakeHub) -> None:
    target = {"repo_id": "team-a/with-a-card", "private": True}
    up.wait_succeeded(up.client.submit(source={"repo_id": SOURCE}, target=target, recipe=RECIPE)["id"])
    hub.requests.clear()
    call = f"card = ModelCard.load({target['repo_id']!r}); card.validate(); print(card.data.base_model)"
    assert user.python(f"from huggingface_hub import ModelCard; {call}").strip() == SOURCE
    assert [request.status for request in hub.requests.find("^/api/validate-yaml$", "POST")] == [200]
    found = sections(hub.contents(target["repo_id"])["README.md"].decode())
    ((_, code),) = [block for blocks in found.values() for block in blocks if block[0] == "python"]
    assert target["repo_id"] in code
    assert "The capital of France is" in user.python(code)


def test_weights_that_are_not_to_be_kept_are_gone(up: Installation, hub: FakeHub) -> None:
    asked = {"repo_id": SOURCE, "keep": False}
    job = up.wait_succeeded(up.client.submit(source=asked, target={"repo_id": "team-a/dropped"}, recipe=RECIPE)["id"])
    assert not [path for path in (up.data_dir / "sources").iterdir() if "." not in path.name]
    there = {name: len(content) for name, content in hub.contents("team-a/dropped").items()}
    assert there == {artifact["name"]: artifact["nbytes"] for artifact in job["result"]["artifacts"]}


def test_pull_request_leaves_main_as_it_is(user: User, up: Installation, hub: FakeHub, source: Path) -> None:
    head = hub.add_repo("team-b/theirs", source)
    refused = up.client.submit(source={"repo_id": SOURCE}, target={"repo_id": "team-b/theirs"}, recipe=RECIPE)["id"]
    wait_until(lambda: up.client.get(refused)["status"] == "failed", 30, up.log_tail)
    assert up.client.get(refused)["error"]["code"] == "repo_exists"
    target = {"repo_id": "team-b/theirs", "create_pr": True}
    job = up.wait_succeeded(up.client.submit(source={"repo_id": SOURCE}, target=target, recipe=RECIPE)["id"])
    assert job["result"]["pushed"]["pull_request"] == f"{hub.endpoint}/team-b/theirs/discussions/1"
    assert hub.commits("team-b/theirs")[0].oid == head
    assert verify_folder(user.snapshot("team-b/theirs", "refs/pr/1")).tensors_quantized == 14


def test_what_the_token_may_not_read_is_not_found(up: Installation, hub: FakeHub, source: Path) -> None:
    hub.add_repo("mallory/hers", source, private=True)
    job_id = up.client.submit(source={"repo_id": "mallory/hers"}, target={"repo_id": "team-a/none"}, recipe=RECIPE)[
        "id"
    ]
    wait_until(lambda: up.client.get(job_id)["status"] == "failed", 30, up.log_tail)
    error = up.client.get(job_id)["error"]
    assert (error["code"], error["type"]) == ("repo_not_found", "user")
    assert "team-a/none" not in hub.state.repos
    with pytest.raises(ApiError) as unknown:
        up.client.submit(source={"repo_id": SOURCE, "credential": "nobodys"})
    assert unknown.value.code == "credential_unknown"


def test_token_is_in_no_file_and_no_answer(up: Installation, hub: FakeHub) -> None:
    """After all of the above."""
    secret = hub.write_token.encode()
    files = [path for path in (*up.data_dir.rglob("*"), up.log) if path.is_file()]
    assert files
    assert [path for path in files if secret in path.read_bytes()] == []
    for job in up.client.list():
        for path in ("", "/events?limit=1000"):
            assert hub.write_token not in up.look(f"/v1/jobs/{job['id']}{path}")
