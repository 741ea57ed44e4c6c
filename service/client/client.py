"""Client: a job in, its events and files out."""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from service.client.errors import ConnectionFailed, DownloadError, ServerError, raise_for
from service.client.events import Event, parse

DEFAULT_URL = "http://127.0.0.1:8000"
STREAM_SILENCE_S = 45  # three pings
RECONNECT_S = 1.0
MAX_WAIT_S = 60  # the longest the service waits in one request
CHUNK_NBYTES = 1024**2


class Client:
    """Talks to one service; safe to share between threads, to be closed at the end."""

    def __init__(
        self, base_url: str = DEFAULT_URL, *, timeout_s: float = 30, transport: httpx.BaseTransport | None = None
    ) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit(
        self,
        source: str | os.PathLike[str] | dict[str, Any],
        recipe: dict[str, Any] | None = None,
        *,
        recipes: Sequence[dict[str, Any]] | None = None,
        target: str | dict[str, Any] | None = None,
        labels: dict[str, str] | None = None,
        owner: str | None = None,
        priority: int | None = None,
        idempotency_key: str | None = None,
        wait_s: int = 0,
    ) -> dict[str, Any]:
        """A new job for a folder on the service's machine or a repository of its Hub; of one recipe, or of several.

        `source` is an absolute path, a repo_id, or a source as the API has it; `target`, which the result is to be
        uploaded to, a repo_id, a URL, or a target as the API has it.
        """
        optional = {
            "recipe": recipe,
            "recipes": recipes,
            "target": _target(target),
            "labels": labels,
            "owner": owner,
            "priority": priority,
        }
        source = _source(source)
        body = {"source": source} | {name: value for name, value in optional.items() if value is not None}
        headers = {"Prefer": f"wait={wait_s}"} if wait_s else {}
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        return self._json("POST", "/v1/jobs", json=body, headers=headers, wait_s=min(wait_s, MAX_WAIT_S))

    def get(self, job_id: str) -> dict[str, Any]:
        return self._json("GET", _path(job_id))

    def list(self, **filters: Any) -> Iterator[dict[str, Any]]:
        """All jobs that match, page by page; filters are those of GET /v1/jobs."""
        return self._pages("/v1/jobs", filters)

    def cancel(self, job_id: str) -> dict[str, Any]:
        return self._json("POST", _path(job_id, "cancel"))

    def retry(self, job_id: str, *, target: str | dict[str, Any] | None = None) -> dict[str, Any]:
        """Begin a failed upload again, to another target where one is given."""
        changes = {} if target is None else {"target": _target(target)}
        return self._json("POST", _path(job_id, "retry"), json=changes)

    def events(self, job_id: str, *, after: int = 0, give_up_s: float | None = None) -> Iterator[Event]:
        """Events as they come, until the job is done; comes back by itself when the connection is lost.

        With give_up_s, the last failure once the service has been out of reach for that long.
        """
        lost_at: float | None = None
        while True:
            try:
                with self._stream(_path(job_id, "events"), after) as response:
                    if response.status_code == 204:
                        return
                    done = False
                    for event in parse(response.iter_lines()):
                        lost_at, after, done = None, event.seq, event.type == "done"
                        yield event
                    if done:  # at the end of the stream: one before it was followed by a retry
                        return
            except (ConnectionFailed, ServerError):
                lost_at = lost_at or time.monotonic()
                if give_up_s is not None and time.monotonic() - lost_at >= give_up_s:
                    raise
            time.sleep(RECONNECT_S)

    def wait(self, job_id: str) -> dict[str, Any]:
        """The job at its end."""
        for _ in self.events(job_id):
            pass
        return self.get(job_id)

    def add_watch(
        self,
        source: str | dict[str, Any],
        recipe: dict[str, Any] | None = None,
        *,
        target: str | dict[str, Any],
        recipes: Sequence[dict[str, Any]] | None = None,
        labels: dict[str, str] | None = None,
        owner: str | None = None,
        priority: int | None = None,
        interval_s: int | None = None,
        run_now: bool = False,
    ) -> dict[str, Any]:
        """Follow a branch of the service's Hub: each new head becomes a job, whose result goes to the target."""
        optional = {
            "recipe": recipe,
            "recipes": recipes,
            "labels": labels,
            "owner": owner,
            "priority": priority,
            "interval_s": interval_s,
        }
        body: dict[str, Any] = {"source": _source(source), "target": _target(target), "run_now": run_now}
        body |= {name: value for name, value in optional.items() if value is not None}
        return self._json("POST", "/v1/watches", json=body)

    def get_watch(self, watch_id: str) -> dict[str, Any]:
        return self._json("GET", _watch_path(watch_id))

    def watches(self, **filters: Any) -> Iterator[dict[str, Any]]:
        """All watches, page by page; filters are those of GET /v1/watches."""
        return self._pages("/v1/watches", filters)

    def change_watch(
        self, watch_id: str, *, enabled: bool | None = None, interval_s: int | None = None
    ) -> dict[str, Any]:
        """Pause it, go on with it, or look more or less often; then it is looked at at once."""
        return self._json("PATCH", _watch_path(watch_id), json={"enabled": enabled, "interval_s": interval_s})

    def remove_watch(self, watch_id: str) -> None:
        """Follow it no longer; its jobs go on."""
        self._answer("DELETE", _watch_path(watch_id))

    def formats(self) -> Sequence[dict[str, Any]]:
        """What each format holds, and what loads it."""
        formats: list[dict[str, Any]] = self._json("GET", "/v1/formats")["data"]
        return formats

    def artifacts(self, job_id: str) -> Sequence[dict[str, Any]]:
        """The files of a job that has succeeded: name, nbytes, sha256."""
        files: list[dict[str, Any]] = self._json("GET", _path(job_id, "artifacts"))["data"]
        return files

    def download(self, job_id: str, name: str, target: str | os.PathLike[str]) -> Path:
        """One file, checked against its sha256; what an earlier call left half done is continued."""
        sha256 = next((file["sha256"] for file in self.artifacts(job_id) if file["name"] == name), None)
        final = Path(target)
        partial = final.with_name(f".{final.name}.part")
        have = partial.stat().st_size if partial.exists() else 0
        headers = {"Range": f"bytes={have}-", "If-Range": f'"{sha256}"'} if have else {}
        with _failing(), self._http.stream("GET", _path(job_id, "artifacts", name), headers=headers) as response:
            if response.status_code != 416:  # 416: nothing was missing but the rename
                _raise_for_stream(response)
                final.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("ab" if response.status_code == 206 else "wb") as file:
                    file.writelines(response.iter_bytes(CHUNK_NBYTES))
                    file.flush()
                    os.fsync(file.fileno())
        with partial.open("rb") as written:
            found = hashlib.file_digest(written, "sha256").hexdigest()
        if found != sha256:
            partial.unlink()
            raise DownloadError(f"{name} has sha256 {found}, {sha256} was listed")
        return partial.replace(final)

    def _pages(self, path: str, filters: dict[str, Any]) -> Iterator[dict[str, Any]]:
        while True:
            page = self._json("GET", path, params=filters)
            yield from page["data"]
            if not page["has_more"]:
                return
            filters["after"] = page["last_id"]

    def _json(self, method: str, path: str, *, wait_s: float = 0, **request: Any) -> dict[str, Any]:
        body: dict[str, Any] = self._answer(method, path, wait_s=wait_s, **request).json()
        return body

    def _answer(self, method: str, path: str, *, wait_s: float = 0, **request: Any) -> httpx.Response:
        usual = self._http.timeout
        patient = httpx.Timeout(**usual.as_dict() | {"read": usual.read and usual.read + wait_s})
        with _failing():
            response = self._http.request(method, path, timeout=patient, **request)
        raise_for(response)
        return response

    @contextmanager
    def _stream(self, path: str, after: int) -> Iterator[httpx.Response]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        timeout = httpx.Timeout(**self._http.timeout.as_dict() | {"read": STREAM_SILENCE_S})
        with _failing(), self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            _raise_for_stream(response)
            yield response


def _raise_for_stream(response: httpx.Response) -> None:
    if response.is_error:
        response.read()
        raise_for(response)


@contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        raise ConnectionFailed(f"no answer from the service: {error}") from error


def _source(source: str | os.PathLike[str] | dict[str, Any]) -> dict[str, Any]:
    if isinstance(source, dict):
        return source
    if isinstance(source, os.PathLike) or os.path.isabs(source):
        return {"type": "folder", "path": os.fspath(source)}
    return {"type": "hub", "repo_id": source}


def _target(target: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if isinstance(target, str):
        return {"url": target} if "://" in target else {"repo_id": target}
    return target


def _watch_path(watch_id: str) -> str:
    return f"/v1/watches/{quote(watch_id, safe='')}"


def _path(job_id: str, *rest: str) -> str:
    return "/".join(["/v1/jobs", *(quote(part, safe="") for part in (job_id, *rest))])
