"""The kernel against the equations, and against round to nearest, for any group."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hqq_core import QuantSpec, quantize
from hqq_core.errors import SpecError, TensorError
from hqq_core.solver import _reference
from hqq_core.spec import NBITS, SCALE_DTYPES, ZERO_MODES
from hqq_core.tensors import TORCH_DTYPES

WITHIN = {
    "float": 1.05,
    "offset": 1.05,
    "int": 1.05,
    "none": 1.05,
}  # of the weighted optimum, all groups together, at 24 starts

specs = st.builds(
    QuantSpec,
    nbits=st.sampled_from(NBITS),
    group_size=st.just(None),
    zero=st.sampled_from(ZERO_MODES),
    starts=st.sampled_from([1, 2, 8]),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
)


def gaussian(rows: int, columns: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def energies(columns: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    """Log-normal, as a model's are; at spread 2 the largest is thousands of times the median."""
    return (torch.randn(columns, generator=torch.Generator().manual_seed(seed)) * spread).exp()


def squared_error(W: torch.Tensor, spec: QuantSpec, energy: torch.Tensor | None = None) -> torch.Tensor:
    """Per group of axis 1, from the stored values, in float64, weighted by the energies."""
    q = quantize(W, spec, energy=energy)
    residual = W.double() - q.dequantize(torch.float64)
    weights = torch.ones(W.shape[-1]) if energy is None else energy
    return (residual.square() * weights.double()).reshape(q.W_q.shape).sum(1)


