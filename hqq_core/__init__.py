"""Calibration-free quantization of safetensors checkpoints with the half-quadratic (HQQ) solver.

Names are loaded when they are first used, so that importing the package stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hqq_core.checkpoint import Checkpoint as Checkpoint
    from hqq_core.convert import finish_checkpoint as finish_checkpoint
    from hqq_core.convert import quantize_checkpoint as quantize_checkpoint
    from hqq_core.convert import quantize_shard as quantize_shard
    from hqq_core.errors import HalfquadError as HalfquadError
    from hqq_core.formats import FORMATS as FORMATS
    from hqq_core.outputs import output_folders as output_folders
    from hqq_core.plan import Plan as Plan
    from hqq_core.plan import TensorPlan as TensorPlan
    from hqq_core.plan import build_plan as build_plan
    from hqq_core.plan import build_plans as build_plans
    from hqq_core.provenance import Provenance as Provenance
    from hqq_core.recipe import Recipe as Recipe
    from hqq_core.results import Manifest as Manifest
    from hqq_core.results import ShardResult as ShardResult
    from hqq_core.solver import quantize as quantize
    from hqq_core.spec import QuantSpec as QuantSpec
    from hqq_core.tensors import QuantizedTensor as QuantizedTensor
    from hqq_core.verify import Verified as Verified
    from hqq_core.verify import verify_folder as verify_folder

_HOMES = {
    "Checkpoint": "checkpoint",
    "FORMATS": "formats",
    "HalfquadError": "errors",
    "Manifest": "results",
    "Plan": "plan",
    "Provenance": "provenance",
    "QuantSpec": "spec",
    "QuantizedTensor": "tensors",
    "Recipe": "recipe",
    "ShardResult": "results",
    "TensorPlan": "plan",
    "Verified": "verify",
    "build_plan": "plan",
    "build_plans": "plan",
    "finish_checkpoint": "convert",
    "output_folders": "outputs",
    "quantize": "solver",
    "quantize_checkpoint": "convert",
    "quantize_shard": "convert",
    "verify_folder": "verify",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
