"""The GPU kernel against the equations and the CPU kernel: on a GPU where there is one, else under Triton's interpreter."""

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from hqq_core import QuantSpec, quantize
from hqq_core.packing import pack_dense
from hqq_core.solver import _reference, _solve_on_gpu, _triton
from hqq_core.spec import NBITS, SCALE_DTYPES, ZERO_MODES

# The interpreter takes a second for a few passes over a tile: one setting has the default's, the others fewer.
FULL: dict[str, int] = {}
SHORT = {"iters": 2, "starts": 2}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gaussian(rows: int, columns: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def energies(*shape: int, seed: int = 0) -> torch.Tensor:
    """Spread over four powers of ten, each group normalized as `quantize` does."""
    H = torch.exp(2.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return torch.from_numpy(_reference.normalize_energy(H.double().numpy())).float()


def solve(matrix: torch.Tensor, spec: QuantSpec, energy: torch.Tensor | None = None, **options) -> _triton.Solved:
    """On the device and back."""
    there = None if energy is None else energy.to(DEVICE)
    solved = _triton.solve(matrix.to(DEVICE), spec, there, **options)
    return _triton.Solved(*(getattr(solved, field.name).cpu() for field in dataclasses.fields(solved)))


def squared_error(W: torch.Tensor, solved: _triton.Solved, energy: torch.Tensor | None = None) -> torch.Tensor:
    """Per group of axis 1, weighted, from the stored values, in float64."""
    residual = W.double() - (solved.codes.double() - solved.zero.double()[:, None]) * solved.scale.double()[:, None]
    weights = torch.ones(()) if energy is None else energy.double().reshape(-1, W.shape[1]).repeat(len(W), 1)[: len(W)]
    return (weights * residual.square()).sum(1)


def agreement(ours: _triton.Solved, W: torch.Tensor, spec: QuantSpec, energy: torch.Tensor | None = None) -> float:
    """Share of groups with the reference's scale and zero: these have its codes, the rest took another path at a tie, as good."""
    rows = None if energy is None else energy.double().reshape(-1, W.shape[1]).repeat(len(W), 1)[: len(W)].numpy()
    reference = _reference.solve(W.double().numpy(), spec, rows)
    codes, scale, zero = (torch.from_numpy(array) for array in reference)
    same = (ours.scale.double() == scale) & (ours.zero.double() == zero)
    assert (ours.codes != codes)[same].double().mean() < 1e-3
    oracle = squared_error(W, _triton.Solved(codes, scale, zero, ours.errors), energy)
    noise = W.shape[1] * (W.abs().amax(1).double() * 2**-21).square()  # errors below it are not told apart
    ratio = (squared_error(W, ours, energy) + noise) / (oracle + noise)
    assert ratio[same].numpy() == pytest.approx(1, rel=0.01)
    assert ratio.mean().item() == pytest.approx(1, abs=0.05)  # one group may fare better or worse, not all of them
    return same.double().mean().item()


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("zero", ZERO_MODES)
@pytest.mark.parametrize("nbits", NBITS)
def test_kernel_agrees_with_the_reference(nbits, zero, weighted):
    spec = QuantSpec(nbits=nbits, zero=zero, **(FULL if nbits == 4 else SHORT))
    W, H = gaussian(64, 64), energies(1, 2, 64) if weighted else None
    assert agreement(solve(W, spec, H), W, spec, H) > 0.95  # 61 of 64


@pytest.mark.parametrize("nbits", [2, 4, 8])
@pytest.mark.parametrize("zero", ZERO_MODES)
def test_codes_part_from_the_cpu_only_at_ties(zero, nbits):
    """On weights half of which lie at ties: codes part by one, and within two float32 roundings of a tie."""
    spec = QuantSpec(nbits=nbits, zero=zero, scale_dtype="float32", iters=0, starts=1)
    generator = torch.Generator().manual_seed(nbits)
    step = torch.rand(64, 1, generator=generator, dtype=torch.float64) * 0.02 + 0.01
    halves = torch.randint(0, 2 * spec.max_code + 1, (64, 64), generator=generator)
    halves[:, 0], halves[:, 1] = 0, 2 * spec.max_code  # so that min-max finds the step
    offset = {"float": 0.37, "offset": 0.37, "int": float(spec.max_code // 2), "none": spec.middle}[zero]
    W = (step * (halves / 2 - offset)).float()
    cpu, gpu = quantize(W, spec), solve(W, spec)
    assert torch.equal(cpu.scale[:, 0], gpu.scale)
    assert torch.equal(cpu.zero[:, 0], gpu.zero)
    exact = W.double() / cpu.scale.double() + cpu.zero.double()
    from_tie = ((exact - exact.floor()) - 0.5).abs()
    rounding = 2.0**-24 * ((W / cpu.scale).abs() + cpu.zero.abs() + spec.max_code).double()
    parted = cpu.W_q != gpu.codes
    assert parted.any()  # else nothing was shown
    assert (from_tie <= 2 * rounding)[parted].all()
    assert ((cpu.W_q.int() - gpu.codes.int()).abs()[parted] == 1).all()


@pytest.mark.parametrize("zero", ZERO_MODES)
def test_the_shrinkage_step_agrees_too(zero):
    spec = QuantSpec(nbits=3, zero=zero, lp_norm=0.7, **SHORT)
    W = gaussian(32, 64)
    assert agreement(solve(W, spec), W, spec) > 0.9


@pytest.mark.parametrize("group_size", [1, 7, 8, 48, 65, 128, 576, 4096])
def test_any_group_size(group_size):
    """Padded to a power of two, shared by threads, spread over warps."""
    W, spec = gaussian(6, group_size, seed=1), QuantSpec(group_size=group_size, iters=2, starts=1)
    for H in (None, energies(1, 1, group_size)):
        ours = solve(W, spec, H)
        assert agreement(ours, W, spec, H) > 0.8  # 5 of 6
        error, norm = ours.sums()
        assert error == pytest.approx(squared_error(W, ours).sum().item(), rel=1e-4, abs=norm * 2**-40)
        assert norm == pytest.approx(W.double().square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is(dtype):
    W = gaussian(40, 64).to(dtype)
    spec = QuantSpec(nbits=4, **SHORT)
    half, full = solve(W, spec), solve(W.float(), spec)
    assert torch.equal(half.codes, full.codes)
    assert torch.equal(half.scale, full.scale)
    assert torch.equal(half.zero, full.zero)


@pytest.mark.parametrize("group_size", [8, 24, 64])
@pytest.mark.parametrize("nbits", _triton.PACKED_BITS)
def test_packed_codes_are_those_of_the_dense_layout(nbits, group_size):
    W = gaussian(36, group_size)
    spec = QuantSpec(nbits=nbits, group_size=group_size, iters=0, starts=1)
    packed, plain = solve(W, spec, packed=True), solve(W, spec)
    assert packed.codes.shape == (36, group_size * nbits // 8)
    wanted = pack_dense(plain.codes.reshape(1, -1), nbits).view(torch.uint8)[:, : packed.codes.numel()]
    assert torch.equal(packed.codes.reshape(1, -1), wanted)


def test_axis_0_solves_the_same_groups():
    W = gaussian(64, 70)
    across, along = (solve(*case) for case in ((W, QuantSpec(axis=0, **SHORT)), (W.T.contiguous(), QuantSpec(**SHORT))))
    assert torch.equal(across.codes.T, along.codes)
    assert torch.equal(across.scale, along.scale)
    assert torch.equal(across.zero, along.zero)


def test_each_expert_has_its_own_energies():
    W, H = gaussian(2 * 3 * 5, 64), energies(2, 3, 64)  # 2 experts, 5 rows of 3 groups each
    together = solve(W, QuantSpec(nbits=2, **SHORT), H)
    for expert in range(2):
        rows = slice(15 * expert, 15 * expert + 15)
        alone = solve(W[rows], QuantSpec(nbits=2, **SHORT), H[expert : expert + 1])
        assert torch.equal(together.codes[rows], alone.codes)
        assert torch.equal(together.scale[rows], alone.scale)


@pytest.mark.parametrize("zero", ZERO_MODES)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_never_worse_than_round_to_nearest(scale_dtype, zero):
    W = torch.cat([gaussian(16, 48, seed, 10.0**exponent) for seed, exponent in enumerate((-12, -3, 0, 3))])
    W[::3] += W.abs().amax()
    H = energies(1, 1, 48)
    spec = QuantSpec(nbits=3, group_size=48, zero=zero, scale_dtype=scale_dtype, **SHORT)
    solved = squared_error(W, solve(W, spec, H), H)
    rounded = squared_error(W, solve(W, dataclasses.replace(spec, iters=0, starts=1), H), H)
    float32_noise = 48 * (W.abs().amax(1).double() * 2**-21).square()  # errors below it are not told apart
    assert (solved <= rounded * (1 + 1e-4) + float32_noise).all()


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("zero", ZERO_MODES)
def test_hard_groups_stay_finite(zero, scale_dtype):
    groups = [
        [0.0] * 16, [1.5] * 16, [-1.5] * 16, [0.0] * 15 + [1e4], [1e-40] * 16, [1e-40, -3e-41] * 8, [1e30, -1e30] * 8,
        [1e-20, 2e-20] * 8, [1000.0, 1000.5] * 8, [3.0e38] * 16, [0.0] * 15 + [1e-30],
    ]  # fmt: skip
    W = torch.tensor(groups, dtype=torch.float32)
    for nbits in (1, 4):
        solved = solve(W, QuantSpec(nbits=nbits, group_size=16, zero=zero, scale_dtype=scale_dtype, **SHORT))
        assert torch.isfinite(squared_error(W, solved)).all()
        assert all(map(np.isfinite, solved.sums()))
        assert (solved.scale > 0).all()
        assert int(solved.codes.max()) < 2**nbits
        if zero != "none":
            assert (squared_error(W, solved)[:3] == 0).all()  # constants are exact


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy tells of NaN, a GPU does not
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_show_in_the_norm(value):
    W = gaussian(40, 64)
    W[33, 5] = value
    assert np.isnan(solve(W, QuantSpec(iters=0, starts=1)).sums()[1])


@pytest.mark.parametrize("axis", [0, 1])
def test_slabs_give_the_answer_of_the_whole(axis):
    matrix = gaussian(120, 64) if axis == 1 else gaussian(120, 64).T  # strided for axis 0
    H = energies(2, 3, 64) if axis == 1 else None
    spec, seen = QuantSpec(axis=axis, iters=1, starts=1), []
    whole = solve(matrix.contiguous(), spec, H)
    slabs = _triton.solve_streamed(matrix, spec, DEVICE, H, progress=seen.append, slab_numel=17 * 64)
    assert torch.equal(slabs.codes, whole.codes)
    assert torch.equal(slabs.scale, whole.scale)
    assert torch.equal(slabs.zero, whole.zero)
    assert slabs.sums() == pytest.approx(whole.sums(), rel=1e-12)
    assert len(seen) == 8
    assert sum(seen) == matrix.numel()


def test_what_progress_raises_stops_the_slabs():
    class Enough(Exception):
        pass

    seen = []

    def progress(numel: int) -> None:
        seen.append(numel)
        if len(seen) == 2:
            raise Enough

    with pytest.raises(Enough):
        _triton.solve_streamed(
            gaussian(120, 64), QuantSpec(iters=0, starts=1), DEVICE, progress=progress, slab_numel=17 * 64
        )
    assert len(seen) == 2


@pytest.mark.parametrize("axis", [0, 1])
def test_quantize_reaches_the_kernel_with_its_groups_and_energies(axis):
    """What `quantize(device=...)` calls, on three experts; `quantize` itself would take the CPU for the interpreter's device."""
    W, H = gaussian(16, 3 * 128).reshape(3, 16, 128), energies(3, 2, 64)
    spec = QuantSpec(nbits=3, axis=axis, group_size=64 if axis == 1 else 3, **SHORT)
    weights = H.numpy() if axis == 1 else None
    codes, scale, _, error, norm = _solve_on_gpu(W, spec, weights, None, spec.group_size, DEVICE, None)
    cpu = quantize(W, spec, energy=H.reshape(3, 128))
    same = cpu.scale.flatten() == scale.to(cpu.scale.dtype)
    assert codes.shape == cpu.W_q.shape
    assert same.float().mean() > 0.95
    assert error == pytest.approx(cpu.squared_error, rel=0.02)
    assert norm == pytest.approx(cpu.squared_norm, rel=1e-5)


def test_factors_reach_the_groups_they_belong_to():
    W, (columns, rows) = gaussian(16, 128), (energies(128) + 0.5, energies(16) + 0.5)
    spec = QuantSpec(nbits=3, **SHORT)
    streamed = _triton.solve_streamed(W.view(-1, 64), spec, DEVICE, None, (columns, rows), slab_numel=5 * 64)
    there = solve((W * columns * rows[:, None]).view(-1, 64), spec)
    assert torch.equal(streamed.codes, there.codes.cpu())
    assert torch.equal(streamed.scale, there.scale.cpu())


@pytest.mark.parametrize("zero", ZERO_MODES)
def test_a_step_keeps_its_floor_where_one_tiny_weight_has_all_the_energy(zero):
    W, H = gaussian(8, 64, scale=1.0), torch.zeros(1, 1, 64)
    W[:, 0], H[..., 0] = 1e-15, 0.5
    spec = QuantSpec(zero=zero, scale_dtype="bfloat16", **SHORT)
    solved, cpu = solve(W, spec, H), quantize(W, spec, energy=H.flatten())
    assert torch.equal(solved.scale.bfloat16(), cpu.scale.flatten())
    assert solved.sums()[0] == pytest.approx(cpu.squared_error, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_more_than_two_to_the_31_weights():
    n = (1 << 31) // 64 + 4096
    W = torch.zeros(n, 64, dtype=torch.bfloat16, device=DEVICE)
    W[-64:] = gaussian(64, 64).bfloat16()
    last, alone = _triton.solve(W, QuantSpec()), _triton.solve(W[-64:].contiguous(), QuantSpec())
    assert torch.equal(last.codes[-64:], alone.codes)
    assert torch.equal(last.scale[-64:], alone.scale)
