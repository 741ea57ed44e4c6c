import json
import os

import pytest

from service.common.credentials import Credentials
from service.common.errors import CredentialsInvalid, CredentialUnknown
from service.common.settings import Settings

CANARY = "hf_canary_QmX7"


@pytest.fixture
def write(tmp_path):
    path = tmp_path / "credentials.json"

    def write(content, mode=0o600):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        path.chmod(mode)
        return Settings(data_dir=tmp_path, credentials_file=path)

    return write


def test_credentials_have_names(write):
    settings = write({"team-a": {"token": CANARY, "namespaces": ["Team-A"]}, "anyone": {"token": "hf_other"}})
    credentials = Credentials(settings)
    team = credentials.get("team-a")
    assert team.token.get_secret_value() == CANARY
    assert [team.may_write_to(name) for name in ("team-a", "TEAM-A", "team-b")] == [True, True, False]
    assert credentials.get("anyone").may_write_to("whatever")
    assert CANARY not in f"{credentials.get('team-a')!r} {team}"


def test_without_a_default_nobody_asks(write):
    assert Credentials(write({})).get(None).token is None
    with pytest.raises(CredentialUnknown, match="of that name"):
        Credentials(write({})).get("default")


def test_default_comes_from_the_environment_or_the_file(write, tmp_path):
    environment = Credentials(Settings(data_dir=tmp_path, hub_token=CANARY))
    file = Credentials(write({"default": {"token": CANARY}}))
    for credentials in (environment, file):
        for name in (None, "default"):
            assert credentials.get(name).name == "default"
            assert credentials.get(name).token.get_secret_value() == CANARY
    both = write({"default": {"token": CANARY}}).model_copy(update={"hub_token": environment.get(None).token})
    with pytest.raises(CredentialsInvalid, match="twice"):
        Credentials(both)


def test_a_mended_token_needs_no_restart(write):
    settings = write({"a": {"token": "hf_wrong"}})
    Credentials(settings)
    write({"a": {"token": "hf_right"}})
    assert Credentials(settings).get("a").token.get_secret_value() == "hf_right"


@pytest.mark.parametrize(
    "content",
    [
        f'{{"a": "{CANARY}"',
        f'["{CANARY}"]',
        {"a": CANARY},
        {"a": {"tokens": CANARY}},
        {"a": {"token": CANARY, "namespace": "x"}},
        {"a": {"token": CANARY, "namespaces": "x"}},
        {"a": {"token": CANARY, "namespaces": [CANARY, 1]}},
        {"a": {"token": f"{CANARY}\n"}},
        {"a": {"token": [CANARY]}},
        {CANARY + " ": {"token": "x"}},
    ],
)
def test_a_file_that_is_wrong_is_refused_without_a_word_of_it(write, content):
    with pytest.raises(CredentialsInvalid, match=r"credentials\.json") as refused:
        Credentials(write(content))
    assert CANARY not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None or refused.value.__suppress_context__


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o777])
def test_a_file_that_is_open_to_all_is_refused(write, mode):
    with pytest.raises(CredentialsInvalid, match="chmod o="):
        Credentials(write({"a": {"token": CANARY}}, mode=mode))


def test_a_group_may_read_it(write):
    assert Credentials(write({"a": {"token": CANARY}}, mode=0o640)).get("a").token is not None


def test_a_file_that_is_not_there_is_named(tmp_path):
    settings = Settings(data_dir=tmp_path, credentials_file=tmp_path / "nowhere.json")
    with pytest.raises(CredentialsInvalid, match=r"nowhere\.json cannot be read: No such file"):
        Credentials(settings)
    os.mkdir(tmp_path / "folder")
    with pytest.raises(CredentialsInvalid, match="Is a directory"):
        Credentials(settings.model_copy(update={"credentials_file": tmp_path / "folder"}))


def test_an_empty_list_of_namespaces_is_none_at_all(write):
    credential = Credentials(write({"team-a": {"token": "hf_a", "namespaces": []}})).get("team-a")
    assert not credential.may_write_to("team-a")


def test_what_is_no_token_is_refused_without_a_word_of_it(tmp_path):
    with pytest.raises(CredentialsInvalid) as refused:
        Credentials(Settings(data_dir=tmp_path, hub_token=f"{CANARY} {CANARY}"))
    assert CANARY not in str(refused.value)