def nearest(spec: QuantSpec) -> QuantSpec:
    """Round to nearest between the smallest and the largest weight."""
    return dataclasses.replace(spec, iters=0, starts=1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("starts", [1, 4])
@pytest.mark.parametrize("lp_norm", [2.0, 0.7])
@pytest.mark.parametrize("zero", ZERO_MODES)
@pytest.mark.parametrize("nbits", NBITS)
def test_kernel_agrees_with_the_reference(nbits, zero, lp_norm, starts, weighted):
    spec = QuantSpec(nbits=nbits, group_size=64, zero=zero, lp_norm=lp_norm, starts=starts)
    W, energy = gaussian(64, 256), energies(256) if weighted else torch.ones(256)
    X, H = W.double().numpy().reshape(-1, 64), energy.double().expand(64, -1).numpy().reshape(-1, 64)
    ours = quantize(W, spec, energy=energy if weighted else None)
    codes, scale, zeros = _reference.solve(X, spec, H)
    # A rounding tie that falls otherwise in float32 sends a group along another path: rare, and as good.
    same = (ours.scale[:, 0].double().numpy() == scale) & (ours.zero[:, 0].double().numpy() == zeros)
    ties = zero == "offset" and lp_norm != 2  # its zero is a quotient, and a power in float32 meets ties more often
    assert same.mean() > (0.92 if ties else 0.95)
    assert (ours.W_q.numpy() != codes)[same].mean() < 1e-4
    mine = X - (ours.W_q.numpy() - ours.zero.double().numpy()) * ours.scale.double().numpy()
    theirs = X - (codes - zeros[:, None]) * scale[:, None]
    assert (H * np.abs(mine) ** lp_norm).sum() == pytest.approx((H * np.abs(theirs) ** lp_norm).sum(), rel=0.01)
    assert ours.squared_error == pytest.approx((mine**2).sum(), rel=1e-4)


@given(
    spec=specs, seed=st.integers(0, 1000), columns=st.sampled_from([1, 2, 7, 8, 64, 65]), exponent=st.integers(-12, 3),
    spread=st.sampled_from([None, 0.5, 3.0]),
)  # fmt: skip
@example(QuantSpec(nbits=1, group_size=None, starts=1, scale_dtype="float32"), 410, 2, 0, 3.0)  # all error is rounding
@example(
    QuantSpec(nbits=1, group_size=None, zero="offset", starts=1, scale_dtype="float16"), 1, 1, 0, 0.5
)  # one weight
@example(QuantSpec(nbits=1, group_size=None, starts=2, scale_dtype="float32"), 0, 1, 0, 0.5)  # its codes tell no scale
def test_never_worse_than_round_to_nearest(spec, seed, columns, exponent, spread):
    W = gaussian(5, columns, seed, scale=10.0**exponent) + 10.0**exponent * (seed % 3)
    energy = None if spread is None else energies(columns, seed, spread)
    solved, rounded = squared_error(W, spec, energy), squared_error(W, nearest(spec), energy)
    float32_noise = columns * (W.abs().amax(1).double() * 2**-21).square()  # errors below it are not told apart
    if energy is not None:
        float32_noise *= energy.max().double()
    assert (solved <= rounded * (1 + 1e-4) + float32_noise).all()


@pytest.mark.parametrize("zero", ZERO_MODES)
@pytest.mark.parametrize("weighted", [False, True])
def test_near_the_optimum_that_brute_force_finds(zero, weighted):
    """2 bit, 8 weights: all 4^8 codes with their own least-squares (scale, zero)."""
    W, energy = gaussian(24, 8), energies(8, spread=1.0) if weighted else None
    spec = QuantSpec(nbits=2, group_size=8, zero=zero, scale_dtype="float32", iters=10, starts=24)
    optimum = brute_force(W.double().numpy(), np.ones(8) if energy is None else energy.double().numpy(), zero)
    solved = squared_error(W, spec, energy).numpy()
    assert (solved >= optimum * (1 - 1e-5)).all()
    assert solved.sum() <= WITHIN[zero] * optimum.sum()


def brute_force(X: np.ndarray, h: np.ndarray, zero: str) -> np.ndarray:
    """Smallest weighted squared error of each row over all codes of two bits, scales and zeros."""
    q = np.stack(np.meshgrid(*[np.arange(4.0)] * X.shape[1], indexing="ij"), -1).reshape(-1, X.shape[1])
    q = q[q.min(1) < q.max(1)]
    best = np.full(len(X), np.inf)
    zeros = {"float": [None], "offset": [None], "int": [0, 1, 2, 3], "none": [2]}[zero]
    for fixed in zeros:
        u = q - ((q @ h / h.sum())[:, None] if fixed is None else fixed)
        centred = X - (X @ h / h.sum())[:, None] if fixed is None else X
        square, cross = (u * u) @ h, centred @ (u * h).T  # (n_codes,), (rows, n_codes)
        gain = np.where(cross > 0, cross**2 / np.maximum(square, 1e-30), 0)
        best = np.minimum(best, (centred**2 @ h) - gain.max(1))
    return best


def test_least_squares_beats_round_to_nearest_where_it_matters():
    W = gaussian(128, 512)
    for nbits, share in ((4, 0.86), (3, 0.78), (2, 0.52)):
        spec = QuantSpec(nbits=nbits)
        assert squared_error(W, spec).sum() < share * squared_error(W, nearest(spec)).sum()


@pytest.mark.parametrize("zero", ZERO_MODES)
def test_energies_buy_error_where_the_energy_is(zero):
    W, energy = gaussian(128, 512), energies(512)
    spec = QuantSpec(nbits=3, zero=zero)
    plain = (W - quantize(W, spec).dequantize()).square() @ energy
    assert squared_error(W, spec, energy).sum() < 0.85 * plain.sum()


@pytest.mark.parametrize("zero", ZERO_MODES)
def test_only_the_proportions_of_energies_count(zero):
    W, energy = gaussian(40, 128), energies(128)
    one, other = (quantize(W, QuantSpec(zero=zero), energy=energy * 2.0**n) for n in (0, -90))
    assert torch.equal(one.W_q, other.W_q)
    assert torch.equal(one.scale, other.scale)
    same, none = quantize(W, QuantSpec(zero=zero), energy=torch.zeros(128)), quantize(W, QuantSpec(zero=zero))
    assert torch.equal(same.W_q, none.W_q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero", ZERO_MODES)
def test_factors_are_those_of_a_weight_multiplied_before(zero, dtype):
    W, columns, rows = gaussian(48, 256).to(dtype), energies(256, spread=0.5), energies(48, seed=1, spread=0.5)
    spec, H = QuantSpec(zero=zero), energies(256, seed=2)
    ours = quantize(W, spec, energy=H, columns=columns, rows=rows)
    before = quantize(W.float() * columns * rows[:, None], spec, energy=H)
    assert torch.equal(ours.W_q, before.W_q)
    assert torch.equal(ours.scale, before.scale)
    assert ours.squared_error == before.squared_error
    one_sided = quantize(W, spec, rows=rows)
    assert torch.equal(one_sided.W_q, quantize(W.float() * rows[:, None], spec).W_q)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"columns": torch.ones(65)}, r"W: factors of shape \(65,\): wanted 64 positive ones"),
        ({"rows": torch.zeros(4)}, r"W: factors of shape \(4,\): wanted 4 positive ones"),
        ({"columns": torch.full((64,), torch.nan)}, "wanted 64 positive ones"),
        ({"columns": torch.full((64,), 3e38)}, "W: weights up to 4 times their factors overflow float32"),
    ],
)
def test_factors_that_are_none_are_refused(factors, message):
    with pytest.raises(TensorError, match=message):
        quantize(torch.full((4, 64), 4.0), QuantSpec(), **factors)


