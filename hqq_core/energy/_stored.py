"""Which tensors of a checkpoint each parameter of a model is made of, by transformers' own rules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hqq_core.errors import EnergyError

Fed = tuple[tuple[str, ...], int | None]  # names of stored tensors, and whose slice of them where they hold all experts


@dataclass(slots=True)
class Stored:
    """How one parameter lies in the checkpoint: tensors by source pattern, in the order of the experts."""

    name: str
    tensors: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    converter: Any = None

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [name for names in self.tensors.values() for name in names]

    def fed(self, expert: int | None) -> Fed:
        """What the input of this parameter, or of one expert's part of it, is also the input of."""
        if expert is None:
            return tuple(self.names), None
        if all(len(names) > 1 for names in self.tensors.values()):
            return tuple(names[expert] for names in self.tensors.values()), None
        return tuple(self.names), expert


def stored_parameters(model: Any, names: list[str]) -> dict[str, Stored]:
    """Which stored tensors each parameter is made of, by transformers' own rules."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    tensors = dict(named_tensors(model))
    stored: dict[str, Stored] = {}
    for name in sorted(names, key=dot_natural_key):  # the order in which transformers stacks experts
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, tensors)
        if target not in tensors:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, tensors)
        if target not in tensors:
            continue
        converter = by_pattern[pattern] if pattern else None
        for other in converter.target_patterns if converter else [""]:
            part = target.replace(converter.target_patterns[0], other, 1) if converter else target
            parameter = stored.setdefault(part, Stored(part, converter=converter))
            parameter.tensors[pattern or name].append(name)
    tied = {id(tensors[name]) for name in stored}
    for name, tensor in tensors.items():
        if tensor.is_meta and id(tensor) not in tied:
            _do_without(model, name, tensor)
    return stored


def _do_without(model: Any, name: str, tensor: torch.Tensor) -> None:
    """Zeros for the pooler that many encoders' checkpoints lack and nothing depends on; else an EnergyError."""
    if "pooler" not in name:
        raise EnergyError(f"{name}: not in the checkpoint")
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, torch.nn.Parameter(torch.zeros(tensor.shape), requires_grad=False))


def named_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and buffers that checkpoints keep, by every name they go by: tied ones come more than once."""
    kept = model.state_dict(keep_vars=True).keys()
    yield from model.named_parameters(remove_duplicate=False)
    yield from (item for item in model.named_buffers(remove_duplicate=False) if item[0] in kept)
