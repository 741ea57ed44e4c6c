"""Column by column with error feedback (GPTQ), on second moments of real text or of random tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from hqq_core import QuantSpec, quantize
from tests.benchmarks import inputs
from tests.benchmarks.subjects import Subject

Grid = Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


def gptq(
    subject: Subject, names: list[str], spec: QuantSpec, ids: torch.Tensor, damp: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """GPTQ as published (arXiv 2210.17323), block by block on what the quantized blocks before give, in float32.

    Parameters
    ----------
    spec : QuantSpec
        How each group's scale and zero are found when its first column is reached; weighted by the moments' diagonal unless
        `spec` is round to nearest (iters 0).
    ids : Tensor [shape=(n_windows, length)]
        Tokens whose second moments are the Hessian.
    damp : float
        Share of the mean diagonal that is added to the diagonal.
    """
    wanted = set(names)
    for own, moments in inputs.block_by_block(subject, ids):
        for name in own:
            if name in wanted:
                yield name, feed_back(subject.source[name].float(), moments.get(name), spec, damp)
                wanted.remove(name)
    for name in sorted(wanted):  # outside the blocks: no moments
        yield name, quantize(subject.source[name], spec).dequantize(torch.float32)


def feed_back(W: torch.Tensor, moment: torch.Tensor | None, spec: QuantSpec, damp: float) -> torch.Tensor:
    """Weights rounded one column after the other, the error of each spread over the columns that are still to come."""
    assert spec.group_size
    W, W_r = W.clone(), torch.empty_like(W)
    H = torch.eye(W.shape[1]) if moment is None else moment / moment.diagonal().mean().clamp_min(1e-30)
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    energy = None if spec.iters == 0 else H.diagonal().clone()
    H += damp * torch.eye(len(H))
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for start in range(0, W.shape[1], spec.group_size):
        group = slice(start, start + spec.group_size)
        fitted = quantize(W[:, group].contiguous(), spec, energy=None if energy is None else energy[group])
        scale, zero = (part.float().flatten() for part in (fitted.scale, fitted.zero))
        errors = torch.empty(len(W), spec.group_size)
        for i in range(spec.group_size):
            column = start + i
            q = (W[:, column] / scale + zero).round().clamp(0, spec.max_code)
            W_r[:, column] = (q - zero) * scale
            errors[:, i] = (W[:, column] - W_r[:, column]) / U[column, column]
            W[:, column : group.stop] -= torch.outer(errors[:, i], U[column, column : group.stop])
        W[:, group.stop :] -= errors @ U[group, group.stop :]
    return W_r


def awq(subject: Subject, names: list[str], spec: QuantSpec, ids: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """AWQ's search (arXiv 2306.00978), as an approximation: scales rms(x)^alpha of the columns, the best of 20 alphas by the
    error of each linear's own output, for every linear alone, whether or not a norm before it could hold them; no clipping.
    """
    wanted = set(names)
    for own, moments in inputs.block_by_block(subject, ids):
        for name in own:
            if name in wanted:
                yield name, scaled(subject.source[name].float(), moments.get(name), spec)
                wanted.remove(name)
    for name in sorted(wanted):
        yield name, quantize(subject.source[name], spec).dequantize(torch.float32)


def scaled(W: torch.Tensor, moment: torch.Tensor | None, spec: QuantSpec, steps: int = 20) -> torch.Tensor:
    """The dequantized weight whose output errs least, over column scales x^(i / steps) with x the inputs' root mean squares."""
    H = torch.eye(W.shape[1]) if moment is None else moment
    x = H.diagonal().sqrt().clamp_min(1e-4 * H.diagonal().max().sqrt())
    energy = H.diagonal() / H.diagonal().mean() if spec.iters else None
    best, least = W, torch.inf
    for i in range(steps):
        s = x ** (i / steps)
        s = s / (s.max() * s.min()).sqrt()
        h = None if energy is None else energy / s.square()
        W_r = quantize(W * s, spec, energy=h).dequantize(torch.float32) / s
        error = W_r - W
        loss = ((error @ H) * error).sum().item()
        if loss < least:
            best, least = W_r, loss
    return best
