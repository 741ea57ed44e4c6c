"""The cache of source files, driven by many real processes."""

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from hqq_core.errors import Cancelled, StorageFullError
from tests.worker.conftest import eventually
from worker.source_cache import Blob, SourceCache

KIB = 1024
spawned = multiprocessing.get_context("spawn")


def content(name: str, nbytes: int = KIB) -> bytes:
    return (name.encode() * nbytes)[:nbytes]


def blob(name: str, nbytes: int = KIB) -> Blob:
    return Blob(hashlib.sha256(content(name, nbytes)).hexdigest(), nbytes)


class Fetcher:
    """Writes what a blob holds, piece by piece, and notes each beginning in a log that processes share."""

    def __init__(self, log: Path, name: str, nbytes: int = KIB, wait_s: float = 0.0) -> None:
        self.log, self.name, self.nbytes, self.wait_s = log, name, nbytes, wait_s

    def __call__(self, path: Path) -> None:
        with self.log.open("a") as log:
            log.write(f"{self.name}\n")
        whole = content(self.name, self.nbytes)
        with path.open("wb", buffering=0) as file:
            file.write(whole[: self.nbytes // 2])
            time.sleep(self.wait_s)
            file.write(whole[self.nbytes // 2 :])


def carry_on() -> None:
    """A look that sees no reason to stop."""


def read(cache: SourceCache, fetch: Fetcher) -> bytes:
    with cache.lend(blob(fetch.name, fetch.nbytes), fetch, carry_on) as file:
        return os.read(file, fetch.nbytes + 1)


def files(cache: SourceCache) -> set[str]:
    """Whole files and partial ones; locks stay."""
    return {path.name for path in cache.folder.iterdir() if path.suffix != ".lock"}


@pytest.fixture
def cache(tmp_path: Path) -> SourceCache:
    return SourceCache(tmp_path / "sources", limit_nbytes=3 * KIB)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "fetches"
    path.touch()
    return path


@pytest.fixture
def start() -> Iterator[Callable[..., BaseProcess]]:
    """Starts processes of which none is left behind."""
    started: list[BaseProcess] = []

    def run(target: Callable[..., None], *arguments: object) -> BaseProcess:
        process = spawned.Process(target=target, args=arguments)
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.join()


def present(folder: Path) -> list[str]:
    """Whole files that are there together: nobody makes room meanwhile."""
    with SourceCache(folder, 0)._room(carry_on):
        return [path.name for path in folder.iterdir() if "." not in path.name]


def test_file_is_fetched_once_and_then_found(cache: SourceCache, log: Path) -> None:
    assert read(cache, Fetcher(log, "a")) == content("a")
    assert read(cache, Fetcher(log, "a")) == content("a")
    assert log.read_text() == "a\n"
    assert files(cache) == {blob("a").key}


def test_what_was_not_used_for_longest_goes_first(cache: SourceCache, log: Path) -> None:
    for name in ("a", "b", "c", "a", "d"):
        read(cache, Fetcher(log, name))
    assert files(cache) == {blob(name).key for name in "acd"}


def test_what_is_lent_stays_while_another_choice_is_there(cache: SourceCache, log: Path) -> None:
    with cache.lend(blob("a"), Fetcher(log, "a"), carry_on) as file:
        for name in ("b", "c", "d"):
            read(cache, Fetcher(log, name))
        assert files(cache) == {blob(name).key for name in "acd"}
        assert os.read(file, 2 * KIB) == content("a")


def test_room_is_waited_for_where_all_is_lent(cache: SourceCache, log: Path) -> None:
    looks = 0

    def stop() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise Cancelled("the job is over")

    with cache.lend(blob("a", 2 * KIB), Fetcher(log, "a", 2 * KIB), carry_on):
        with pytest.raises(Cancelled):
            cache.fetch(blob("b", 2 * KIB), Fetcher(log, "b", 2 * KIB), stop)
        assert files(cache) == {blob("a", 2 * KIB).key}
    assert read(cache, Fetcher(log, "b", 2 * KIB)) == content("b", 2 * KIB)
    assert files(cache) == {blob("b", 2 * KIB).key}


def test_file_larger_than_the_budget_is_refused_before_it_is_fetched(cache: SourceCache, log: Path) -> None:
    with pytest.raises(StorageFullError, match=r"4096 bytes: the cache for sources may hold 3072"):
        read(cache, Fetcher(log, "a", 4 * KIB))
    assert log.read_text() == ""


def test_file_larger_than_the_disk_is_refused_when_all_else_is_gone(tmp_path: Path, log: Path) -> None:
    read(SourceCache(tmp_path / "sources", limit_nbytes=3 * KIB), Fetcher(log, "a"))
    crowded = SourceCache(tmp_path / "sources", limit_nbytes=3 * KIB, min_free_nbytes=1 << 60)
    with pytest.raises(StorageFullError, match="the disk has room for"):
        read(crowded, Fetcher(log, "b"))
    assert files(crowded) == set()


def test_results_come_before_files_that_nobody_reads(tmp_path: Path, log: Path) -> None:
    cache = SourceCache(tmp_path / "sources", limit_nbytes=3 * KIB)
    read(cache, Fetcher(log, "a"))
    cache.make_disk_room(KIB)
    assert files(cache) == {blob("a").key}
    with cache.lend(blob("b"), Fetcher(log, "b"), carry_on):
        cache.make_disk_room(1 << 60)
        assert files(cache) == {blob("b").key}


@pytest.mark.parametrize(("error", "left"), [(ConnectionError, True), (Cancelled, False)])
def test_broken_fetch_is_gone_on_with_unless_nobody_wants_it(
    cache: SourceCache, error: type[Exception], left: bool
) -> None:
    found = []

    def fetch(path: Path) -> None:
        part = path.with_name("part")
        found.append(part.exists())
        part.write_bytes(b"half")
        if len(found) == 1:
            raise error("the line broke")
        path.write_bytes(content("a"))

    with pytest.raises(error):
        cache.fetch(blob("a"), fetch, carry_on)
    assert bool(files(cache)) is left
    cache.fetch(blob("a"), fetch, carry_on)
    assert found == [False, left]
    assert files(cache) == {blob("a").key}


def test_what_broken_fetches_left_makes_room(cache: SourceCache, log: Path) -> None:
    def broken(path: Path) -> None:
        path.with_name("part").write_bytes(b"half")
        raise ConnectionError("the line broke")

    read(cache, Fetcher(log, "a", 2 * KIB))
    with pytest.raises(ConnectionError):
        cache.fetch(blob("b"), broken, carry_on)
    read(cache, Fetcher(log, "c"))
    assert files(cache) == {blob("a", 2 * KIB).key, blob("c").key}, "it goes before what is whole"


def test_dropped_file_is_gone_unless_somebody_reads_it(cache: SourceCache, log: Path) -> None:
    read(cache, Fetcher(log, "b"))
    with cache.lend(blob("a"), Fetcher(log, "a"), carry_on):
        cache.drop(blob("a"))
        cache.drop(blob("b"))
        assert files(cache) == {blob("a").key}
    cache.drop(blob("a"))
    cache.drop(blob("a"))
    assert files(cache) == set()


def test_fetch_ahead_costs_nothing_that_is_needed_sooner(cache: SourceCache, log: Path) -> None:
    read(cache, Fetcher(log, "a"))
    read(cache, Fetcher(log, "b"))
    ahead = blob("c", 2 * KIB), Fetcher(log, "c", 2 * KIB)
    assert not cache.fetch_ahead(*ahead, carry_on, spare={blob("a").key, blob("b").key})
    assert files(cache) == {blob("a").key, blob("b").key}, "nor is anything thrown out in vain"
    assert cache.fetch_ahead(*ahead, carry_on, spare={blob("b").key})
    assert files(cache) == {blob("b").key, blob("c", 2 * KIB).key}
    assert not cache.fetch_ahead(*ahead, carry_on, spare=())
    assert log.read_text() == "a\nb\nc\n"


def read_in_process(folder: Path, log: Path, name: str, wait_s: float) -> None:
    cache = SourceCache(folder, limit_nbytes=3 * KIB)
    assert read(cache, Fetcher(log, name, wait_s=wait_s)) == content(name)


def test_of_many_processes_one_fetches(cache: SourceCache, log: Path, start: Callable[..., BaseProcess]) -> None:
    processes = [start(read_in_process, cache.folder, log, "a", 0.3) for _ in range(4)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "a\n"


def test_what_a_killed_process_left_is_found_and_its_file_fetched_again(
    cache: SourceCache, log: Path, start: Callable[..., BaseProcess]
) -> None:
    process = start(read_in_process, cache.folder, log, "a", 3600)
    eventually(lambda: any(path.stat().st_size for path in cache.folder.glob("*.partial/*")))
    read(cache, Fetcher(log, "b"))
    assert len(files(cache)) == 2, "the partial file of a process that lives is left alone"
    assert not cache.fetch_ahead(blob("a"), Fetcher(log, "a"), carry_on, spare=()), "nor is it fetched twice"
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert read(cache, Fetcher(log, "a")) == content("a")
    assert files(cache) == {blob("a").key, blob("b").key}
    assert log.read_text() == "a\nb\na\n"


def test_sweep_removes_what_a_killed_process_left(
    cache: SourceCache, log: Path, start: Callable[..., BaseProcess]
) -> None:
    process = start(read_in_process, cache.folder, log, "a", 3600)
    eventually(lambda: any(cache.folder.glob("*.partial/*")))
    cache.sweep()
    assert len(files(cache)) == 1
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    cache.sweep()
    assert [path.name for path in cache.folder.iterdir()] in ([], ["room.lock"])


def hold_in_process(folder: Path, log: Path, name: str, ready: Path) -> None:
    with SourceCache(folder, limit_nbytes=3 * KIB).lend(blob(name), Fetcher(log, name), carry_on):
        ready.touch()
        time.sleep(3600)


def test_killed_reader_holds_nothing(
    cache: SourceCache, log: Path, tmp_path: Path, start: Callable[..., BaseProcess]
) -> None:
    process = start(hold_in_process, cache.folder, log, "a", tmp_path / "ready")
    eventually((tmp_path / "ready").exists)
    cache.drop(blob("a"))
    assert cache.has(blob("a"))
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    cache.drop(blob("a"))
    assert not cache.has(blob("a"))


def hammer(folder: Path, log: Path, seed: int) -> None:
    """Files in an order of its own, through a cache that holds half of them."""
    cache = SourceCache(folder, limit_nbytes=3 * KIB)
    for i in range(40):
        name = "abcdef"[(seed + i * (seed % 5 + 1)) % 6]
        assert read(cache, Fetcher(log, name)) == content(name)
        partials = [int(path.name.split(".")[1]) for path in folder.glob("*.partial")]
        assert sum(partials) <= cache.limit_nbytes
        if i % 7 == 0:
            cache.drop(blob(name))


def test_many_processes_within_one_budget(cache: SourceCache, log: Path, start: Callable[..., BaseProcess]) -> None:
    processes = [start(hammer, cache.folder, log, seed) for seed in range(4)]
    while any(process.exitcode is None for process in processes):
        if cache.folder.is_dir():
            assert KIB * len(present(cache.folder)) <= cache.limit_nbytes
        time.sleep(0.005)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(files(cache)) <= 3
    assert not [name for name in files(cache) if "." in name]
