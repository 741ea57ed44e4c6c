"""Our solver beside llama.cpp's own quantizer, type by type, on the same weights in one run: squared errors and speed as ratios.

python -m tests.benchmarks.ggml LIBGGML_BASE [--layers N] [--presets NAME ...] [--types NAME ...] [--threads N]

LIBGGML_BASE is ggml's shared library (libggml-base.so, .dylib or .dll), of a build of llama.cpp or of a package that brings one
along, such as npm's node-llama-cpp. Weights are down_proj of SmolLM2-135M, whose 1536 columns fill super-blocks, quantized twice:
with nothing, and with synthetic input energies, which llama.cpp gets as its importance matrix. The gguf package reads both
results. llama.cpp's search weighs errors by the size of the weights even where nothing is asked for, which is its own choice.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch

from hqq_core import Checkpoint, QuantizedTensor, quantize
from hqq_core.energy import profile
from hqq_core.formats.gguf.blocks import BLOCK_TYPES, pack
from hqq_core.recipe import PRESETS
from tests.models import cached


class Sums(NamedTuple):
    """Squared errors without and with energies, and seconds of the first."""

    plain: float
    weighted: float
    took: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path, help="ggml's shared library")
    parser.add_argument("--layers", type=int, default=30, help="layers to take (0.9 M weights each)")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--types", nargs="+", choices=BLOCK_TYPES, default=list(BLOCK_TYPES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    ggml = Ggml(arguments.library)
    layers = list(down_projections(arguments.layers))
    numel = sum(W.numel() for W, _ in layers) / 1e6
    print(
        f"down_proj of {len(layers)} layers, {numel:.1f} M weights; ours on {arguments.threads} threads, llama.cpp on 1"
    )
    print(
        f"{'type':>6} {'preset':>9} {'rel. MSE':>10} {'of llama.cpp':>12} {'weighted':>12} {'Mw/s':>7} {'llama.cpp':>9}"
    )
    norm = sum(W.double().square().sum().item() for W, _ in layers)
    for name in arguments.types:
        theirs = total(ggml.quantize(W, name, h) for W, h in layers)
        for preset in arguments.presets:
            ours = total(solve(W, name, h, preset, arguments.threads) for W, h in layers)
            print(
                f"{name:>6} {preset:>9} {ours.plain / norm:>10.3e} {ours.plain / theirs.plain:>12.3f} "
                f"{ours.weighted / theirs.weighted:>12.3f} {numel / ours.took:>7.1f} {numel / theirs.took:>9.1f}",
                flush=True,
            )


def down_projections(n_layers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Weights and the energies of their columns."""
    checkpoint = Checkpoint.open(cached("smollm2-135m"))
    energies = profile(checkpoint, "synthetic")
    for file in checkpoint.files:
        with checkpoint.shard(file) as reader:
            for name in reader.entries:
                layer = name.split(".")[2] if "down_proj" in name else None
                if layer is not None and int(layer) < n_layers:
                    yield reader.read(name).float(), energies.vectors[name].float()


def total(results: Iterator[Sums]) -> Sums:
    """Of all layers."""
    return Sums(*(sum(parts) for parts in zip(*results, strict=True)))


def solve(W: torch.Tensor, name: str, h: torch.Tensor, preset: str, threads: int) -> Sums:
    """Ours."""
    spec = BLOCK_TYPES[name].spec(preset)
    quantize(W[:32], spec, threads=threads)  # compiled, and not timed
    start = time.perf_counter()
    plain = quantize(W, spec, threads=threads)
    took = time.perf_counter() - start
    weighted = quantize(W, spec, energy=h, threads=threads)

    def error(tensor: QuantizedTensor, h: torch.Tensor | None) -> float:
        return squared_error(W, pack(name, tensor), name, h)

    return Sums(error(plain, None), error(weighted, h), took)


def squared_error(W: torch.Tensor, packed: np.ndarray, name: str, h: torch.Tensor | None) -> float:
    """Weighted by h, as the gguf package reads what was packed."""
    read = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name]))
    squares = (W.double() - read.double()).square()
    return float((squares if h is None else squares * h.double()).sum())


class Ggml:
    """llama.cpp's quantizer."""

    def __init__(self, library: Path) -> None:
        self._quantize = ctypes.CDLL(str(library.resolve())).ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        self._quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantize(self, W: torch.Tensor, name: str, h: torch.Tensor) -> Sums:
        """Its errors on one matrix."""
        start = time.perf_counter()
        plain = self._pack(W, name, None)
        took = time.perf_counter() - start
        return Sums(squared_error(W, plain, name, None), squared_error(W, self._pack(W, name, h), name, h), took)

    def _pack(self, W: torch.Tensor, name: str, h: torch.Tensor | None) -> np.ndarray:
        rows, columns = W.shape
        kind, source = BLOCK_TYPES[name], np.ascontiguousarray(W.numpy())
        packed = np.empty((rows, kind.row_nbytes(columns)), np.uint8)
        importance = None if h is None else np.ascontiguousarray(h.numpy())
        written = self._quantize(
            kind.type_id, source.ctypes.data, packed.ctypes.data, 0, rows, columns,
            None if importance is None else importance.ctypes.data,
        )  # fmt: skip
        if written != packed.nbytes:
            raise SystemExit(f"{name}: ggml wrote {written} bytes: wanted {packed.nbytes}")
        return packed


if __name__ == "__main__":
    main()
