import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.common.settings import SOCKET_PATH_LIMIT, Settings, broker_socket


def test_defaults_follow_the_data_directory(tmp_path):
    settings = Settings(data_dir=tmp_path)
    assert settings.database_url == f"sqlite:///{tmp_path}/halfquad.db"
    assert settings.broker_url == f"redis+socket://{tmp_path}/run/valkey.sock"
    assert settings.embedded_socket == tmp_path / "run" / "valkey.sock"


def test_data_directory_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Settings().data_dir == tmp_path / ".halfquad"
    assert Settings(data_dir=Path("a/../b")).data_dir == tmp_path / "b"


def test_own_broker_means_no_embedded_one(tmp_path):
    assert Settings(data_dir=tmp_path, broker_url="redis://broker:6379/0").embedded_socket is None


@pytest.mark.parametrize("runtime_dir", [None, "/run/user/1000"])
def test_long_data_directory_gets_a_short_socket(monkeypatch, runtime_dir):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if runtime_dir:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime_dir)
    data_dir = Path("/") / ("x" * 200)
    socket = broker_socket(data_dir)
    assert len(os.fsencode(socket)) <= SOCKET_PATH_LIMIT
    assert socket == broker_socket(data_dir) != broker_socket(data_dir / "y")
    assert runtime_dir is None or socket.is_relative_to(runtime_dir)


def test_environment_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("HALFQUAD_SOURCE_ROOTS", f"/models{os.pathsep}{tmp_path}{os.pathsep}")
    monkeypatch.setenv("HALFQUAD_LEASE_S", "7.5")
    settings = Settings()
    assert settings.source_roots == (Path("/models"), tmp_path)
    assert settings.lease_s == 7.5


def test_hub_and_targets_are_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("HALFQUAD_HUB_ENDPOINT", "http://127.0.0.1:9000/")
    monkeypatch.setenv("HALFQUAD_TARGET_URLS", " s3://bucket/models/, file:///srv/models")
    monkeypatch.setenv("HALFQUAD_HUB_TOKEN", "hf_canary_of_the_environment")
    settings = Settings()
    assert settings.hub_endpoint == "http://127.0.0.1:9000"
    assert settings.target_urls == ("s3://bucket/models", "file:///srv/models")
    assert "canary" not in f"{settings!r} {settings} {settings.model_dump_json()}"
    monkeypatch.setenv("HALFQUAD_TARGET_URLS", "")
    assert Settings().target_urls == ()


def test_no_source_root_is_the_default():
    assert Settings().source_roots == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 0),
        ("port", 65536),
        ("lease_s", 0),
        ("max_attempts", 0),
        ("log_level", "LOUD"),
        ("hub_endpoint", "ftp://hub.example"),
        ("hub_endpoint", "https://"),
        ("hub_endpoint", "https://user:secret@hub.example"),
        ("target_urls", ("file:///",)),
        ("target_urls", ("/srv/models",)),
        ("target_urls", ("file:///srv/../etc",)),
        ("target_urls", ("s3://key:secret@bucket/x",)),
    ],
)
def test_nonsense_is_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        Settings(**{name: value})


def test_every_setting_says_what_it_is():
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(("given", "kept"), [("hf_canary\n", "hf_canary"), ("", None), ("  ", None)])
def test_a_token_has_no_newline_and_an_empty_one_is_none(monkeypatch, given, kept):
    monkeypatch.setenv("HALFQUAD_HUB_TOKEN", given)
    token = Settings().hub_token
    assert (token and token.get_secret_value()) == kept