def test_factors_are_for_groups_along_the_inputs():
    with pytest.raises(TensorError, match=r"factors for weights of shape \(64, 8\), axis 0: wanted a matrix, axis 1"):
        quantize(torch.ones(64, 8), QuantSpec(axis=0), rows=torch.ones(64))


def test_each_expert_has_its_own_energies():
    W, energy = gaussian(3 * 40, 128).view(3, 40, 128), energies(3 * 128).view(3, 128)
    fused = quantize(W, QuantSpec(), energy=energy)
    alone = [quantize(W[i], QuantSpec(), energy=energy[i]) for i in range(3)]
    assert torch.equal(fused.W_q, torch.cat([expert.W_q for expert in alone]))
    assert torch.equal(fused.scale, torch.cat([expert.scale for expert in alone]))


def test_energies_make_no_difference_within_a_column():
    W, spec = gaussian(64, 48), QuantSpec(axis=0, group_size=32)
    assert torch.equal(quantize(W, spec, energy=energies(48)).W_q, quantize(W, spec).W_q)


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (torch.ones(64), r"up_proj: energy of shape \(64,\) for weights of shape \(8, 128\)"),
        (torch.tensor([-1.0] + [1.0] * 127), r"up_proj: 1 of 128 energies are negative, NaN or infinite"),
        (torch.tensor([float("nan")] * 2 + [1.0] * 126), r"up_proj: 2 of 128 energies are negative, NaN or infinite"),
    ],
)
def test_energies_that_are_none_are_refused(energy, message):
    with pytest.raises(TensorError, match=message):
        quantize(torch.zeros(8, 128), QuantSpec(), energy=energy, name="up_proj")


