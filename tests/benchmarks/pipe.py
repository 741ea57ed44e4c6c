"""Overlap of a job from a repo to a repo: its time over that of its slowest part, with all parts taking about as long.

    python -m tests.benchmarks.pipe [--layers 24] [--hidden 1024] [--shards 12] [--preset best] [--energy none]

The parts are measured first, each alone: a job on the same checkpoint as a folder, its weight files downloaded one after another,
every file of the result uploaded by one request. The line to and the line from the Hub are made as slow as solving takes, and
measuring input energies before it. Then a job from the repo to another, with an empty cache, on a Hub of our own in
another process. No Celery: units follow each other at once.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import structlog
from pydantic import SecretStr
from sqlalchemy import select

from hqq_core.recipe import Recipe
from hqq_core.safetensors_file import sha256_file
from service.common import repository, schema
from service.common.models import Unit
from service.common.settings import Settings
from service.common.status import JobStatus, UnitKind, UnitStatus
from tests.checkpoints import save_llama
from tests.fakehub.server import WRITE_TOKEN
from worker.hub import Endpoint, Hub
from worker.steps import run_unit
from worker.workplace import Workplace

REPO, TARGET = "team-a/bench", "team-a/bench-quantized"
BARE, ALONE = "team-a/bare", "team-a/alone"  # for uploads that are no job's


class RemoteHub:
    """A Hub in a process of its own: in this one it would wait for the solver, and the solver for it."""

    def __init__(self, endpoint: str, pid: int) -> None:
        self.endpoint, self.pid = endpoint, pid
        self._control = httpx.Client(base_url=f"{endpoint}/_control")

    def slow_down(self, method: str, **rate: float) -> None:
        """Have all bodies share a line of so many bytes per second."""
        fault = {"path": "^/storage/", "method": method, "count": None, "shared": True, **rate}
        self._control.post("/faults", json=fault).raise_for_status()

    def forget_requests(self) -> None:
        self._control.delete("/requests").raise_for_status()

    @property
    def cpu_s(self) -> float:
        """What it has computed for, which on few cores is time that the job waits for."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def moved(self, method: str, which: str) -> list[int]:
        """Bytes of each body that went to the storage or came from there."""
        asked = {"path": "^/storage/", "method": method}
        return [request[which] for request in self._control.get("/requests", params=asked).json()]


@contextmanager
def hub_process(folder: Path, source: Path) -> Iterator[RemoteHub]:
    repos = [f"{REPO}={source}", BARE, ALONE]
    command = [sys.executable, "-m", "tests.fakehub", "--folder", str(folder)]
    command += [word for repo in repos for word in ("--repo", repo)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield RemoteHub(process.stdout.readline().strip().removeprefix("HF_ENDPOINT="), process.pid)
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pipe", description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--preset", default="best")
    parser.add_argument(
        "--nbits", type=int, nargs="+", default=[2, 3, 4], help="of each recipe: more make the solve longer"
    )
    parser.add_argument("--energy", default="none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=None, help="of the cache, in checkpoints; default: no bound")
    parser.add_argument("--trace", action="store_true", help="tell when each unit and each transfer began and ended")
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    with tempfile.TemporaryDirectory(prefix="halfquad-pipe-") as folder:
        run(Path(folder), asked)


def run(folder: Path, asked: argparse.Namespace) -> None:
    source = save_llama(folder / "models" / "bench", layers=asked.layers, hidden=asked.hidden, n_shards=asked.shards)
    tiny = save_llama(folder / "models" / "tiny")
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    chosen = {"format": "hqq", "preset": asked.preset, "energy": asked.energy, "fold": False}
    recipes = [Recipe(nbits=nbits, **chosen) for nbits in asked.nbits]
    with hub_process(folder / "hub", source) as hub:

        def do(name: str, source: dict[str, Any], target: dict[str, Any] | None = None) -> Done:
            budget = int(asked.budget * nbytes) if asked.budget else 1 << 50
            return work(settings(folder / name, source_root=folder / "models", hub=hub, asked=asked, budget=budget),
                        source, target, recipes)  # fmt: skip

        do("warm", {"type": "folder", "path": str(tiny)})  # compiles the kernels
        local = do("alone", {"type": "folder", "path": str(source)})
        about = f"preset {asked.preset}, bits {asked.nbits}, energies {asked.energy}"
        print(f"{nbytes / 1e6:.0f} MB in {asked.shards} shards, {about}; result {local.nbytes / 1e6:.0f} MB")
        print(f"folder:   {local}")
        solve_s = local.seconds[UnitKind.SHARD] + local.seconds.get(UnitKind.PROFILE, 0.0)
        bare_s = download(hub, folder / "bare"), upload(hub, local.output, BARE)
        print(f"download {bare_s[0]:.1f} s and upload {bare_s[1]:.1f} s where nothing holds them up")
        rates = [size / max(solve_s - bare, 0.1) for size, bare in zip((nbytes, local.nbytes), bare_s, strict=True)]
        hub.slow_down("GET", download_rate=rates[0])
        hub.slow_down("PUT", upload_rate=rates[1])
        parts = {
            "download": download(hub, folder / "downloads"),
            "solve": solve_s,
            "upload": upload(hub, local.output, ALONE),
        }
        hub.forget_requests()
        of_repo = {"type": "hub", "repo_id": REPO, "revision": "main", "credential": None, "keep": True}
        before_s = hub.cpu_s
        job = do("data", of_repo, {"repo_id": TARGET})
        hub_s = hub.cpu_s - before_s
        print(f"repo:     {job}")
        if asked.trace:
            print("\n".join(job.trace))
        tell(parts, local, job, hub_s)
        whole = [
            nbytes_sent for nbytes_sent in hub.moved("GET", "sent_nbytes") if nbytes_sent > 0.5 * nbytes / asked.shards
        ]
        sent = sum(hub.moved("PUT", "received_nbytes"))
        print(
            f"{len(whole)} downloads of {asked.shards} files; {sent / 1e6:.0f} MB sent, {job.nbytes / 1e6:.0f} MB made"
        )


@dataclass
class Done:
    """A job's seconds by kind of unit, and what it left."""

    output: Path
    nbytes: int
    seconds: dict[UnitKind, float]
    cpu_s: tuple[float, float]  # of this process, and of those that it started
    trace: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in self.seconds.items())

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


