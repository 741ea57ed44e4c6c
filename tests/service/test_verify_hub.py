"""`halfquad verify OWNER/NAME`: the command as a user runs it, with the Hub's own client, against a Hub."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hqq_core import Provenance, Recipe, output_folders, quantize_checkpoint
from tests.checkpoints import save_llama
from tests.fakehub.server import FakeHub

REPO, SOURCE = "team-a/quantized", "team-a/source"
RECIPE = Recipe(energy="none", preset="fast")


@pytest.fixture
def verify(fakehub: FakeHub, tmp_path: Path):
    """The command's exit code, stdout and stderr; what it downloads is gone afterwards."""

    def run(*arguments: object, token: str | None = None) -> tuple[int, str, str]:
        temporary = tmp_path / "tmp"
        temporary.mkdir(exist_ok=True)
        environment = fakehub.environment(tmp_path / "home") | {"TMPDIR": str(temporary)}
        if token:
            environment |= {"HF_TOKEN": token, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}
        command = [sys.executable, "-m", "service.cli", "verify", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert "Traceback" not in done.stderr
        assert not [path for path in temporary.iterdir() if path.name.startswith("halfquad-")]
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def result(tmp_path: Path) -> Path:
    save_llama(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "result", RECIPE)
    return tmp_path / "result"


def test_a_repository_is_sound_and_its_commit_is_named(fakehub, verify, result):
    commit = fakehub.add_repo(REPO, result)
    code, stdout, _ = verify(REPO)
    assert code == 0
    assert f"{commit} of {REPO}" in stdout
    assert "14 tensors" in stdout
    code, stdout, _ = verify(REPO, "--json")
    found = json.loads(stdout)
    assert (found["sound"], found["repo_id"], found["commit"], found["tensors_quantized"]) == (True, REPO, commit, 14)


def test_a_revision_is_the_one_that_is_checked(fakehub, verify, result):
    sound = fakehub.add_repo(REPO, result)
    weights = bytearray((result / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    damaged = fakehub.commit(REPO, {"model.safetensors": bytes(weights)})
    code, stdout, stderr = verify(REPO, "--json")
    assert code == 1
    found = json.loads(stdout)
    assert (found["sound"], found["commit"]) == (False, damaged)
    assert found["name"].startswith("model.")
    assert f"error: {found['message']}" in stderr
    assert verify(REPO, "--revision", sound)[0] == 0


def test_it_is_compared_with_its_source_at_the_commit_that_it_was_made_of(fakehub, verify, tmp_path):
    source = save_llama(tmp_path / "source")
    commit = fakehub.add_repo(SOURCE, source)
    quantize_checkpoint(source, tmp_path / "result", RECIPE, provenance=Provenance(repo_id=SOURCE, commit=commit))
    fakehub.add_repo(REPO, tmp_path / "result")
    fakehub.commit(SOURCE, {"model.safetensors": (save_llama(tmp_path / "other", seed=1) / "model.safetensors")})
    code, stdout, stderr = verify(REPO, "--against", SOURCE, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["against_source"]
    code, _, stderr = verify(REPO, "--against", tmp_path / "other")
    assert code == 1
    assert "the source" in stderr


def test_all_results_of_a_repository_are_checked(fakehub, verify, tmp_path):
    recipes = [RECIPE, Recipe(format="mlx", energy="none", preset="fast")]
    quantize_checkpoint(save_llama(tmp_path / "source"), tmp_path / "result", *recipes)
    fakehub.add_repo(REPO, tmp_path / "result")
    code, stdout, _ = verify(REPO, "--json")
    assert code == 0
    assert [one["folder"] for one in json.loads(stdout)["outputs"]] == sorted(output_folders(recipes))
    last = sorted(output_folders(recipes))[-1]
    fakehub.commit(REPO, {f"{last}/config.json": "{}"})
    code, stdout, _ = verify(REPO, "--json")
    assert code == 1
    assert (json.loads(stdout)["folder"], json.loads(stdout)["name"]) == (last, "config.json")


def test_a_private_repository_wants_the_users_token(fakehub, verify, result):
    fakehub.add_repo(REPO, result, private=True)
    code, _, stderr = verify(REPO)
    assert code == 2
    assert "no such repository on the Hub, or none that your token" in stderr
    code, stdout, stderr = verify(REPO, token=fakehub.read_token)
    assert code == 0, stderr
    assert fakehub.read_token not in stdout + stderr


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((REPO, "--revision", "nowhere"), {}, "no revision 'nowhere'"),
        ((REPO,), {"gated": "manual"}, "gated: accept its terms at"),
        ((REPO,), {"disabled": True}, "disabled by the Hub"),
        (("team-a/nowhere",), {}, "no such folder here, and no such repository"),
        ((REPO, "--against", "team-a/nowhere"), {}, "no such repository"),
        (("no/repo/id",), {}, "no such folder"),
    ],
)
def test_what_cannot_be_had_is_bad_input(fakehub, verify, result, arguments, settings, message):
    fakehub.add_repo(REPO, result, **settings)
    code, _, stderr = verify(*arguments)
    assert code == 2, stderr
    assert message in stderr


def test_a_folder_has_no_revision(verify, result):
    code, _, stderr = verify(result, "--revision", "main")
    assert code == 2
    assert "a revision is one of a repository" in stderr


def test_a_hub_that_does_not_answer_is_no_bad_result(fakehub, verify, result):
    fakehub.__exit__()
    code, _, stderr = verify(REPO)
    assert code == 1
    assert f"error: {REPO}: cannot be downloaded" in stderr


def test_a_repository_without_a_result_is_bad_input(fakehub, verify):
    fakehub.add_repo(REPO)
    code, _, stderr = verify(REPO)
    assert code == 2
    assert "no halfquad_manifest.json" in stderr
