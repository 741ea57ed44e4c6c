"""Our CPU solver beside hqq 0.2.8 on the same tensors in one run: squared error and speed, as ratios, for every preset.

python -m tests.benchmarks.solver [--layers N] [--rows N] [--threads N]

Then, for the one large matrix: memory beyond input and output, and the share of the machine's limit, which is measured too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit

from hqq_core import Checkpoint, QuantizedTensor, QuantSpec, Recipe, quantize
from hqq_core.recipe import PRESETS
from hqq_core.solver._starts import trial_iters
from tests.models import cached
from tests.oracles import hqq

NBITS = (4, 3, 2)
GROUP_SIZE = 64
ROUNDS = 5
OPERATIONS = {False: 9, True: 11}  # vector instructions per weight and pass, without and with energies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1, help="layers of SmolLM2-135M to take (3.5 M weights each)")
    parser.add_argument("--rows", type=int, default=4096, help="rows and columns of the one Gaussian matrix")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--memory", choices=PRESETS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(peak_beyond_input_and_output(arguments.rows, arguments.memory, arguments.threads))
        return
    torch.set_num_threads(arguments.threads)  # hqq's
    quantize(torch.randn(64, 64, dtype=torch.bfloat16), QuantSpec())  # compiled once, cached on disk

    print(
        f"group {GROUP_SIZE}, axis 1, float zero; {arguments.threads} threads; hqq 0.2.8.post1 = 1; best of {ROUNDS} rounds"
    )
    print(f"{'tensors':>22} {'bits':>4} {'solver':>9} {'rel. MSE':>10} {'ratio':>6} {'Mw/s':>7} {'ratio':>6}")
    large = gaussian(arguments.rows)
    for label, tensors, widths in (
        ("SmolLM2-135M", list(smollm2_weights(arguments.layers)), NBITS),
        (f"Gaussian {arguments.rows}^2", [large], NBITS[:1]),
    ):
        numel = sum(W.numel() for W in tensors) / 1e6
        for nbits in widths:
            peer, peer_took = measure(tensors, partial(solve_hqq, nbits=nbits), dequantize_hqq)
            print(f"{label:>22} {nbits:>4} {'hqq':>9} {peer:>10.6f} {1:>6} {numel / peer_took:>7.2f} {1:>6}")
            for preset in PRESETS:
                spec = Recipe(nbits=nbits, group_size=GROUP_SIZE, preset=preset).spec("float")
                solve = partial(quantize, spec=spec, threads=arguments.threads)
                error, took = measure(tensors, solve, dequantize_ours)
                print(
                    f"{label:>22} {nbits:>4} {preset:>9} {error:>10.6f} {error / peer:>6.3f} "
                    f"{numel / took:>7.1f} {peer_took / took:>6.0f}"
                )
    copied, multiplied = copy_rate(large), multiply_add_rate(arguments.threads)
    time.sleep(0.5)
    print(f"machine: copies {copied / 1e9:.1f} GB/s, {multiplied / 1e9:.0f} G multiply-adds a second on its threads")
    print(f"{'preset':>9} {'energies':>8} {'Mw/s':>7} {'of copy':>8} {'of multiply-adds':>17} {'peak MB':>8}")
    for preset in PRESETS:
        spec = Recipe(nbits=4, group_size=GROUP_SIZE, preset=preset).spec("float")
        memory = [sys.executable, "-m", __spec__.name, "--memory", preset, "--rows", str(arguments.rows)]
        peak = int(subprocess.run(memory, capture_output=True, check=True).stdout)
        for energy in (None, torch.rand(arguments.rows)):
            solve = partial(quantize, large, spec, threads=arguments.threads, energy=energy)
            rate = large.numel() / min(timed(solve) for _ in range(ROUNDS))
            nbytes = 2 + 1 + 8 / GROUP_SIZE  # bfloat16 in; codes, scale and zero out
            operations = passes(spec) * OPERATIONS[energy is not None]
            print(
                f"{preset:>9} {'none' if energy is None else 'random':>8} {rate / 1e6:>7.1f} {rate * nbytes / copied:>8.3f} "
                f"{rate * operations / multiplied:>17.3f} {peak / 1e6:>8.1f}"
            )


def passes(spec: QuantSpec) -> int:
    """How often the kernel goes over a group, if none stops early."""
    trials = spec.starts * (trial_iters(spec) + 1) if spec.starts > 1 else 0
    return trials + spec.iters + 1


def copy_rate(W: torch.Tensor) -> float:
    """Bytes read and written a second, all threads."""
    target = torch.empty_like(W)
    return 2 * W.nbytes / min(timed(lambda: target.copy_(W)) for _ in range(5))


def multiply_add_rate(threads: int, n: int = 4096, rounds: int = 20000) -> float:
    """Float32 multiply-adds a second on that many threads, each from its core's first-level cache."""
    parts = [np.ones(n, np.float32) for _ in range(threads)]
    multiply_add(parts[0], 1)
    with ThreadPoolExecutor(threads) as pool:
        took = min(timed(lambda: list(pool.map(partial(multiply_add, rounds=rounds), parts))) for _ in range(ROUNDS))
    return threads * n * rounds * 16 / took


@njit(fastmath={"contract"}, nogil=True)
def multiply_add(X, rounds):
    for _ in range(rounds):
        for i in range(X.size):
            x = X[i]
            for _ in range(16):
                x = x * np.float32(0.999) + np.float32(0.001)
            X[i] = x


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_beyond_input_and_output(rows: int, preset: str, threads: int) -> int:
    """Bytes of resident memory at the worst moment (Linux), in a process that has loaded everything before."""
    W, spec = gaussian(rows), Recipe(nbits=4, group_size=GROUP_SIZE, preset=preset).spec("float")
    quantize(W[:64], spec, threads=threads)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    quantized = quantize(W, spec, threads=threads)
    return resident("VmHWM") - before - sum(part.nbytes for part in (quantized.W_q, quantized.scale, quantized.zero))


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def smollm2_weights(layers: int) -> Iterator[torch.Tensor]:
    checkpoint = Checkpoint.open(cached("smollm2-135m"))
    wanted = tuple(f"model.layers.{i}." for i in range(layers))
    for file, entries in checkpoint.headers().items():
        with checkpoint.shard(file) as reader:
            yield from (
                reader.read(name) for name in entries if name.startswith(wanted) and name.endswith("_proj.weight")
            )


def gaussian(rows: int) -> torch.Tensor:
    return (torch.randn(rows, rows, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


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


def dequantize_ours(solved: QuantizedTensor) -> torch.Tensor:
    return solved.dequantize(torch.float32)


if __name__ == "__main__":
    main()