@given(spec=specs, seed=st.integers(0, 100))
def test_stored_values_are_the_ones_that_were_solved(spec, seed):
    q = quantize(gaussian(8, 32, seed), spec)
    assert q.scale.dtype == TORCH_DTYPES[spec.scale_dtype]
    assert q.zero.dtype == (torch.float32 if spec.zero == "offset" else q.scale.dtype)
    assert (q.scale > 0).all()
    assert q.W_q.max() <= spec.max_code
    if spec.zero == "int":
        assert (q.zero == q.zero.round()).all()
        assert ((q.zero >= 0) & (q.zero <= spec.max_code)).all()
    if spec.zero == "none":
        assert (q.zero == spec.middle).all()
    if spec.zero == "offset":
        exact = -q.zero.double() * q.scale.double()
        assert ((exact - q.offset.double()).abs() <= exact.abs() * 2**-22).all()
    residual = gaussian(8, 32, seed).double() - q.dequantize(torch.float64)
    assert q.squared_error == pytest.approx(residual.square().sum().item(), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("zero", ZERO_MODES)
@pytest.mark.parametrize(
    "group",
    [
        [0.0] * 16, [1.5] * 16, [-1.5] * 16, [0.0] * 15 + [1e4], [1e-40] * 16, [1e-40, -3e-41] * 8, [1e30, -1e30] * 8,
        [1e-20, 2e-20] * 8, [1000.0, 1000.5] * 8, [3.0e38] * 16, [0.0] * 15 + [1e-30],
    ],
    ids=["zeros", "constant", "negative", "outlier", "subnormal", "subnormals", "huge", "tiny", "offset", "top", "speck"],
)  # fmt: skip
def test_hard_groups_stay_finite(group, zero, scale_dtype):
    W = torch.tensor([group], dtype=torch.float32)
    if zero == "offset":
        W /= 4  # a reader adds q * scale to it, and either may be larger than the weight
    for nbits in NBITS:
        for energy in (None, torch.tensor([1e30] + [0.0] * 14 + [1e-30]), torch.zeros(16)):
            spec = QuantSpec(nbits=nbits, group_size=None, zero=zero, scale_dtype=scale_dtype)
            q = quantize(W, spec, energy=energy)
            assert torch.isfinite(q.dequantize()).all()
            assert np.isfinite(q.squared_error)


def test_weights_that_would_overflow_when_rounded_are_refused():
    W = torch.full((64, 64), 65504.0, dtype=torch.float16)
    W[::2] = -65504.0
    W[3::7, 5::3] *= 0.9
    with pytest.raises(
        TensorError, match=r"W: weights up to 65504 leave torch.float16 \(up to 65504\) no room for rounding"
    ):
        quantize(W, QuantSpec(nbits=3))


@pytest.mark.parametrize("value", [1.5, -1.5, 0.0])
@pytest.mark.parametrize("zero", ["float", "offset", "int"])
def test_constant_groups_are_exact(value, zero):
    W = torch.full((2, 64), value)
    assert torch.equal(quantize(W, QuantSpec(zero=zero)).dequantize(), W)


@given(seed=st.integers(0, 100), exponent=st.integers(-20, 20), zero=st.sampled_from(ZERO_MODES))
def test_scaling_by_a_power_of_two_scales_the_answer(seed, exponent, zero):
    spec = QuantSpec(nbits=3, zero=zero, scale_dtype="float32")
    W = gaussian(4, 64, seed)
    one, other = quantize(W, spec), quantize(W * 2.0**exponent, spec)
    assert torch.equal(one.W_q, other.W_q)
    assert torch.equal(one.scale * 2.0**exponent, other.scale)


@given(seed=st.integers(0, 100), shift=st.integers(-8, 8), weighted=st.booleans())
def test_shifting_a_group_shifts_its_zero(seed, shift, weighted):
    """Weights on a grid of 2^-12, so that the shift is exact; the answer is as good, but for float32."""
    W = (gaussian(4, 64, seed, scale=0.2) * 2**12).round() / 2**12
    spec, energy = (
        QuantSpec(nbits=3, iters=5, starts=8, scale_dtype="float32"),
        energies(64, seed, 1.0) if weighted else None,
    )
    one, other = squared_error(W, spec, energy), squared_error(W + shift / 4, spec, energy)
    assert other.sum() == pytest.approx(one.sum().item(), rel=0.02)


@pytest.mark.parametrize("group_size", [32, 48, None])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_any_size_of_tiles_gives_the_same_answer(weighted, axis, group_size, monkeypatch):
    W, energy = gaussian(96, 480).bfloat16(), energies(480) if weighted else None
    answers = []
    for size in (1, 5000, 1 << 18):
        monkeypatch.setattr("hqq_core.solver._cpu.MIN_TILE_NUMEL", size)
        monkeypatch.setattr("hqq_core.solver._cpu.MAX_TILE_NUMEL", size)
        answers.append(quantize(W, QuantSpec(axis=axis, group_size=group_size), energy=energy))
    for other in answers[1:]:
        assert torch.equal(answers[0].W_q, other.W_q)
        assert torch.equal(answers[0].scale, other.scale)
        assert torch.equal(answers[0].zero, other.zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
def test_any_number_of_threads_gives_the_same_answer(axis, dtype):
    W = gaussian(1024, 640).to(dtype)
    one, two, five = (quantize(W, QuantSpec(nbits=4, axis=axis), threads=n) for n in (1, 2, 5))
    for other in (two, five):
        assert torch.equal(one.W_q, other.W_q)
        assert torch.equal(one.scale, other.scale)
        assert torch.equal(one.zero, other.zero)
        assert (one.squared_error, one.squared_norm) == (other.squared_error, other.squared_norm)


def test_axis_0_groups_strided_rows_as_hqq_does():
    W = gaussian(128, 48)
    q = quantize(W, QuantSpec(nbits=4, axis=0, group_size=32))
    assert q.W_q.shape == (32, 128 * 48 // 32)
    assert q.scale.shape == (1, 128 * 48 // 32)
    transposed = quantize(W.reshape(32, -1).T.contiguous(), QuantSpec(nbits=4, axis=1, group_size=32))
    assert torch.equal(q.W_q.T, transposed.W_q)
    assert (q.dequantize(torch.float32) - W).norm() / W.norm() < 0.12


@pytest.mark.parametrize("group_size", [64, 48, 3])
def test_group_size_must_divide(group_size):
    with pytest.raises(SpecError, match=f"group_size {group_size} does not divide 100"):
        quantize(torch.zeros(2, 100), QuantSpec(group_size=group_size))


def test_weights_that_are_not_finite_are_counted_and_named():
    W = gaussian(512, 512)
    W[3, 4] = W[400, 1] = float("nan")
    W[5, 6] = -float("inf")
    with pytest.raises(TensorError, match=r"q_proj: 2 NaN and 1 infinite among 262144 weights") as caught:
        quantize(W, QuantSpec(), name="q_proj")
    assert caught.value.tensor == "q_proj"


def test_other_dtypes_are_refused():
    with pytest.raises(TensorError, match=r"W: dtype torch.int8: wanted one of torch.float32"):
        quantize(torch.zeros(2, 64, dtype=torch.int8), QuantSpec())


def test_what_progress_raises_stops_the_work():
    class Enough(Exception):
        pass

    def progress(numel: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        quantize(gaussian(2048, 512), QuantSpec(), progress=progress)
