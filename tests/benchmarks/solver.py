"""Our CPU solver beside hqq 0.2.8 on the same tensors in one run: squared error and speed, as ratios.

python -m tests.benchmarks.solver [--layers N] [--rows N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch

from hqq_core import Checkpoint, QuantSpec, quantize
from tests.models import cached
from tests.oracles import hqq

NBITS = (4, 3, 2)
GROUP_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2, help="layers of SmolLM2-135M to take (3.5 M weights each)")
    parser.add_argument("--rows", type=int, default=2048, help="rows and columns of the one Gaussian matrix")
    arguments = parser.parse_args()
    quantize(torch.randn(64, 64), QuantSpec())  # compiled once, cached on disk

    print(f"group {GROUP_SIZE}, axis 1, float zero; {torch.get_num_threads()} threads; hqq 0.2.8.post1 = 1")
    print(
        f"{'tensors':>22} {'bits':>4} {'rel. MSE hqq':>13} {'ours':>10} {'ratio':>6} {'hqq Mw/s':>9} {'ours':>8} {'ratio':>6}"
    )
    for label, tensors in (("SmolLM2-135M", list(smollm2_weights(arguments.layers))), gaussian(arguments.rows)):
        for nbits in NBITS:
            error_hqq, time_hqq = measure(tensors, lambda W, nbits=nbits: hqq_dequantized(W, nbits))
            error, took = measure(tensors, lambda W, nbits=nbits: ours_dequantized(W, nbits))
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
    tensors: list[torch.Tensor], solve: Callable[[torch.Tensor], tuple[float, torch.Tensor]]
) -> tuple[float, float]:
    """Relative squared error over all tensors, from the reader's own dequantization; and seconds spent solving."""
    error = norm = seconds = 0.0
    for W in tensors:
        took, W_r = solve(W)
        error += (W.float() - W_r).square().sum().item()
        norm += W.float().square().sum().item()
        seconds += took
    return error / norm, seconds


def hqq_dequantized(W: torch.Tensor, nbits: int) -> tuple[float, torch.Tensor]:
    quantizer = hqq("core.quantize").Quantizer
    start = time.perf_counter()
    W_q, meta = quantizer.quantize(
        W, nbits=nbits, group_size=GROUP_SIZE, axis=1, optimize=True, device="cpu", compute_dtype=torch.float32,
        round_zero=nbits == 4,
    )  # fmt: skip
    took = time.perf_counter() - start
    return took, quantizer.dequantize(W_q, meta)


def ours_dequantized(W: torch.Tensor, nbits: int) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    quantized = quantize(W, QuantSpec(nbits=nbits, group_size=GROUP_SIZE, scale_dtype="float16"))
    took = time.perf_counter() - start
    return took, quantized.dequantize(torch.float32)


if __name__ == "__main__":
    main()
