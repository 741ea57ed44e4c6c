import pytest

from hqq_core.errors import CheckpointError, StorageFullError
from service.common import errors


def all_errors(kind=errors.ServiceError):
    return {kind, *(found for child in kind.__subclasses__() for found in all_errors(child))}


def test_the_tree_is_drawn():
    assert [kind.__name__ for kind in all_errors() if kind.__name__ not in errors.__doc__] == []


@pytest.mark.parametrize(
    ("error", "code", "type", "retryable", "final"),
    [
        (CheckpointError("model.safetensors: truncated"), "invalid_checkpoint", "user", False, True),
        (StorageFullError("no room"), "storage_full", "system", True, True),
        (errors.SourceNotFound("no folder"), "source_not_found", "user", False, True),
        (errors.WorkerLost("gone"), "worker_lost", "system", True, False),
        (KeyError("x"), "internal_error", "system", True, False),
    ],
)
def test_describe(error, code, type, retryable, final):
    described = errors.describe(error)
    assert (described.code, described.type, described.retryable) == (code, type, retryable)
    assert described.message
    assert errors.is_final(error) is final
