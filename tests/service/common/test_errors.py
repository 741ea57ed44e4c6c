import pytest

from hqq_core.errors import CheckpointError, StorageFullError
from service.common import errors


def all_errors(kind=errors.ServiceError):
    return {kind, *(found for child in kind.__subclasses__() for found in all_errors(child))}


def test_the_tree_is_drawn():
    assert [kind.__name__ for kind in all_errors() if kind.__name__ not in errors.__doc__] == []


def test_every_error_of_the_hub_is_found_by_its_code():
    kinds = all_errors(errors.HubError) - {errors.HubError}
    assert {kind.code: kind for kind in kinds} == errors.HUB_ERRORS
    for kind in kinds:
        assert errors.is_final(kind("why")) is not kind.retryable


@pytest.mark.parametrize(
    ("error", "code", "type", "retryable", "final"),
    [
        (CheckpointError("model.safetensors: truncated"), "invalid_checkpoint", "user", False, True),
        (StorageFullError("no room"), "storage_full", "system", True, True),
        (errors.SourceNotFound("no folder"), "source_not_found", "user", False, True),
        (errors.WorkerLost("gone"), "worker_lost", "system", True, False),
        (errors.RepoGated("ask for access"), "repo_gated", "user", False, True),
        (errors.NamespaceNotAllowed("not yours"), "namespace_not_allowed", "user", False, True),
        (errors.HubUnavailable("429", retry_after_s=9), "hub_unavailable", "upstream", True, False),
        (errors.SourceDamaged("sha256"), "source_damaged", "upstream", True, False),
        (KeyError("x"), "internal_error", "system", True, False),
    ],
)
def test_describe(error, code, type, retryable, final):
    described = errors.describe(error)
    assert (described.code, described.type, described.retryable) == (code, type, retryable)
    assert described.message
    assert errors.is_final(error) is final
