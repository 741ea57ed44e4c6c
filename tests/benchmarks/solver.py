"""Our CPU solver beside hqq 0.2.8 on the same tensors in one run: squared error and speed, as ratios.

python -m tests.benchmarks.solver [--layers N] [--rows N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from hqq_core import Checkpoint, QuantizedTensor, QuantSpec, quantize
from tests.models import cached
from tests.oracles import hqq

NBITS = (4, 3, 2)
GROUP_SIZE = 64
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="layers of SmolLM2-135M to take (3.5 M weights each)")
    parser.add_argument("--rows", type=int, default=4096, help="rows and columns of the one Gaussian matrix")
    arguments = parser.parse_args()
    quantize(torch.randn(64, 64), QuantSpec())  # compiled once, cached on disk

    print(f"group {GROUP_SIZE}, axis 1, float zero; {torch.get_num_threads()} threads; best of {ROUNDS} rounds")
    print(
        f"{'tensors':>22} {'bits':>4} {'rel. MSE hqq':>13} {'ours':>10} {'ratio':>6} {'hqq Mw/s':>9} {'ours':>8} {'ratio':>6}"
    )
    for label, tensors in (("SmolLM2-135M", list(smollm2_weights(arguments.layers))), gaussian(arguments.rows)):
        for nbits in NBITS:
            error_hqq, time_hqq = measure(tensors, partial(solve_hqq, nbits=nbits), dequantize_hqq)
            error, took = measure(tensors, partial(solve_ours, nbits=nbits), dequantize_ours)
            numel = sum(W.numel() for W in tensors) / 1e6
            print(
                f"{label:>22} {nbits:>4} {error_hqq:>13.6f} {error:>10.6f} {error / error_hqq:>6.3f} "
                f"{numel / time_hqq:>9.2f} {numel / took:>8.1f} {time_hqq / took:>6.0f}"
            )


def smollm2_weights(layers: int) -> Iterator[torch.Tensor]:
    checkpoint = Checkpoint.open(cached("smollm2-135m"))
    wanted = tuple(f"model.layers.{i}." for i in range(layers))
    for file, entries in checkpoint.headers().items():
        with checkpoint.shard(file) as reader:
            yield from (
                reader.read(name) for name in entries if name.startswith(wanted) and name.endswith("_proj.weight")
            )


def gaussian(rows: int) -> tuple[str, list[torch.Tensor]]:
    weights = torch.randn(rows, rows, generator=torch.Generator().manual_seed(0)) * 0.02
    return f"Gaussian {rows} x {rows}", [weights.bfloat16()]


def measure(
    tensors: list[torch.Tensor], solve: Callable[[torch.Tensor], Any], dequantize: Callable[[Any], torch.Tensor]
) -> tuple[float, float]:
    """Relative squared error over all tensors, from the reader's own dequantization; seconds of solving, best round."""
    rounds, solved = [], []
    for _ in range(ROUNDS):
        time.sleep(0.5)  # torch's threads spin for a while after their last work
        start = time.perf_counter()
        solved = [solve(W) for W in tensors]
        rounds.append(time.perf_counter() - start)
    error = sum((W.float() - dequantize(q)).square().sum().item() for W, q in zip(tensors, solved, strict=True))
    return error / sum(W.float().square().sum().item() for W in tensors), min(rounds)


def solve_hqq(W: torch.Tensor, nbits: int) -> tuple[torch.Tensor, dict]:
    return hqq("core.quantize").Quantizer.quantize(
        W, nbits=nbits, group_size=GROUP_SIZE, axis=1, optimize=True, device="cpu", compute_dtype=torch.float32,
        round_zero=nbits == 4,
    )  # fmt: skip


def dequantize_hqq(solved: tuple[torch.Tensor, dict]) -> torch.Tensor:
    return hqq("core.quantize").Quantizer.dequantize(*solved)


def solve_ours(W: torch.Tensor, nbits: int) -> QuantizedTensor:
    return quantize(W, QuantSpec(nbits=nbits, group_size=GROUP_SIZE, scale_dtype="float16"))


def dequantize_ours(solved: QuantizedTensor) -> torch.Tensor:
    return solved.dequantize(torch.float32)


if __name__ == "__main__":
    main()
