"""One tensor of a result held against what was solved and, where there is one, against its source."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hqq_core.checkpoint import CONFIG
from hqq_core.errors import VerificationError
from hqq_core.verify._expected import Expected
from hqq_core.verify._matrix import Matrix
from hqq_core.verify._source import Source
from hqq_core.verify._weights import StoredTensor

BLOCK_NUMEL = 1 << 17  # a second-level cache holds a block's floats
BLOCK_ROWS = 8  # blocks are of whole words in any layout

# What two computations of a float32 error may differ by. Norms lie no further apart than the norm of what the residuals differ
# by (the triangle inequality), and a residual w - (q - z) s is some eight roundings of numbers about as large as |w| or |z s|.
# Squares are added in float32 within a group: n of them to some sqrt(n) 2^-24, of which the norm has half.
ROUNDINGS = 8 * 2.0**-24
SUMMATION = 1e-4

Count = Callable[[int], None]


def check_quantized(
    read: Callable[[], Matrix], expected: Expected, source: Source | None, count: Count
) -> float | None:
    """Digest and error of a weight; with a source, how far its relative error is from the reported one.

    Raises
    ------
    VerificationError
        Names the tensor.
    """
    try:
        return _check_matrix(read(), expected, source, count)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # of settings that no layout has
        reason = f"{type(error).__name__}: {error}"
        raise VerificationError(expected.name, f"cannot be read as {CONFIG} has it: {reason}") from error


def _check_matrix(matrix: Matrix, expected: Expected, source: Source | None, count: Count) -> float | None:
    if matrix.shape != expected.shape:
        raise VerificationError(expected.name, f"shape {matrix.shape}: wanted {expected.shape}")
    n_rows, n_columns = math.prod(matrix.shape[:-1]), matrix.shape[-1]
    step = max(BLOCK_NUMEL // n_columns // BLOCK_ROWS, 1) * BLOCK_ROWS
    weights = source.rows(expected, step) if source else None
    digest, squared_error, squared_norm = hashlib.sha256(), 0.0, 0.0
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        stored = matrix.stored(start, stop)
        digest.update(np.ascontiguousarray(stored).data)
        if weights:
            with np.errstate(over="ignore", invalid="ignore"):  # what damaged scales and factors make of it
                W = next(weights)
                squared_norm += _squared_norm(W)
                W -= matrix.values(stored, start)
                squared_error += _squared_norm(W)
        count((stop - start) * n_columns)
    for part in matrix.trailer():
        digest.update(np.ascontiguousarray(part, part.dtype.newbyteorder("<")).data)
    check_digest(expected, digest.hexdigest(), "what was solved")
    if not source:
        return None
    return _check_error(expected, squared_error, squared_norm, matrix.shift_norm())


def check_copied(stored: StoredTensor, expected: Expected, source: Source | None, count: Count) -> None:
    """Type, shape, digest and, with a source, bytes of a tensor that was not quantized; those of a folded one changed."""
    found, wanted = (stored.dtype, stored.shape), (expected.dtype, expected.shape)
    if found != wanted:
        raise VerificationError(expected.name, f"{found[0]} of shape {found[1]}: wanted {wanted[0]} of {wanted[1]}")
    digest = hashlib.sha256()
    for piece in stored.pieces():
        digest.update(piece)
        count(len(piece))
    check_digest(expected, digest.hexdigest(), "what was copied" if not expected.folded else "what was folded")
    if source and not expected.folded:
        check_bytes(expected, digest.digest(), source, count)


def check_bytes(expected: Expected, digest: bytes, source: Source, count: Count) -> None:
    """A VerificationError unless the source's bytes have this SHA-256."""
    same = hashlib.sha256()
    for piece in source.pieces(expected):
        same.update(piece)
        count(len(piece))
    if same.digest() != digest:
        raise VerificationError(expected.name, "its bytes are not the source's: wanted a copy")


def check_digest(expected: Expected, digest: str, what: str) -> None:
    """A VerificationError unless the report has this one."""
    if digest != expected.digest:
        raise VerificationError(expected.name, f"digest {digest[:16]}: wanted {expected.digest[:16]}, of {what}")


def _check_error(expected: Expected, squared_error: float, squared_norm: float, shift_norm: float) -> float:
    """How far the relative error is from the reported one, where no further than rounding explains."""
    assert expected.squared_error is not None, "quantized"
    assert expected.squared_norm is not None, "quantized"
    norm, reported_norm = math.sqrt(squared_norm), math.sqrt(expected.squared_norm)
    error, reported = math.sqrt(squared_error), math.sqrt(expected.squared_error)
    if not abs(norm - reported_norm) <= (ROUNDINGS + SUMMATION) * norm:
        raise VerificationError(expected.name, f"norm {norm:.7g} in the source: wanted {reported_norm:.7g}, as solved")
    if not abs(error - reported) <= ROUNDINGS * (norm + shift_norm) + SUMMATION * reported:
        raise VerificationError(
            expected.name, f"error {error:.7g} against the source: wanted {reported:.7g}, as reported"
        )
    return abs(error - reported) / norm if norm else 0.0


def _squared_norm(values: NDArray[np.float32]) -> float:
    return float(np.square(values).sum())  # numpy adds in pairs
