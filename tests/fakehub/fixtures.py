"""The fixtures `fakehub` and `xethub`: a Hub of one's own for one test."""

from collections.abc import Iterator

import pytest

from tests.fakehub.server import FakeHub


@pytest.fixture
def fakehub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """An empty Hub on ports of its own, reachable from any process on this machine."""
    with FakeHub(tmp_path_factory.mktemp("fakehub")) as hub:
        yield hub


@pytest.fixture
def xethub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """The same with Xet: what goes by it goes through folders, so faults meet only the requests for its tokens."""
    with FakeHub(tmp_path_factory.mktemp("xethub"), xet=True) as hub:
        yield hub
