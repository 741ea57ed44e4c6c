"""WriterContract: what every format keeps. A new one subclasses it, says how its reader reads, and inherits the suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from hqq_core import (
    Checkpoint,
    Recipe,
    build_plan,
    finish_checkpoint,
    quantize_checkpoint,
    quantize_shard,
    verify_folder,
)
from hqq_core.convert import write_folding
from hqq_core.energy import profile
from hqq_core.formats import FORMATS
from hqq_core.safetensors_file import DTYPES
from tests.checkpoints import folder_bytes, llama_config, llama_tensors, save_checkpoint
from tests.oracles import stored_tensors
from tests.solved import dequantized


def recipes(name: str) -> list[Recipe]:
    """Settings that the format says it holds: each width with each zero, each group size, each axis."""
    held = FORMATS[name].capabilities
    sizes: list[int | None] = [*held.group_sizes]
    sizes += [n * held.group_multiple for n in (8, 1, 3)] if held.group_multiple else []
    sizes += [None] if held.whole_channel else []
    middle = 4 if 4 in held.nbits else held.nbits[0]
    usual = 64 if 64 in sizes else sizes[0]
    found = [
        Recipe(format=name, nbits=nbits, group_size=usual, axis=axis, zero=zero)
        for nbits in held.nbits
        for zero in held.zeros[nbits]
        for axis in held.axes
    ]
    found += [Recipe(format=name, nbits=middle, group_size=size) for size in sizes]
    return found


class WriterContract:
    """Conversions of a tiny model, judged by the format's own reader.

    A subclass gives the name and `read`; it may add recipes, or give its own tensors where a random model is refused.
    """

    name: str
    more: ClassVar[tuple[Recipe, ...]] = ()
    hidden = 128
    arithmetic: torch.dtype | None = None  # the reader's, where it is not the model's type

    def read(self, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Dequantized weights by module, as the format's own reader has them."""
        raise NotImplementedError

    def tensors(self, layers: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        """A model that the format takes."""
        return llama_tensors(layers, hidden, dtype)

    def save(self, folder: Path, layers: int = 2, hidden: int = 128, n_shards: int = 1, dtype=torch.bfloat16) -> Path:
        return save_checkpoint(folder, self.tensors(layers, hidden, dtype), llama_config(layers, hidden), n_shards)

    @property
    def recipe(self) -> Recipe:
        return Recipe(format=self.name)

    @pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
    def test_the_reader_sees_what_was_solved(self, tmp_path, dtype):
        source = self.save(tmp_path / "m", 1, self.hidden, dtype=DTYPES[dtype])
        energies = profile(Checkpoint.open(source))
        tried = [recipe for recipe in recipes(self.name) if self.hidden % (recipe.group_size or 1) == 0]
        for i, recipe in enumerate([*tried, *self.more]):
            quantize_checkpoint(source, tmp_path / str(i), recipe)
            verify_folder(tmp_path / str(i), Checkpoint.open(source))
            read = self.read(tmp_path / str(i), DTYPES[dtype])
            solved = dequantized(source, recipe, energies, self.arithmetic)
            assert read.keys() == solved.keys()
            for module, weight in solved.items():
                assert torch.equal(read[module], weight.to(DTYPES[dtype])), (module, recipe)

    def test_same_input_same_bytes_for_any_threads_and_any_order_of_shards(self, tmp_path):
        source = self.save(tmp_path / "m", layers=3, hidden=512, n_shards=3)  # several tiles a tensor
        quantize_checkpoint(source, tmp_path / "one", self.recipe, threads=1)
        quantize_checkpoint(source, tmp_path / "two", self.recipe, threads=2)
        (tmp_path / "backwards").mkdir()
        checkpoint = Checkpoint.open(source)
        plan = build_plan(checkpoint, self.recipe)
        energies = profile(checkpoint, "auto" if plan.recipe.weighted else "none")
        plan = plan.with_energies(energies)
        write_folding(plan, energies, tmp_path / "backwards")
        results = [*(quantize_shard(checkpoint, [plan], i, tmp_path / "backwards", energies)[0] for i in (2, 0, 1))]
        again = results.pop(1).index  # one of them twice
        results += quantize_shard(checkpoint, [plan], again, tmp_path / "backwards", energies)
        finish_checkpoint(checkpoint, plan, results, tmp_path / "backwards")
        one = folder_bytes(tmp_path / "one")
        assert one == folder_bytes(tmp_path / "two") == folder_bytes(tmp_path / "backwards")

    def test_sizes_are_known_before_the_work(self, tmp_path):
        source = self.save(tmp_path / "m", n_shards=2)
        plan = build_plan(Checkpoint.open(source), self.recipe)
        quantize_checkpoint(source, tmp_path / "out", self.recipe)
        stored = stored_tensors(tmp_path / "out")
        assert plan.nbytes_out == sum(tensor.nbytes for tensor in stored.values())
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == plan.nbytes_out
        assert set(index["weight_map"]) == set(stored)
        for tensor, file in index["weight_map"].items():
            assert tensor in load_file(tmp_path / "out" / file)

    def test_no_file_is_larger_than_the_limit(self, tmp_path):
        limit = 60_000
        source = self.save(tmp_path / "m", layers=12, hidden=64, n_shards=2)
        recipe = Recipe.from_dict(self.recipe.to_dict() | {"max_shard_nbytes": limit})
        quantize_checkpoint(source, tmp_path / "out", recipe)
        files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
        assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        assert len(files) > 4
        assert max((tmp_path / "out" / file).stat().st_size for file in files) <= limit