def tell(parts: dict[str, float], local: Done, job: Done, hub_s: float) -> None:
    slowest = max(parts.values())
    apart = local.total_s + parts["download"] + parts["upload"]
    print("parts:    " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items()))
    print(f"job {job.total_s:.1f} s, on the folder and without a target {local.total_s:.1f} s")
    print(f"CPU: {local.cpu_s[0]:.1f} s on the folder; {job.cpu_s[0]:.1f} s and {job.cpu_s[1]:.1f} s of its processes that speak "
          f"with the Hub, {hub_s:.1f} s of the Hub; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(f"job / slowest part              {job.total_s / slowest:.2f}")
    print(f"sum of the parts / slowest      {sum(parts.values()) / slowest:.2f}")
    print(f"one after the other / slowest   {apart / slowest:.2f}")


def settings(data_dir: Path, *, source_root: Path, hub: RemoteHub, asked: argparse.Namespace, budget: int) -> Settings:
    return Settings(
        data_dir=data_dir,
        broker_url="redis://127.0.0.1:1/0",  # nobody there: the units are taken from the rows
        source_roots=(source_root,),
        hub_endpoint=hub.endpoint,
        hub_token=SecretStr(WRITE_TOKEN),
        source_cache_nbytes=budget,
        threads=asked.threads,
        min_free_nbytes=0,
    )


def work(settings: Settings, source: dict[str, Any], target: dict[str, Any] | None, recipes: list[Recipe]) -> Done:
    """One job, done by a worker with a data directory of its own."""
    settings.data_dir.mkdir()
    workplace = Workplace.open(settings)
    schema.migrate(workplace.database)
    with workplace.database.write() as session:
        job = repository.insert_job(
            session,
            source=source,
            recipes=[each.to_dict() for each in recipes],
            target=target,
            labels={},
            priority=5,
            max_attempts=1,
        )
    seconds: dict[UnitKind, float] = defaultdict(float)
    trace, started_at, before = [], time.perf_counter(), os.times()
    while unit := next_unit(workplace):
        began_at = time.perf_counter()
        run_unit(workplace, unit.id, owner="bench", leaving=threading.Event())
        ended_at = time.perf_counter()
        seconds[unit.kind] += ended_at - began_at
        trace.append(f"  {unit.kind} {unit.index}: {began_at - started_at:.1f} to {ended_at - started_at:.1f} s")
    with workplace.database.read() as session:
        job = repository.get_job(session, job.id)
    assert job.status == JobStatus.SUCCEEDED, job.error
    workplace.close()
    after = os.times()
    own_s = after.user + after.system - before.user - before.system
    children_s = after.children_user + after.children_system - before.children_user - before.children_system
    output = workplace.store.output(job.id)
    return Done(
        output, sum(path.stat().st_size for path in files_of(output)), dict(seconds), (own_s, children_s), trace
    )


def next_unit(workplace: Workplace) -> Unit | None:
    with workplace.database.read() as session:
        waiting = select(Unit).where(Unit.status == UnitStatus.QUEUED).order_by(Unit.index)
        return session.scalars(waiting).first()


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def download(hub: RemoteHub, folder: Path) -> float:
    """Seconds that all weight files take, one after the other, each in a process of its own as in a job."""
    folder.mkdir()
    client = Hub(Endpoint(hub.endpoint, xet=False), None)
    snapshot = client.resolve(REPO, "main", look=lambda: None)
    began_at = time.perf_counter()
    for file in snapshot.weights:
        client.download(snapshot, file, folder / file.path, look=lambda: None)
        (folder / file.path).unlink()
    return time.perf_counter() - began_at


def upload(hub: RemoteHub, folder: Path, repo_id: str) -> float:
    """Seconds that all files of a result take, sent by one request."""
    client = Hub(Endpoint(hub.endpoint, xet=False), WRITE_TOKEN)
    files = [
        {"name": str(path.relative_to(folder)), "path": str(path), "nbytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files_of(folder)
    ]  # fmt: skip
    began_at = time.perf_counter()
    client.call("preupload", look=lambda: None, repo_id=repo_id, revision="main", files=files)
    return time.perf_counter() - began_at


if __name__ == "__main__":
    main()
