"""The real client in this process, without Xet, a token of the user's or a cache of the user's."""

from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from tests.fakehub.server import FakeHub


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(
                pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
            )  # the client's own


@pytest.fixture(autouse=True)
def client_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # as its variable does before import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)


@pytest.fixture
def api(fakehub: FakeHub) -> HfApi:
    """The client with a token that may write to team-a."""
    return HfApi(endpoint=fakehub.endpoint, token=fakehub.write_token)
