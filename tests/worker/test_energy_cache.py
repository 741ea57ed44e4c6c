import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hqq_core.energy import Energies
from worker import energy_cache
from worker.energy_cache import EnergyCache

ENERGIES = Energies(
    {"a.weight": torch.arange(8.0), "b.weight": torch.ones(3)}, {"a.weight": "synthetic", "b.weight": "analytic"}
)


@pytest.fixture
def cache(tmp_path: Path) -> EnergyCache:
    return EnergyCache(tmp_path / "energies", 1 << 20)


def save(path: Path, source: str) -> Path:
    ENERGIES.save(path, source)
    return path


def test_kept_energies_are_found_for_this_source_and_mode_alone(cache: EnergyCache, tmp_path: Path) -> None:
    target = tmp_path / "target"
    assert cache.fetch("source", "auto", target) is None
    cache.keep("source", "auto", save(tmp_path / "job", "source"))
    found = cache.fetch("source", "auto", target)
    assert found is not None
    assert found.sources == ENERGIES.sources
    assert all(torch.equal(found.vectors[name], vector) for name, vector in ENERGIES.vectors.items())
    assert target.read_bytes() == (tmp_path / "job").read_bytes()
    assert cache.fetch("source", "analytic", target) is None
    assert cache.fetch("other", "auto", target) is None
    assert not target.exists(), "what an earlier attempt put there is gone"


def test_other_versions_measure_again(cache: EnergyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.keep("source", "auto", save(tmp_path / "job", "source"))
    monkeypatch.setattr(energy_cache, "MEASURED_BY", ("halfquad", "torch", "no-such-package"))
    assert cache.fetch("source", "auto", tmp_path / "target") is None


def test_unused_longest_goes_first_but_not_from_those_who_have_it(cache: EnergyCache, tmp_path: Path) -> None:
    nbytes = save(tmp_path / "job", "x").stat().st_size
    small = EnergyCache(cache.folder, 2 * nbytes)
    for source in "abc":
        small.keep(source, "auto", save(tmp_path / source, source))
        for path in small.folder.iterdir():
            status = path.stat()
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))  # a second goes by
        if source == "b":
            assert small.fetch("a", "auto", tmp_path / "used") is not None
    assert [small.fetch(source, "auto", tmp_path / "target") is not None for source in "abc"] == [True, False, True]
    assert (tmp_path / "b").stat().st_size == nbytes


def test_no_room_keeps_nothing(tmp_path: Path) -> None:
    cache = EnergyCache(tmp_path / "energies", 0)
    cache.keep("source", "auto", save(tmp_path / "job", "source"))
    assert list(cache.folder.iterdir()) == []


@pytest.mark.parametrize("nbytes", [0, 7, -1])
def test_damaged_file_is_dropped(cache: EnergyCache, tmp_path: Path, nbytes: int) -> None:
    job, target = save(tmp_path / "job", "source"), tmp_path / "target"
    cache.keep("source", "auto", job)
    job.write_bytes(job.read_bytes()[:nbytes])  # the same file under its other name
    assert cache.fetch("source", "auto", target) is None
    assert not target.exists()
    assert list(cache.folder.iterdir()) == []


def test_energies_of_another_source_are_dropped(cache: EnergyCache, tmp_path: Path) -> None:
    cache.keep("source", "auto", save(tmp_path / "job", "other"))
    assert cache.fetch("source", "auto", tmp_path / "target") is None
    assert list(cache.folder.iterdir()) == []


@pytest.mark.parametrize("metadata", [None, {"fingerprint": "source"}, {"energies": "a, b"}], ids=str)
def test_file_that_is_none_of_ours_is_dropped(
    cache: EnergyCache, tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    save_file({"a.weight": torch.ones(3)}, tmp_path / "job", metadata)
    cache.keep("source", "auto", tmp_path / "job")
    assert cache.fetch("source", "auto", tmp_path / "target") is None
    assert list(cache.folder.iterdir()) == []


def test_file_that_another_worker_throws_out_meanwhile_is_no_hindrance(cache: EnergyCache, tmp_path: Path) -> None:
    cache.folder.mkdir()
    gone = cache.folder / "gone"
    gone.symlink_to(tmp_path / "nowhere")  # listed, but there is nothing to look at
    EnergyCache(cache.folder, 0).keep("source", "auto", save(tmp_path / "job", "source"))
    assert list(cache.folder.iterdir()) == [gone]


def test_folder_that_cannot_be_made_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = EnergyCache(tmp_path / "file" / "energies", 1 << 20)
    cache.keep("source", "auto", save(tmp_path / "job", "source"))
    assert cache.fetch("source", "auto", tmp_path / "target") is None


def test_what_is_larger_than_the_cache_drives_nobody_out(cache: EnergyCache, tmp_path: Path) -> None:
    nbytes = save(tmp_path / "job", "x").stat().st_size
    small = EnergyCache(cache.folder, 2 * nbytes)
    small.keep("a", "auto", save(tmp_path / "a", "a"))
    large = tmp_path / "large"
    large.write_bytes(bytes(3 * nbytes))
    small.keep("b", "auto", large)
    assert small.fetch("a", "auto", tmp_path / "target") is not None
    assert small.fetch("b", "auto", tmp_path / "target") is None
