"""What is known of a weight file before the pass through a model has come to its end."""

from pathlib import Path

import pytest
import torch

from hqq_core import Checkpoint
from hqq_core.energy import Energies, fold, synthetic
from tests import families
from tests.families import FAMILIES


def sharded(family: str, folder: Path) -> Checkpoint:
    """A family's tiny model in several files."""
    return Checkpoint.open(families.save(family, folder / "model"))


@pytest.mark.parametrize("family", FAMILIES)
def test_told_of_each_file_but_the_last(family, tmp_path):
    checkpoint = sharded(family, tmp_path)
    told: dict[int, Energies] = {}
    final = synthetic(checkpoint, n_tokens=128, passed=told.__setitem__)
    files = list(checkpoint.headers().values())
    assert list(told) == list(range(max(told, default=-1) + 1)), "each once, in order"
    assert len(told) < len(files)
    for index, energies in told.items():
        assert energies.vectors.keys() <= files[index].keys()
        assert energies.sources == dict.fromkeys(energies.vectors, "synthetic")
        assert energies.vectors.keys() <= final.vectors.keys()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "mixtral"])
def test_layer_by_layer_it_is_final(family, tmp_path):
    checkpoint = sharded(family, tmp_path)
    told: dict[int, Energies] = {}
    final = synthetic(checkpoint, n_tokens=128, passed=told.__setitem__)
    assert any(energies.vectors for energies in told.values())
    for index, energies in told.items():
        wanted = {name for name in list(checkpoint.headers().values())[index] if name in final.vectors}
        assert {name: vector.tolist() for name, vector in energies.vectors.items()} == {
            name: final.vectors[name].tolist() for name in wanted - {"lm_head.weight"}
        }


def test_what_it_raises_stops_the_work(tmp_path):
    def stop(index: int, energies: Energies) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic(sharded("llama", tmp_path), n_tokens=128, passed=stop)


@pytest.mark.parametrize("family", FAMILIES)
def test_folds_of_some_tensors_are_those_of_all_that_concern_them(family, tmp_path):
    checkpoint = sharded(family, tmp_path)
    every = fold(checkpoint)
    for entries in checkpoint.headers().values():
        concerned = [f for f in every if entries.keys() & (f.columns.keys() | f.rows.keys() | f.values.keys())]
        found = fold(checkpoint, entries.keys())
        assert len(found) == len(concerned)
        for one, same in zip(found, concerned, strict=True):
            for part in ("columns", "rows", "values"):
                assert getattr(one, part).keys() == getattr(same, part).keys()
                assert all(
                    torch.equal(getattr(one, part)[name], vector) for name, vector in getattr(same, part).items()
                )
