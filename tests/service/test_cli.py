"""The command as a user runs it: exit codes, data on stdout, talk on stderr."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from hqq_core.checkpoint import REPORT
from hqq_core.formats import FORMATS, described
from hqq_core.recipe import Recipe
from service.cli import app, main
from service.common.session import Database
from service.recipe_options import recipes
from tests.checkpoints import folder_bytes, llama_config, save_llama
from tests.service.conftest import PUSHED, Hand

HALFQUAD = [sys.executable, "-m", "service.cli"]


Run = Callable[..., tuple[str, str]]


@pytest.fixture
def halfquad(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The command within this process, which has torch already: its stdout and stderr once it ends with `code`."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["halfquad", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        stdout, stderr = capsys.readouterr()
        assert ended.value.code == code, stderr
        return stdout, stderr

    yield run
    signal.signal(signal.SIGTERM, handler)


def process(*arguments: object, code: int = 0, **environment: str) -> str:
    """The command in a process of its own; its stderr."""
    command = [*HALFQUAD, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_command_itself_loads_nothing_heavy() -> None:
    heavy = {"torch", "numba", "sqlalchemy", "celery", "fastapi", "uvicorn", "httpx", "pydantic"}
    code = f"import sys, service.cli; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_formats_lists_what_each_holds(halfquad: Run) -> None:
    listed = json.loads(halfquad("formats", "--json")[0])
    assert [entry["name"] for entry in listed] == list(FORMATS)
    assert listed == json.loads(json.dumps(described()))
    lines = halfquad("formats")[0].splitlines()
    assert lines[0].split("  ")[0] == "FORMAT"
    assert [line.split()[0] for line in lines[1:]] == list(FORMATS)
    for line, writer in zip(lines[1:], FORMATS.values(), strict=True):
        assert all(words in line for words in writer.capabilities.words().values())


def test_quantize_writes_a_folder_and_its_figures(tmp_path: Path, halfquad: Run) -> None:
    source, output = save_llama(tmp_path / "tiny"), tmp_path / "out"
    stdout, _ = halfquad(
        "quantize", source, "--output", output, "--nbits", 4, "--group-size", 64, "--format", "hqq", "--json"
    )
    result = json.loads(stdout)
    assert result["output"] == str(output)
    (made,) = result["outputs"]
    assert (made["folder"], made["format"]) == ("", "hqq")
    assert made["metrics"]["bits_per_weight"] < 5
    assert {file["name"] for file in made["files"]} < set(folder_bytes(output))
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "hqq"


def test_quantize_talks_to_people_too(tmp_path: Path, halfquad: Run) -> None:
    stdout, stderr = halfquad("quantize", save_llama(tmp_path / "tiny"), "--output", tmp_path / "out", "--threads", 1)
    assert "bits per weight" in stdout
    assert "tiny" in stderr, "the progress bar"


def test_verify_finds_a_result_sound(tmp_path: Path, halfquad: Run) -> None:
    source, output = save_llama(tmp_path / "tiny"), tmp_path / "out"
    halfquad("quantize", source, "--output", output, "--energy", "none")
    stdout, stderr = halfquad("verify", output, "--against", source)
    assert "14 tensors, compared with what was solved and with" in stdout
    assert "out" in stderr, "the progress bar"
    stdout, _ = halfquad("verify", output, "--threads", 1, "--json")
    found = json.loads(stdout)
    assert (found["sound"], found["tensors_quantized"], found["against_source"]) == (True, 14, False)


def test_verify_names_the_tensor_that_is_not_sound(tmp_path: Path, halfquad: Run) -> None:
    source, output = save_llama(tmp_path / "tiny"), tmp_path / "out"
    halfquad("quantize", source, "--output", output, "--energy", "none")
    with (output / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    stdout, stderr = halfquad("verify", output, "--json", code=1)
    found = json.loads(stdout)
    assert found["sound"] is False
    assert found["name"].startswith("model.")
    assert f"error: {found['message']}" in stderr


def test_verify_tells_bad_input_from_a_bad_result(tmp_path: Path, halfquad: Run) -> None:
    source = save_llama(tmp_path / "tiny")
    assert "no halfquad_manifest.json" in halfquad("verify", source, code=2)[1]
    assert "no such folder" in halfquad("verify", tmp_path / "nowhere", code=2)[1]
    halfquad("quantize", source, "--output", tmp_path / "out", "--energy", "none")
    assert "nowhere" in halfquad("verify", tmp_path / "out", "--against", tmp_path / "nowhere", code=2)[1]


def test_quantize_takes_several_formats(tmp_path: Path, halfquad: Run) -> None:
    source, output = save_llama(tmp_path / "tiny"), tmp_path / "out"
    options = ["--format", "mlx", "--format", "metal", "--energy", "none", "--output", output]
    made = json.loads(halfquad("quantize", source, *options, "--json")[0])["outputs"]
    assert [(out["folder"], out["format"]) for out in made] == [("mlx-4bit-g64", "mlx"), ("metal-4bit-g64", "metal")]
    assert {path.name for path in output.iterdir()} == {"mlx-4bit-g64", "metal-4bit-g64"}
    for out in made:
        assert {file["name"] for file in out["files"]} < set(folder_bytes(output / out["folder"]))
    options[-1] = tmp_path / "again"
    stdout, _ = halfquad("quantize", source, *options)
    assert [line.split()[-1] for line in stdout.splitlines() if line.startswith("written to")] == [
        str(tmp_path / "again" / out["folder"]) for out in made
    ]


def test_one_format_twice_is_refused(tmp_path: Path, halfquad: Run) -> None:
    options = ["--output", tmp_path / "out", "--format", "mlx", "--format", "mlx"]
    _, stderr = halfquad("quantize", save_llama(tmp_path / "tiny"), *options, code=2)
    assert "mlx-4bit-g64 is another recipe's, which is the same" in stderr
    assert not (tmp_path / "out").exists()


def test_submit_takes_several_formats(halfquad: Run, api_url: str, root: Path) -> None:
    options = ["--format", "mlx", "--format", "hqq", "--preset", "fast"]
    stdout, _ = halfquad("submit", root / "tiny", *options, "--url", api_url, "--json")
    job = json.loads(stdout)
    assert [(recipe["format"], recipe["preset"]) for recipe in job["recipes"]] == [("mlx", "fast"), ("hqq", "fast")]
    assert "mlx,hqq" in halfquad("jobs", "ls", "--url", api_url)[0]
    shown, _ = halfquad("jobs", "info", job["id"], "--url", api_url)
    assert [line.split()[:4] for line in shown.splitlines() if line.startswith("recipe")] == [
        ["recipe", "format", "mlx,", "nbits"],
        ["recipe", "1", "format", "hqq,"],
    ]


@pytest.mark.usefixtures("hub_token")
def test_submit_goes_from_hub_to_hub(halfquad: Run, api_url: str, api_hand: Hand) -> None:
    source = ["acme/tiny", "--revision", "v2", "--credential", "default", "--drop-source"]
    target = ["--push-to", "acme/tiny-4bit", "--branch", "int4", "--create-pr", "--private", "--overwrite"]
    stdout, _ = halfquad("submit", *source, *target, "--url", api_url, "--json")
    job = json.loads(stdout)
    assert job["source"] == {
        "type": "hub",
        "repo_id": "acme/tiny",
        "revision": "v2",
        "credential": "default",
        "keep": False,
    }
    assert job["target"] == {
        "repo_id": "acme/tiny-4bit",
        "branch": "int4",
        "create_pr": True,
        "private": True,
        "credential": "default",
        "overwrite": True,
    }
    assert "acme/tiny v2" in halfquad("jobs", "ls", "--url", api_url)[0]
    api_hand.plan(1), api_hand.solve(), api_hand.finish()
    api_hand.fail()
    shown, _ = halfquad("jobs", "retry", job["id"], "--push-to", "acme/other", "--url", api_url)
    assert ["target", "acme/other", "main"] in [line.split() for line in shown.splitlines()]
    api_hand.push()
    shown, _ = halfquad("jobs", "info", job["id"], "--url", api_url)
    lines = [line.split() for line in shown.splitlines()]
    assert ["uploaded", "to", PUSHED["url"]] in lines
    assert ["commit", PUSHED["commit"]] in lines


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["acme/tiny", "--branch", "x"], "--branch"),
        (["acme/tiny", "--create-pr"], "--create-pr"),
        (["acme/tiny", "--overwrite"], "--overwrite"),
        (["acme/tiny", "--push-credential", "x"], "--push-credential"),
        (["acme/tiny", "--push-to", "a/b", "--push-url", "s3://b/c"], "--push-url"),
        (["/models/tiny", "--revision", "x"], "--revision"),
        (["./tiny", "--drop-source"], "--drop-source"),
        (["acme/tiny", "--push-url", "s3://bucket/x"], "target_not_allowed"),
        (["a/b/c"], "repo_id"),
    ],
)
def test_places_that_make_no_sense_end_with_2(halfquad: Run, api_url: str, options: list[str], said: str) -> None:
    assert said in halfquad("submit", *options, "--url", api_url, code=2)[1]


def test_a_folder_here_is_no_repository(
    tmp_path: Path, halfquad: Run, api_url: str, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.chdir(root)
    (root / "acme" / "tiny").mkdir(parents=True)
    for text in ("acme/tiny", "./acme/tiny"):
        job = json.loads(halfquad("submit", text, "--url", api_url, "--json")[0])
        assert job["source"] == {"type": "folder", "path": str(root / "acme" / "tiny")}


def test_api_refuses_credentials_that_are_open_to_all(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    path.write_text('{"a": {"token": "hf_canary"}}')
    path.chmod(0o644)
    stderr = process("api", HALFQUAD_DATA_DIR=str(tmp_path), HALFQUAD_CREDENTIALS_FILE=str(path), code=1)
    assert "chmod o=" in stderr
    assert "canary" not in stderr


@pytest.mark.usefixtures("hub_token")
def test_watch_follows_a_branch_until_it_is_removed(halfquad: Run, api_url: str) -> None:
    source = ["acme/tiny", "--revision", "dev", "--credential", "default", "--interval", 3600, "--run-now"]
    options = [
        "--push-to",
        "acme/tiny-4bit",
        "--nbits",
        3,
        "--format",
        "hqq",
        "--format",
        "mlx",
        "--label",
        "team:search",
    ]
    watch = json.loads(halfquad("watch", "add", *source, *options, "--url", api_url, "--json")[0])
    assert (watch["source"]["revision"], watch["source"]["credential"]) == ("dev", "default")
    assert (watch["target"]["create_pr"], watch["target"]["credential"]) == (True, "default")
    assert [recipe["format"] for recipe in watch["recipes"]] == ["hqq", "mlx"]
    assert (watch["interval_s"], watch["run_now"], watch["labels"]) == (3600, True, {"team": "search"})
    listed = halfquad("watch", "list", "--url", api_url)[0].splitlines()
    assert [line.split() for line in listed[1:]] == [
        [watch["id"], "enabled", "acme/tiny", "dev", "acme/tiny-4bit", "main"]
    ]
    changed = json.loads(halfquad("watch", "change", watch["id"], "--disable", "--url", api_url, "--json")[0])
    assert (changed["enabled"], changed["interval_s"]) == (False, 3600)
    shown = [line.split() for line in halfquad("watch", "info", watch["id"], "--url", api_url)[0].splitlines()]
    assert ["state", "disabled"] in shown
    assert ["source", "acme/tiny", "dev"] in shown
    assert halfquad("watch", "remove", watch["id"], "--url", api_url)[0] == ""
    assert json.loads(halfquad("watch", "list", "--url", api_url, "--json")[0]) == []
    assert "there is no watch" in halfquad("watch", "info", watch["id"], "--url", api_url, code=2)[1]


@pytest.mark.usefixtures("hub_token")
def test_watch_may_commit_in_place_of_pull_requests(halfquad: Run, api_url: str) -> None:
    options = ["acme/tiny", "--push-to", "acme/tiny-4bit", "--commit", "--overwrite"]
    watch = json.loads(halfquad("watch", "add", *options, "--url", api_url, "--json")[0])
    assert (watch["target"]["create_pr"], watch["target"]["overwrite"]) == (False, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--push-to"),
        (["--push-url", "s3://bucket/x", "--commit"], "--commit"),
        (["--push-to", "acme/x", "--interval", "1"], "interval_s"),
        (["--push-to", "acme/x", "--commit"], "overwrite"),
    ],
)
@pytest.mark.usefixtures("hub_token")
def test_watches_that_make_no_sense_end_with_2(halfquad: Run, api_url: str, options: list[str], said: str) -> None:
    assert said in halfquad("watch", "add", "acme/tiny", *options, "--url", api_url, code=2)[1]


def test_each_type_is_a_recipe_of_gguf_alone() -> None:
    made = recipes(format=["mlx", "gguf"], type=["Q4_1", "Q8_0"])
    gguf = [{"format": "gguf", "type": name} for name in ("Q4_1", "Q8_0")]
    assert made == [{"format": "mlx"}, *gguf]
    assert recipes(format=["mlx"], type=["Q4_1"]) == [{"format": "mlx", "type": "Q4_1"}], "which is refused later"


def test_each_of_several_formats_gets_its_own_types() -> None:
    made = recipes(format=["mlx", "gguf", "hqq"], type=["mixed_3_6", "Q4_1"])
    assert made == [{"format": "mlx", "type": "mixed_3_6"}, {"format": "gguf", "type": "Q4_1"}, {"format": "hqq"}]


def test_recipe_has_an_option_for_each_setting_in_both_commands() -> None:
    settings = {field.name.removesuffix("_modules") for field in dataclasses.fields(Recipe)}
    for name in ("quantize", "submit"):
        assert settings <= {parameter.name for parameter in get_command(app).commands[name].params}


def test_options_reach_the_recipe(tmp_path: Path, halfquad: Run) -> None:
    options = "--format hqq --nbits 1.58 --group-size none --axis 1 --zero float --preset fast --energy analytic"
    more = "--include lm_head --skip o_proj --skip down_proj --max-shard-nbytes 100000"
    source, output = save_llama(tmp_path / "tiny"), tmp_path / "out"
    halfquad("quantize", source, "--output", output, *options.split(), *more.split())
    wanted = Recipe(
        format="hqq",
        nbits=1.58,
        group_size=None,
        zero="float",
        preset="fast",
        energy="analytic",
        include_modules=("lm_head",),
        skip_modules=("o_proj", "down_proj"),
        max_shard_nbytes=100_000,
    )
    assert json.loads((output / REPORT).read_text())["recipe"] == wanted.to_dict()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nbits", "9"], "nbits"),
        (["--group-size", "48"], "group_size 48"),
        (["--group-size", "some"], "--group-size"),
        (["--format", "typo"], "typo"),
        (["--preset", "slow"], "preset"),
        (["--energy", "solar"], "energy"),
        (["--colour", "red"], "--colour"),
        (["--threads", "-1"], "--threads"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_bad_settings_end_with_2_and_name_the_setting(
    tmp_path: Path, halfquad: Run, options: list[str], said: str
) -> None:
    source, output = save_llama(tmp_path / "tiny"), tmp_path / "out"
    stdout, stderr = halfquad("quantize", source, "--output", output, *options, code=2)
    assert said in stderr
    assert stdout == ""
    assert not output.exists()


def test_bad_source_ends_with_2_and_leaves_nothing(tmp_path: Path, halfquad: Run) -> None:
    source = tmp_path / "pickles"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(llama_config()))
    (source / "pytorch_model.bin").write_bytes(b"")
    _, stderr = halfquad("quantize", source, "--output", tmp_path / "out", code=2)
    assert "pytorch_model.bin" in stderr
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_made_is_an_error_in_one_line(tmp_path: Path, halfquad: Run) -> None:
    source, file = save_llama(tmp_path / "tiny"), tmp_path / "file"
    file.touch()
    _, stderr = halfquad("quantize", source, "--output", file / "out", code=1)
    bar, said = stderr.splitlines()
    assert "tiny" in bar
    assert said.startswith("error: ")
    assert "Not a directory" in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_quantize_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    source, output = save_llama(tmp_path / "large", layers=6, hidden=768), tmp_path / "out"
    command = [*HALFQUAD, "quantize", str(source), "--output", str(output), "--threads", "1"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (output.is_dir() and any(output.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(number)
    assert running.wait(20) == code
    assert not output.exists()


def test_migrate_brings_an_empty_database_to_head(tmp_path: Path, database_url: str) -> None:
    for _ in range(2):
        process("migrate", HALFQUAD_DATABASE_URL=database_url, HALFQUAD_DATA_DIR=str(tmp_path / "data"))
    database = Database(database_url)
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM jobs").scalar() == 0
    database.close()


def test_api_refuses_to_start_below_head(tmp_path: Path) -> None:
    assert "halfquad migrate" in process("api", HALFQUAD_DATA_DIR=str(tmp_path / "data"), code=1)


def test_bad_environment_is_named(halfquad: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFQUAD_PORT", "eighty")
    _, stderr = halfquad("up", code=2)
    assert "HALFQUAD_PORT" in stderr


def test_no_service_is_an_error_in_one_line(halfquad: Run) -> None:
    _, stderr = halfquad("jobs", "ls", "--url", "http://127.0.0.1:1", code=1)
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
