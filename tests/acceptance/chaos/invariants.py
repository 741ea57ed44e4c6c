"""What holds after the run, whatever happened in it: each check gives the sentences of what does not."""

import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redis import Redis

from hqq_core.safetensors_file import sha256_file
from service.common.status import TERMINAL
from tests.acceptance.chaos.draws import FINAL
from tests.acceptance.chaos.run import Chaos, landed
from tests.acceptance.chaos.subjects import EARLIER, THEIRS, Subject
from tests.fakehub.state import GIT_ATTRIBUTES

EXPLAINS = {  # what a job may say that met an answer which is final
    "401": {"token_refused", "repo_not_found"},
    "403": {"token_refused"},
    "404": {"repo_not_found", "revision_not_found", "hub_refused"},
}
ERROR_FIELDS = {"code", "type", "message", "retryable"}
INSIDE = {"output", "plan.json", "plan.profiled.json", "README.md"}  # of a job whose result is whole


def check_jobs(chaos: Chaos, jobs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Ends, commits and results."""
    for subject in chaos.subjects:
        job = jobs[subject.job_id]
        for wrong in _check_job(chaos, subject, job):
            yield f"{subject.job_id} ({subject.draw.name}, {', '.join(map(str, subject.draw.troubles))}): {wrong}"


def _check_job(chaos: Chaos, subject: Subject, job: dict[str, Any]) -> Iterator[str]:
    commits = landed(chaos.hub, subject)
    if job["status"] not in TERMINAL:
        yield f"has not ended: {job['status']}"
    if len(commits) > 1 or any(name != subject.target for name in commits):
        yield f"commits in {commits}"
    match job["status"]:
        case "failed":
            yield from _check_error(subject, job["error"])
        case "cancelled" if not any(strike.strike.what == "cancel" and strike.done for strike in subject.strikes):
            yield "cancelled by nobody"
        case "succeeded" if subject.draw.target == "url":
            yield from _check_folder(chaos, subject, job)
        case "succeeded":
            if not commits:
                yield "succeeded without a commit"
            else:
                yield from _check_commit(chaos, subject, job)


def _check_error(subject: Subject, error: dict[str, Any]) -> Iterator[str]:
    if set(error) != ERROR_FIELDS:
        yield f"an error with {set(error)}"
    met = [trouble.kind for trouble, armed in subject.armed if armed.fired and trouble.kind in FINAL]
    if error["code"] not in set().union(*(EXPLAINS[kind] for kind in met)):
        yield f"{error['code']}, {error['message']!r}, after {met or 'nothing that is final'}"
    elif error["retryable"]:
        yield f"{error['code']} is said to be retryable"


def _check_result(chaos: Chaos, subject: Subject, job: dict[str, Any]) -> Iterator[str]:
    """The files of the job are those that its row names, and those that the library makes."""
    listed = {file["name"]: file["sha256"] for file in job["result"]["artifacts"]}
    output = chaos.data_dir / "jobs" / subject.job_id / "output"
    if (there := _hashes(output)) != listed:
        yield f"the output differs from its list in {_difference(there, listed)}"
    if weights := _difference(subject.made, {name: listed.get(name) for name in subject.made}):
        yield f"other weights than the library makes: {weights}"


def _check_commit(chaos: Chaos, subject: Subject, job: dict[str, Any]) -> Iterator[str]:
    yield from _check_result(chaos, subject, job)
    pushed = job["result"]["pushed"]
    commit = chaos.hub.repo(subject.target).commits[pushed["commit"]]
    if subject.trailer not in commit.message.splitlines():
        yield f"names a commit that is not its own: {pushed['commit']}"
    there = {name: sha256_file(chaos.hub.state.storage.path(entry)) for name, entry in commit.files.items()}
    wanted = {file["name"]: file["sha256"] for file in job["result"]["artifacts"]}
    wanted[".gitattributes"] = sha256_file(GIT_ATTRIBUTES)
    if subject.draw.several:
        wanted["README.md"] = there.get("README.md", "missing")  # of several results, made for the upload
    if subject.draw.target in ("pull request", "overwrite"):
        wanted |= {name: hashlib.sha256(content).hexdigest() for name, content in THEIRS.items()}
    if subject.draw.target == "overwrite" and subject.draw.several:  # in folders of their own: the earlier result stays
        wanted |= {name: hashlib.sha256(content).hexdigest() for name, content in EARLIER.items()}
    if there != wanted:
        yield f"its commit differs from its result in {_difference(there, wanted)}"


def _check_folder(chaos: Chaos, subject: Subject, job: dict[str, Any]) -> Iterator[str]:
    yield from _check_result(chaos, subject, job)
    there = _hashes(Path(subject.url.removeprefix("file://")))
    wanted = {file["name"]: file["sha256"] for file in job["result"]["artifacts"]}
    if subject.draw.several:
        wanted["README.md"] = there.get("README.md", "missing")
    if there != wanted:
        yield f"its folder differs from its result in {_difference(there, wanted)}"


def check_failures(chaos: Chaos, events: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Every start that failed says why in a word of ours, also where the next one did better."""
    for job_id, found in events.items():
        for event in found:
            if event["data"].get("code") == "internal_error":
                yield f"{job_id}: {event['data']}"


def check_files(chaos: Chaos, jobs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Nothing is left but results, and weight files that later jobs may use."""
    for path in chaos.processes.temporary.rglob("*"):
        yield f"left in the temporary directory: {path.relative_to(chaos.processes.temporary)}"
    for folder in (chaos.data_dir / "jobs").glob("*"):
        job = jobs.get(folder.name)
        if job is None or job["result"] is None or job["status"] == "cancelled":
            yield f"left of {folder.name}, {job and job['status']}: {sorted(path.name for path in folder.rglob('*'))}"
        elif more := {path.name for path in folder.iterdir()} - INSIDE:
            yield f"left beside the result of {folder.name}: {more}"
    yield from _check_cache(chaos)


def _check_cache(chaos: Chaos) -> Iterator[str]:
    cache = chaos.data_dir / "sources"
    blobs = {path.name: path for path in cache.iterdir() if "." not in path.name}
    for path in cache.iterdir():
        if path.name not in blobs and path.name not in {"room.lock", *(f"{name}.lock" for name in blobs)}:
            yield f"left in the cache: {path.name}"
    for name, path in blobs.items():
        if sha256_file(path) != name:
            yield f"in the cache under another's hash: {name}"
    if (nbytes := sum(path.stat().st_size for path in blobs.values())) > 3_000_000:
        yield f"{nbytes} bytes in the cache"
    for subject in chaos.subjects:
        if not subject.draw.keep and (kept := blobs.keys() & set(subject.weights)):
            yield f"{subject.job_id} was not to keep its weights: {sorted(kept)}"


def check_canary(chaos: Chaos, told: list[str], broker: list[bytes]) -> Iterator[str]:
    """The token is nowhere: files, logs, rows, messages, answers, requests."""
    canary = chaos.hub.write_token.encode()
    yield from chaos.leaks
    places = [chaos.processes.log, *(path for path in chaos.data_dir.rglob("*") if path.is_file())]
    places += [path for path in (chaos.folder / "published").rglob("*") if path.is_file()]
    yield from (f"the token is in {path.name}" for path in places if canary in path.read_bytes())
    if any(canary in text.encode() for text in told):
        yield "the token is in an answer of the API"
    if any(canary in value for value in broker):
        yield "the token is in the broker"
    with sqlite3.connect(chaos.data_dir / "halfquad.db") as database:
        yield from ("the token is in a row" for line in database.iterdump() if canary.decode() in line)
    for request in chaos.hub.requests.find():
        if canary.decode() in request.path + request.query:
            yield f"the token is in a request: {request.method} {request.path}"


def broker_values(redis: Redis) -> list[bytes]:
    """All that the broker holds."""
    read = {
        b"string": lambda key: [redis.get(key)],
        b"list": lambda key: redis.lrange(key, 0, -1),
        b"hash": lambda key: [part for pair in redis.hgetall(key).items() for part in pair],
        b"set": redis.smembers,
        b"zset": lambda key: redis.zrange(key, 0, -1),
    }
    return [value for key in redis.scan_iter() for value in (key, *read[redis.type(key)](key)) if value is not None]


def fetch(chaos: Chaos) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]], list[str]]:
    """Every job and its events as the API tells them, and all of it as text."""
    jobs, events, told = {}, {}, []
    for subject in chaos.subjects:
        path = f"/v1/jobs/{subject.job_id}"
        answers = [chaos.http.get(path), chaos.http.get(f"{path}/events", params={"limit": 1000})]
        told += [answer.text for answer in answers]
        jobs[subject.job_id], events[subject.job_id] = answers[0].json(), answers[1].json()["data"]
    told += [chaos.http.get(path).text for path in ("/v1/jobs", "/readyz", "/metrics", "/openapi.json")]
    return jobs, events, told


def _hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def _difference(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
