"""Other calibration-free quantizers, run beside ours from where they are installed or checked out; none of their code is here."""

from __future__ import annotations

import ast
import importlib
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.benchmarks.subjects import Subject
from tests.oracles import hqq as library


def hqq(
    subject: Subject, names: list[str], nbits: int, group_size: int, dtype: str = "float32"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hqq 0.2.8 along axis 1 with the settings of its BaseQuantizeConfig; `dtype` holds and applies scale and zero."""
    quantizer = library("core.quantize").Quantizer
    for name in names:
        W_q, meta = quantizer.quantize(
            subject.source[name], nbits=nbits, group_size=group_size, axis=1, optimize=True, device="cpu",
            compute_dtype=getattr(torch, dtype), round_zero=nbits == 4,
        )  # fmt: skip
        scale, zero = (meta[key].to(getattr(torch, dtype)) for key in ("scale", "zero"))
        yield name, quantizer.dequantize(W_q, meta | {"scale": scale, "zero": zero}).view_as(subject.source[name])


def with_growing_beta(solved: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """What hqq's main branch mended after 0.2.8 (pull request 174): beta grows by kappa in every iteration."""
    while True:
        with _growing_beta():
            item = next(solved, None)
        if item is None:
            return
        yield item


@contextmanager
def _growing_beta(kappa: float = 1.01) -> Iterator[None]:
    optimize = library("core.optimize")
    step, count = optimize.optimize_weights_proximal_legacy_step, itertools.count()

    def growing(W: Any, scale: Any, zero: Any, min_max: Any, beta: float, *rest: Any) -> Any:
        return step(W, scale, zero, min_max, beta * kappa ** next(count), *rest)

    optimize.optimize_weights_proximal_legacy_step = growing
    try:
        yield
    finally:
        optimize.optimize_weights_proximal_legacy_step = step


def sinq(
    subject: Subject, names: list[str], nbits: int, group_size: int, checkout: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """SINQ (arXiv 2509.22944) as its repository does it on a CPU: 1D tiles, float32, gate on kurtosis and all."""
    quantizer = _sinq(checkout, "quantizer").Quantizer
    for name in names:
        W = subject.source[name]
        W_q, meta = quantizer.quantize(
            W, None, nbits=nbits, group_size=group_size, axis=1, bitpack=False, device="cpu", compute_dtype=torch.float32
        )  # fmt: skip
        yield name, quantizer.dequantize(W_q.float(), meta)


def fold_presinq(subject: Subject, checkout: Path, group_size: int, n_iter: int, n_repeat: int) -> None:
    """Pre-SINQ of SINQ's repository: Sinkhorn scales of the columns folded into norms and the rows before, in the model."""
    layers = getattr(getattr(subject.model, "model", None), "layers", [])
    if not layers or not hasattr(getattr(layers[0], "mlp", None), "up_proj"):
        raise NotApplicableError(f"pre-SINQ folds layers named as in Llama and Qwen: {subject.name} has others")
    script = checkout / "presinq_models_generation" / "presinq_hqq.py"  # imports what only its main part needs
    wanted = {"find_block", "get_sink_scale", "absorb_sink_scale_qwen", "pre_sinq_qwen3"}
    functions = [f for f in ast.parse(script.read_text()).body if isinstance(f, ast.FunctionDef) and f.name in wanted]
    sinkhorn = _sinq(checkout, "sinkhorn").sinkhorn_log
    scope: dict[str, Any] = {"torch": torch, "tqdm": lambda rows, **_: rows, "sinkhorn_log": sinkhorn}
    exec(compile(ast.Module(functions, []), str(script), "exec"), scope)
    with (
        torch.no_grad(),
        mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor),
    ):  # it is written for a GPU and needs none
        scope["pre_sinq_qwen3"](subject.model, group_size=group_size, n_iter=n_iter, n_repeat=n_repeat)


class NotApplicableError(Exception):
    """A method that does not know this kind of model."""


def _sinq(checkout: Path, module: str) -> Any:
    """A module of a checkout of SINQ; its AWQ part wants `datasets`, which only that part uses."""
    if not (checkout / "sinq" / "sinkhorn.py").is_file():
        raise SystemExit(f"--sinq {checkout}: no checkout of SINQ there")
    unused, path = {"datasets": mock.Mock()}, [str(checkout), *sys.path]
    with mock.patch.dict(sys.modules, unused), mock.patch.object(sys, "path", path):
        return importlib.import_module(f"sinq.{module}")
