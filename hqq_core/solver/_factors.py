"""Factors of columns and rows, which a model takes back elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hqq_core.errors import TensorError


class Factors(NamedTuple):
    """Of columns and rows, all positive."""

    columns: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(
        cls, columns: torch.Tensor | None, rows: torch.Tensor | None, W: torch.Tensor, axis: int, name: str
    ) -> Factors:
        """Ones where there are none; a TensorError where they do not fit W."""
        if W.ndim != 2 or axis != 1:
            raise TensorError(
                name, f"factors for weights of shape {tuple(W.shape)}, axis {axis}: wanted a matrix, axis 1"
            )
        found = [
            torch.ones(n) if factors is None else factors.float()
            for n, factors in zip((W.shape[1], W.shape[0]), (columns, rows), strict=True)
        ]
        for n, factors in zip((W.shape[1], W.shape[0]), found, strict=True):
            if factors.shape != (n,) or not (factors.isfinite() & (factors > 0)).all():
                raise TensorError(name, f"factors of shape {tuple(factors.shape)}: wanted {n} positive ones")
        return cls(*found)
