"""The GPU kernel over its floor and over hqq on the same GPU; without a GPU, the machine code that Triton makes for one.

python -m tests.benchmarks.gpu                  on a CUDA device: times, as ratios
python -m tests.benchmarks.gpu --assembly 90    anywhere: registers, stack, instructions a weight and pass, for capability 9.0
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hqq_core import QuantSpec
from hqq_core.solver import _triton
from tests.oracles import hqq

GROUP_SIZE = 64
SHAPES = {"4096 x 4096": (4096, 4096), "8192 x 28672": (8192, 28672), "32 experts": (32 * 1024, 4096)}
SPEC = QuantSpec(nbits=4, group_size=GROUP_SIZE, iters=10, starts=1)
OPERATIONS = 9  # float32 instructions that a weight needs in each pass: 3 for its code, 2 residual, 1 objective, 3 sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--assembly", type=int, metavar="CAPABILITY", help="compile for this capability, measure nothing"
    )
    arguments = parser.parse_args()
    if arguments.assembly:
        assembly(arguments.assembly)
    elif torch.cuda.is_available():
        measure()
    else:
        parser.error("no CUDA device here: nothing can be measured; --assembly 90 needs none")


def measure() -> None:
    """Each shape: our time over the floor, and over hqq's."""
    device = torch.device("cuda")
    copy, multiply_add = copy_rate(device), multiply_add_rate(device)
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s, {multiply_add / 1e12:.1f} T multiply-adds/s")
    print(f"{'shape':>14} {'solve':>22} {'Gw/s':>8} {'over floor':>10} {'over hqq':>9}")
    for label, shape in SHAPES.items():
        generator = torch.Generator(device).manual_seed(0)
        W = (torch.randn(shape, device=device, generator=generator) * 0.02).bfloat16()
        energy = torch.rand(1, shape[1] // GROUP_SIZE, GROUP_SIZE, device=device, generator=generator) / 2 + 0.1
        matrix = W.view(-1, GROUP_SIZE)
        hqq_s = seconds(functools.partial(hqq_quantize, W), repeats=3)
        for spec in (SPEC, dataclasses.replace(SPEC, iters=4, starts=7)):
            for weights in (None, energy):
                took = seconds(functools.partial(_triton.solve, matrix, spec, weights, packed=True))
                floor = floor_s(W.numel(), spec, copy, multiply_add, weighted=weights is not None)
                kind = f"{spec.starts} x {spec.iters}, {'weighted' if weights is not None else 'alike'}"
                rate = W.numel() / took / 1e9
                print(f"{label:>14} {kind:>22} {rate:>8.1f} {took / floor:>10.2f} {hqq_s / took:>9.0f}")
        host = matrix.cpu()
        streamed = seconds(functools.partial(_triton.solve_streamed, host, SPEC, device), repeats=3)
        copied = seconds(functools.partial(host.to, device), repeats=3)
        rate = W.numel() / streamed / 1e9
        print(
            f"{label:>14} {'from the host':>22} {rate:>8.1f} {streamed / copied:>10.2f} times a plain copy to the device"
        )


def floor_s(numel: int, spec: QuantSpec, copy: float, multiply_add: float, *, weighted: bool) -> float:
    """The longer of bytes over copy bandwidth and operations over float32 rate, with every pass run to its end."""
    passes = spec.iters + 1 + (spec.starts * (_triton.trial_iters(spec) + 1) if spec.starts > 1 else 0)
    nbytes = numel * (2 + spec.code_bits / 8 + 8 / GROUP_SIZE)  # bfloat16 in; codes, float32 scale and zero out
    return max(nbytes / copy, numel * passes * (OPERATIONS + 2 * weighted) / multiply_add)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second, device to device."""
    source = torch.empty(1 << 30, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


@triton.jit
def _multiply_adds(x, ROUNDS: triton.language.constexpr, N: triton.language.constexpr):
    at = triton.language.program_id(0) * N + triton.language.arange(0, N)
    y = triton.language.load(x + at)
    for _ in range(ROUNDS):
        y = y * 0.999 + 0.001
    triton.language.store(x + at, y)


def multiply_add_rate(device: torch.device) -> float:
    """Float32 multiply-adds per second, eight independent chains a thread."""
    x, rounds = torch.rand(1 << 24, device=device), 4096
    return x.numel() * rounds / seconds(lambda: _multiply_adds[(x.numel() // 1024,)](x, rounds, 1024, num_warps=4))


def seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call by device events, after three warm ones."""
    for _ in range(min(3, repeats)):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def hqq_quantize(W: torch.Tensor) -> object:
    return hqq("core.quantize").Quantizer.quantize(
        W,
        nbits=4,
        group_size=GROUP_SIZE,
        axis=1,
        optimize=True,
        device="cuda",
        compute_dtype=torch.bfloat16,
        round_zero=True,
    )


def assembly(capability: int) -> None:
    """Compile without a GPU, and count."""
    print(f"compute capability {capability / 10}, Triton {triton.__version__}; static counts, not times")
    print("group bits   zero   energy a thread registers stack a pass")
    for group_size in (32, 64, 128):
        for spec in (SPEC, dataclasses.replace(SPEC, zero="int"), dataclasses.replace(SPEC, zero="none")):
            for weighted in (False, True):
                counted(dataclasses.replace(spec, group_size=group_size), weighted, capability)


def counted(spec: QuantSpec, weighted: bool, capability: int) -> None:
    constants = _triton.constants(spec, spec.group_size or 0, weighted=weighted, packed=True)
    pointers = {"W": "*bf16", "starts": "*fp64", "codes": "*u8", "scales": "*fp32", "zeros": "*fp32", "errors": "*fp64"}
    if weighted:
        pointers["energy"] = "*fp32"
    else:
        constants["energy"] = None
    names = _triton._solve_tiles.arg_names
    numbers = {name: "fp32" if name in ("p", "beta", "kappa") else "i32" for name in names}
    signature = {name: "constexpr" if name in constants else pointers.get(name, numbers[name]) for name in names}
    source = ASTSource(
        _triton._solve_tiles,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    tile = _triton.tile_for(spec.group_size or 0)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": tile.warps})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        registers, stack = (int(re.search(rf"{key}:(\d+)", dump(cubin, "-res-usage"))[1]) for key in ("REG", "STACK"))
        loop = longest_loop(dump(cubin, "-sass"))
    per_thread = tile.chunks * tile.vector
    print(
        f"{spec.group_size:>5} {spec.nbits:>4} {spec.zero:>6} {'weighted' if weighted else 'alike':>8} {per_thread:>8} "
        f"{registers:>9} {stack:>5} {loop / per_thread:>6.1f}"
    )


def dump(cubin: Path, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, what, cubin], check=True, capture_output=True, text=True).stdout


def longest_loop(sass: str) -> int:
    """Instructions of the longest innermost loop, a float64 one counted twice; slow paths of division lie behind EXIT."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", sass)]
    ends = [at for at, text in code if text.split()[-1] == "EXIT" and not text.startswith("@")]
    jumps = [
        (int(m[1], 16), at) for at, text in code if at < ends[0] and (m := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text))
    ]
    loops = [(start, end) for start, end in jumps if start < end]
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[text for at, text in code if start <= at <= end] for start, end in inner]
    return max(sum(1 + bool(re.search(r"\bD(ADD|MUL|FMA|SETP)\b", text)) for text in body) for body in bodies)


if __name__ == "__main__":
    main()
