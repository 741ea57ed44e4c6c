"""What a model's tensors are to their layers, and what quantizing them cost, group by group and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hqq_core.architectures import Role, role
from hqq_core.metrics import bits_per_weight, relative_error
from hqq_core.plan import Plan, TensorPlan
from hqq_core.results import ShardResult

OTHER = "other linear layers"
_PROJECTIONS = {
    "q": ("q_proj", "q_a_proj", "q_b_proj", "query", "wq"),
    "k": ("k_proj", "key", "wk"),
    "v": ("v_proj", "value", "wv"),
    "k, v": ("kv_a_proj_with_mqa", "kv_b_proj"),
    "q, k, v": ("qkv_proj", "query_key_value", "Wqkv", "W_pack"),
    "o": ("o_proj", "out_proj", "attention.output.dense", "attention.dense", "self_attention.dense"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "fc1", "dense_h_to_4h", "w3", "intermediate.dense"),
    "gate, up": ("gate_up_proj",),
    "down": ("down_proj", "fc2", "dense_4h_to_h", "w2", "output.dense"),
}
_ROLES = {
    Role.EXPERT: "experts", Role.ROUTER: "routers", Role.EMBEDDING: "embeddings", Role.HEAD: "output head", Role.NORM: "norms",
    Role.CONV1D: "Conv1D", Role.FUSED: "convolutions, fused experts",
}  # fmt: skip
_ENDINGS = {ending: group for group, endings in _PROJECTIONS.items() for ending in endings}
_ORDER = (*_PROJECTIONS, OTHER, *_ROLES.values(), "biases and others")


def group_of(name: str, shape: tuple[int, ...], config: dict[str, Any]) -> str:
    """One of a few names of our own: a projection of attention or of the feed-forward part, experts, embeddings, norms, ..."""
    kind = role(name, shape, config)
    if kind is Role.LINEAR:
        parts = name.split(".")[:-1]
        endings = (".".join(parts[-n:]) for n in (3, 2, 1))
        return next((_ENDINGS[ending] for ending in endings if ending in _ENDINGS), OTHER)
    if (
        kind is Role.VECTOR
        and name.endswith(".weight")
        and "norm" in name.rpartition(".")[0].rpartition(".")[2].lower()
    ):
        return _ROLES[Role.NORM]
    return _ROLES.get(kind, _ORDER[-1])


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack of layers that a tensor lies in, and which of them; None outside."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isascii() and part.isdecimal() and len(part) < 7:
            return ".".join(parts[:i]), int(part)
    return None


@dataclass(frozen=True, slots=True)
class Measured:
    """One tensor: where it belongs, its bytes, and what was lost; errors are those of TensorResult, 0 where it was copied."""

    group: str
    layer: tuple[str, int] | None
    quantized: bool
    numel: int
    nbytes_in: int
    nbytes_out: int
    squared_error: float
    squared_norm: float


def measured(plan: Plan, results: Iterable[ShardResult], config: dict[str, Any]) -> list[Measured]:
    """Every tensor of a plan, in its order."""
    found = {tensor.name: (tensor.squared_error, tensor.squared_norm) for r in results for tensor in r.tensors}
    return [_measured(tensor, found.get(tensor.name, (0.0, 0.0)), config) for tensor in plan.tensors]


def _measured(tensor: TensorPlan, errors: tuple[float, float], config: dict[str, Any]) -> Measured:
    return Measured(
        group_of(tensor.name, tensor.shape, config),
        layer_of(tensor.name),
        tensor.spec is not None,
        math.prod(tensor.shape),
        tensor.nbytes_in,
        tensor.nbytes_out,
        *errors,
    )


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of one kind that were all quantized, or all copied; sums."""

    name: str
    tensors: tuple[Measured, ...]

    @property
    def quantized(self) -> bool:
        """Else copied."""
        return self.tensors[0].quantized

    @property
    def nbytes(self) -> tuple[int, int]:
        """In the source, and in the result."""
        return sum(tensor.nbytes_in for tensor in self.tensors), sum(tensor.nbytes_out for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """As stored, scales, zeros and all."""
        return bits_per_weight(self.nbytes[1], sum(tensor.numel for tensor in self.tensors))

    @property
    def relative_error(self) -> float | None:
        """Of all weights together; see `metrics.relative_error`."""
        return error_of(self.tensors)


def groups_of(tensors: Iterable[Measured]) -> list[Group]:
    """By name and by whether they were quantized, in the order of a layer."""
    found: dict[tuple[str, bool], list[Measured]] = {}
    for tensor in tensors:
        found.setdefault((tensor.group, tensor.quantized), []).append(tensor)
    keys = sorted(found, key=lambda key: (not key[1], _ORDER.index(key[0])))
    return [Group(key[0], tuple(found[key])) for key in keys]


def error_of(tensors: Iterable[Measured]) -> float | None:
    """Relative Frobenius error of some weights together."""
    pairs = [(tensor.squared_error, tensor.squared_norm) for tensor in tensors]
    return relative_error(sum(error for error, _ in pairs), sum(norm for _, norm in pairs))
