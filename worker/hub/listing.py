"""What a repository has at one commit, and which of it is a source: seen with distrust before anything is fetched."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.hf_api import ModelInfo, RepoFile, RepoFolder

from hqq_core.errors import CheckpointError
from hqq_core.source_files import (
    CONFIG,
    INDEX,
    MAX_CARRIED_NBYTES,
    MAX_FOLDER_DEPTH,
    MAX_JSON_NBYTES,
    indexed_weights,
    is_carried,
    pickled_weights,
    single_weights,
)
from worker.hub import RemoteFile
from worker.hub.ranges import read_file
from worker.hub.session import patiently, understood

MAX_ITEMS = 20_000  # files and folders of a repository
MAX_SMALL_NBYTES = 1_000_000_000  # of all files but the weights
MAX_FILE_NBYTES = 1 << 44
MAX_PATH_NBYTES = 1024
MAX_NAME_NBYTES = 200  # file systems take 255, with room for a suffix
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
REPO_ID = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/)?[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")


def head(api: HfApi, *, repo_id: str, revision: str, progress: Any) -> dict[str, Any]:
    """The name that a repository has now, and the commit that a revision of it is now."""
    info = _model(api, repo_id, revision)
    return {"repo_id": info.id, "commit": info.sha}


def resolve(api: HfApi, *, repo_id: str, revision: str, progress: Any) -> dict[str, Any]:
    """The commit that a revision is now, and its files: those of a source, and the names of the others."""
    info = _model(api, repo_id, revision)
    name, commit = info.id, str(info.sha)
    listed = _listed(api, name, commit)
    weights = _weights(api, name, commit, listed)
    wanted = [file for path, file in listed.items() if path in weights or _is_wanted(file)]
    _check_sizes(name, wanted)
    return {
        "repo_id": name,
        "commit": commit,
        "private": bool(info.private),
        "files": [asdict(file) for file in wanted],
        "left_out": sorted(_shown(path) for path in listed.keys() - {file.path for file in wanted}),
    }


def _model(api: HfApi, repo_id: str, revision: str) -> ModelInfo:
    """What the Hub says of a model that this credential may read."""
    with understood(api.endpoint, repo_id):
        info = patiently(lambda: api.model_info(repo_id, revision=revision))
        if not (REPO_ID.fullmatch(info.id) and COMMIT.fullmatch(info.sha or "")):
            raise ValueError("no name of a model, or no commit")
    if info.gated:
        patiently(lambda: api.auth_check(info.id))
    return info


def _listed(api: HfApi, repo_id: str, commit: str) -> dict[str, RemoteFile]:
    """All files by path."""

    def pages() -> list[RepoFile | RepoFolder]:
        items = []
        for item in api.list_repo_tree(repo_id, revision=commit, recursive=True):
            items.append(item)
            if len(items) > MAX_ITEMS:
                raise CheckpointError(f"{repo_id}: more than {MAX_ITEMS} files: no source is that")
        return items

    with understood(api.endpoint, repo_id):
        files = [_file(repo_id, item) for item in patiently(pages) if isinstance(item, RepoFile)]
    listed = {file.path: file for file in files}
    _check_paths(repo_id, [file.path for file in files])
    return dict(sorted(listed.items()))


def _file(repo_id: str, item: RepoFile) -> RemoteFile:
    nbytes = item.lfs.size if item.lfs else item.size
    sha256 = item.lfs.sha256 if item.lfs else None
    file = RemoteFile(item.path, nbytes, sha256, item.blob_id)
    sound = (
        isinstance(file.path, str)
        and type(nbytes) is int
        and 0 <= nbytes <= MAX_FILE_NBYTES
        and (sha256 is None or (isinstance(sha256, str) and SHA256.fullmatch(sha256)))
        and isinstance(file.blob_id, str)
        and COMMIT.fullmatch(file.blob_id)
    )
    if not sound:
        raise CheckpointError(
            f"{repo_id}: {_shown(item.path)}: listed with {_shown(nbytes)} bytes and sha256 {_shown(sha256)}"
        )
    return file


def _check_paths(repo_id: str, paths: list[str]) -> None:
    """Refuse what no repository can hold: a Hub that lists it means ill."""
    taken = set(paths)
    for path in paths:
        parts = path.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\\" in path or "\0" in path:
            raise CheckpointError(f"{repo_id}: {_shown(path)}: no name of a file inside a repository")
        if any("/".join(parts[:depth]) in taken for depth in range(1, len(parts))):
            raise CheckpointError(f"{repo_id}: {_shown(path)}: in a folder that is a file")
    if len(taken) != len(paths):
        raise CheckpointError(f"{repo_id}: a file stands twice in its list")


def _weights(api: HfApi, repo_id: str, commit: str, listed: dict[str, RemoteFile]) -> set[str]:
    """Names of the weight files: those of the index, or the single one."""
    if CONFIG not in listed:
        raise CheckpointError(f"{repo_id}: no {CONFIG}: wanted a model in the layout of transformers")
    top = [path for path in listed if "/" not in path]
    if INDEX not in listed:
        if not any(path.endswith(".safetensors") for path in top) and (pickled := pickled_weights(top)):
            raise CheckpointError(
                f"{repo_id}: {_shown(pickled[0])}: pickled weights are never opened: wanted safetensors. Look among its pull "
                "requests for a conversion and give its revision, refs/pr/<number>, or ask the owner for one"
            )
        return {single_weights(top)}
    weights = set(_weight_map(api, repo_id, commit, listed[INDEX]).values())
    if missing := sorted(weights - listed.keys()):
        raise CheckpointError(f"{repo_id}: {INDEX} names {missing[0]}, which is not there ({len(missing)} missing)")
    return weights


def _weight_map(api: HfApi, repo_id: str, commit: str, file: RemoteFile) -> dict[str, str]:
    if file.nbytes > MAX_JSON_NBYTES:
        raise CheckpointError(f"{repo_id}: {INDEX}: {file.nbytes} bytes: wanted at most {MAX_JSON_NBYTES}")
    try:
        index = json.loads(read_file(api, repo_id, commit, file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{repo_id}: {INDEX}: no JSON text: {error}") from error
    if not isinstance(index, dict):
        raise CheckpointError(f"{repo_id}: {INDEX}: a JSON {type(index).__name__}: wanted an object")
    return indexed_weights(index)


def _is_wanted(file: RemoteFile) -> bool:
    """Config, index, and what is carried over to a result; nothing hidden, nothing unprintable."""
    path = PurePosixPath(file.path)
    if file.path in (CONFIG, INDEX):
        return True
    return (
        is_carried(path.name)
        and file.nbytes <= MAX_CARRIED_NBYTES
        and len(path.parts) <= MAX_FOLDER_DEPTH
        and file.path.isprintable()
        and len(file.path.encode()) <= MAX_PATH_NBYTES
        and all(not part.startswith(".") and len(part.encode()) <= MAX_NAME_NBYTES for part in path.parts)
    )


def _check_sizes(repo_id: str, wanted: Iterable[RemoteFile]) -> None:
    small = [file for file in wanted if not file.is_weights]
    for file in small:
        if file.path in (CONFIG, INDEX) and file.nbytes > MAX_JSON_NBYTES:
            raise CheckpointError(f"{repo_id}: {file.path}: {file.nbytes} bytes: wanted at most {MAX_JSON_NBYTES}")
    if (nbytes := sum(file.nbytes for file in small)) > MAX_SMALL_NBYTES:
        raise CheckpointError(f"{repo_id}: {nbytes} bytes beside the weights: wanted at most {MAX_SMALL_NBYTES}")


def _shown(value: object) -> str:
    text = str(value)[:MAX_PATH_NBYTES]
    return text if text.isprintable() else ascii(text)
