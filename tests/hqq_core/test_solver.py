"""The kernel against the equations, and against round to nearest, for any group."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hqq_core import QuantSpec, quantize
from hqq_core.errors import SpecError, TensorError
from hqq_core.solver import _reference
from hqq_core.spec import NBITS, SCALE_DTYPES, ZERO_MODES
from hqq_core.tensors import TORCH_DTYPES

specs = st.builds(
    QuantSpec,
    nbits=st.sampled_from(NBITS),
    group_size=st.just(None),
    zero=st.sampled_from(ZERO_MODES),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
)


def gaussian(rows: int, columns: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def squared_error(W: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Per group of axis 1, from the stored values, in float64."""
    q = quantize(W, spec)
    residual = W.double().reshape(q.W_q.shape) - (q.W_q.double() - q.zero.double()) * q.scale.double()
    return residual.square().sum(1)


@pytest.mark.parametrize("lp_norm", [2.0, 0.7])
@pytest.mark.parametrize("zero", ZERO_MODES)
@pytest.mark.parametrize("nbits", NBITS)
def test_kernel_agrees_with_the_reference(nbits, zero, lp_norm):
    spec = QuantSpec(nbits=nbits, group_size=64, zero=zero, lp_norm=lp_norm)
    W = gaussian(64, 256)
    ours = quantize(W, spec)
    codes, scale, zeros = _reference.solve(W.double().numpy().reshape(-1, 64), spec)
    # A rounding tie that falls otherwise in float32 sends a group along another path: rare, and as good.
    same = (ours.scale[:, 0].double().numpy() == scale) & (ours.zero[:, 0].double().numpy() == zeros)
    assert same.mean() > 0.97
    assert (ours.W_q.numpy() != codes)[same].mean() < 1e-4
    expected = (W.double().numpy().reshape(-1, 64) - (codes - zeros[:, None]) * scale[:, None]) ** 2
    assert ours.squared_error == pytest.approx(expected.sum(), rel=0.002)


@given(
    spec=specs, seed=st.integers(0, 1000), columns=st.sampled_from([1, 2, 7, 8, 64, 65]), exponent=st.integers(-12, 3)
)
def test_never_worse_than_round_to_nearest(spec, seed, columns, exponent):
    W = gaussian(5, columns, seed, scale=10.0**exponent) + 10.0**exponent * (seed % 3)
    nearest = QuantSpec(**{**spec.to_dict(), "iters": 0})
    solved, rounded = squared_error(W, spec), squared_error(W, nearest)
    float32_noise = columns * (W.abs().amax(1).double() * 2**-21).square()  # errors below it are not told apart
    assert (solved <= rounded * (1 + 1e-4) + float32_noise).all()


def test_least_squares_beats_round_to_nearest_where_it_matters():
    W = gaussian(128, 512)
    for nbits, share in ((4, 0.92), (3, 0.82), (2, 0.56)):
        solved = squared_error(W, QuantSpec(nbits=nbits)).sum()
        assert solved < share * squared_error(W, QuantSpec(nbits=nbits, iters=0)).sum()


@given(spec=specs, seed=st.integers(0, 100))
def test_stored_values_are_the_ones_that_were_solved(spec, seed):
    q = quantize(gaussian(8, 32, seed), spec)
    assert q.scale.dtype == q.zero.dtype == TORCH_DTYPES[spec.scale_dtype]
    assert (q.scale > 0).all()
    assert q.W_q.max() <= spec.max_code
    if spec.zero == "int":
        assert (q.zero == q.zero.round()).all()
        assert ((q.zero >= 0) & (q.zero <= spec.max_code)).all()
    if spec.zero == "none":
        assert (q.zero == spec.middle).all()
    residual = gaussian(8, 32, seed).double() - q.dequantize(torch.float64)
    assert q.squared_error == pytest.approx(residual.square().sum().item(), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("zero", ZERO_MODES)
@pytest.mark.parametrize(
    "group",
    [
        [0.0] * 16, [1.5] * 16, [-1.5] * 16, [0.0] * 15 + [1e4], [1e-40] * 16, [1e-40, -3e-41] * 8, [1e30, -1e30] * 8,
        [1e-20, 2e-20] * 8, [1000.0, 1000.5] * 8, [3.0e37] * 16, [0.0] * 15 + [1e-30],
    ],
    ids=["zeros", "constant", "negative", "outlier", "subnormal", "subnormals", "huge", "tiny", "offset", "top", "speck"],
)  # fmt: skip
def test_hard_groups_stay_finite(group, zero, scale_dtype):
    W = torch.tensor([group], dtype=torch.float32)
    for nbits in NBITS:
        q = quantize(W, QuantSpec(nbits=nbits, group_size=None, zero=zero, scale_dtype=scale_dtype))
        assert torch.isfinite(q.dequantize()).all()
        assert np.isfinite(q.squared_error)


def test_weights_that_would_overflow_when_rounded_are_refused():
    W = torch.full((64, 64), 65504.0, dtype=torch.float16)
    W[::2] = -65504.0
    W[3::7, 5::3] *= 0.9
    with pytest.raises(TensorError, match=r"W: weights up to 65504 leave torch.float16 \(up to 65504\) no room"):
        quantize(W, QuantSpec(nbits=3))


@pytest.mark.parametrize("value", [1.5, -1.5, 0.0])
@pytest.mark.parametrize("zero", ["float", "int"])
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
