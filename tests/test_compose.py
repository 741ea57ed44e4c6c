"""No Docker engine runs here: the files are held against the settings, commands and targets that they name."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from sqlalchemy import make_url

from service.cli import app
from service.common.settings import Settings

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
INSTRUCTIONS = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
STAGES = {match[2]: match[1] for line in INSTRUCTIONS if (match := re.match(r"FROM (\S+) AS (\S+)", line))}


def instructions(word: str) -> list[str]:
    return [line.removeprefix(word).strip() for line in INSTRUCTIONS if line.startswith(f"{word} ")]


def substitute(text: str) -> str:
    """As compose does; what must be given gets a value that a user could give."""
    return re.sub(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)?\}", lambda match: match[2] or "given", text)


def settings_of(service: dict) -> dict[str, str]:
    environment = service["environment"].items()
    return {name.removeprefix("HALFQUAD_").lower(): substitute(str(value)) for name, value in environment}


def test_services_are_those_of_the_distributed_mode() -> None:
    assert set(SERVICES) == {"postgres", "valkey", "migrate", "api", "worker"}
    assert set(OURS) == {"migrate", "api", "worker"}


@pytest.mark.parametrize("name", OURS)
def test_settings_exist_and_hold(name: str) -> None:
    values = settings_of(OURS[name])
    assert set(values) <= set(Settings.model_fields)
    settings = Settings(**values)
    assert make_url(settings.database_url).get_backend_name() == "postgresql"
    assert make_url(settings.database_url).host in SERVICES
    assert re.fullmatch(r"redis://(\w+):6379/0", settings.broker_url)[1] in SERVICES
    assert settings.embedded_socket is None


@pytest.mark.parametrize("command", [*(service["command"] for service in OURS.values()), *instructions("CMD")])
def test_commands_and_their_options_exist(command: list[str] | str) -> None:
    words = command if isinstance(command, list) else yaml.safe_load(command)
    found = typer.main.get_command(app).commands[words[0]]
    found.make_context(words[0], words[1:])  # raises on an unknown option


def test_targets_and_arguments_exist_in_the_dockerfile() -> None:
    arguments = {line.split("=")[0] for line in instructions("ARG")}
    for service in OURS.values():
        assert service["build"]["target"] in STAGES
        assert set(service["build"].get("args", {})) <= arguments


def test_every_process_is_unprivileged() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"] is True, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["cap_drop"] == ["ALL"], name
        assert "privileged" not in service, name
        assert service.get("user", "10001") != "root", name
    assert instructions("USER") == ["10001:10001"]
    assert STAGES["api"] == STAGES["worker"] == "runtime"
    assert INSTRUCTIONS.index("USER 10001:10001") < INSTRUCTIONS.index("FROM runtime AS api")


def test_nothing_is_published_beyond_this_host() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert published == ["127.0.0.1:8000:8000"]
    assert COMPOSE["networks"]["inside"] == {"internal": True}


def test_everything_that_stays_is_watched_and_waited_for() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            waited = "service_completed_successfully" if other == "migrate" else "service_healthy"
            assert how == {"condition": waited}, f"{name} on {other}"
        if service["restart"] != "no":
            assert service["healthcheck"]["test"], name
    assert {"migrate", "valkey"} == set(SERVICES["api"]["depends_on"]) == set(SERVICES["worker"]["depends_on"])


def test_volumes_are_declared_and_shared_where_they_must_be() -> None:
    for name, service in SERVICES.items():
        for volume in service["volumes"]:
            source = substitute(volume).split(":")[0]
            assert source.startswith(("./", "/")) or source in COMPOSE["volumes"], f"{name}: {volume}"
    assert SERVICES["api"]["volumes"] == SERVICES["worker"]["volumes"]
    assert f"HALFQUAD_DATA_DIR={instructions('VOLUME')[0]}" in " ".join(instructions("ENV"))


def test_worker_has_the_time_it_is_promised() -> None:
    assert int(SERVICES["worker"]["stop_grace_period"].removesuffix("s")) > Settings().soft_shutdown_s


def test_broker_keeps_what_it_is_given() -> None:
    command = shlex.join(SERVICES["valkey"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


def test_images_have_the_versions_that_the_tests_ran_with() -> None:
    assert "constraints.txt" in (ROOT / "Makefile").read_text()
    installs = [line for line in instructions("RUN") if "pip install" in line]
    assert [("torch" in line, "--constraint /src/constraints.txt" in line) for line in installs] == [
        (True, True),
        (False, True),
    ]
    extras = "transformers measures synthetic energies, s3fs writes to buckets"
    assert "/src[evaluate,s3]" in shlex.split(installs[-1]), extras
    copied_at = next(at for at, line in enumerate(INSTRUCTIONS) if re.match(r"COPY .*constraints\.txt", line))
    assert copied_at < next(at for at, line in enumerate(INSTRUCTIONS) if "pip install" in line)
    assert SERVICES["worker"]["build"]["args"]["TORCH_INDEX"] == "${TORCH_INDEX:-}"


def test_images_hold_what_the_project_needs_and_no_more() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert instructions("ENTRYPOINT") == ['["halfquad"]']
    assert "halfquad" in project["scripts"]
    copied = {word for line in instructions("COPY") if "--from" not in line for word in line.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    assert copied == {line.removeprefix("!") for line in ignored if line.startswith("!")}
    needed = {"hqq_core", "service", "worker", "pyproject.toml", project["readme"], *project["license-files"]}
    assert copied == needed | {"constraints.txt"}
    for name in instructions("ENV"):
        for variable in re.findall(r"HALFQUAD_(\w+)=", name):
            assert variable.lower() in Settings.model_fields
