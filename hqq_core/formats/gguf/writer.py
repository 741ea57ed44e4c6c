"""GgufWriter: the format by itself, and for one recipe and one model."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch

from hqq_core.architectures import QUANTIZED, Role
from hqq_core.checkpoint import Checkpoint
from hqq_core.errors import CheckpointError, FormatError, HalfquadError, short
from hqq_core.formats.base import CheckpointWriter, Layout
from hqq_core.formats.gguf.blocks import BLOCK_TYPES, pack
from hqq_core.formats.gguf.container import PLAIN, GgufContainer
from hqq_core.formats.gguf.file_types import CAPABILITIES, file_type_of
from hqq_core.formats.gguf.metadata import Model, add_general
from hqq_core.formats.gguf.mixes import Mix
from hqq_core.formats.gguf.tokenizer import Tokenizer
from hqq_core.recipe import Recipe
from hqq_core.safetensors_file import DTYPES
from hqq_core.spec import QuantSpec
from hqq_core.tensors import QuantizedTensor

if TYPE_CHECKING:
    from gguf import GGUFWriter, TensorNameMap

_SUFFIXES = (".weight", ".bias")
_BUFFERS = ".rotary_emb.inv_freq"  # of old checkpoints: computed, not learned
_PLAIN_DTYPES = {torch.float32: "F32", torch.float64: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class GgufWriter(CheckpointWriter):
    """Writes each weight as rows of blocks, and the model's settings and tokenizer before them.

    Parameters
    ----------
    recipe : Recipe, optional
    checkpoint : Checkpoint, optional
        What `of_recipe` and `of_model` were given; without them there is `check_model` alone.
    """

    name = "gguf"
    capabilities = CAPABILITIES
    quantized = (*QUANTIZED, Role.EMBEDDING, Role.HEAD)

    def __init__(self, recipe: Recipe | None = None, checkpoint: Checkpoint | None = None) -> None:
        self._recipe, self._checkpoint = recipe, checkpoint

    def of_recipe(self, recipe: Recipe) -> Self:
        """Bound to a recipe, which says the file type."""
        return type(self)(recipe)

    def of_model(self, checkpoint: Checkpoint) -> Self:
        """Bound to a model, whose family says names and order of all tensors."""
        Model.of(checkpoint.config)  # refuses a family that is not held
        return type(self)(self._recipe, checkpoint)

    def check_model(self, spec: QuantSpec, quantized: set[Role], copied: set[Role], config: dict[str, Any]) -> None:
        """A family whose graph llama.cpp has and, of a source, a tokenizer that it knows."""
        if self._checkpoint is None:
            Model.of(config)
            return
        if Role.EMBEDDING not in quantized | copied:
            raise FormatError("format", "no token embedding: no causal model")
        if Role.HEAD not in quantized | copied and not self._model.tied:
            raise FormatError("format", "no output head, and config.json ties none to the embedding: no causal model")
        self._check_layers()
        try:
            self.container.header([])
        except HalfquadError:
            raise
        except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as error:
            raise CheckpointError(f"config.json: cannot be told in keys of GGUF: {short(error)}") from error

    def _check_layers(self) -> None:
        """Every layer has the same tensors: llama.cpp's graph looks for them in each, and a source may lack a shard's."""
        found: dict[str, set[str]] = {f"blk.{i}": set() for i in range(self._model.n_layers)}
        for header in self._bound.headers().values():
            for name in header:
                if not self._has_no_place(name):
                    layer, _, rest = self._stored_name(name).partition(".")
                    number, _, part = rest.partition(".")
                    if layer == "blk":
                        found[f"{layer}.{number}"].add(part)
        whole = set().union(*found.values())
        for layer, parts in found.items():
            if missing := sorted(whole - parts):
                raise CheckpointError(f"layer {layer.removeprefix('blk.')} has no {missing[0]}, which others have")

    def tensor_spec(self, spec: QuantSpec, name: str, shape: tuple[int, ...], dtype: str) -> QuantSpec:
        """Settings of the block type that the file type gives this tensor."""
        if self._has_no_place(name):
            return spec
        stored = self._stored_name(name)
        self._model.check_rows(name, shape)
        block_type = self._mix.block_type(stored, shape[-1])
        return spec if block_type is None else dataclasses.replace(spec, **BLOCK_TYPES[block_type].settings)

    def refusal(self, role: Role, shape: tuple[int, ...], spec: QuantSpec) -> str | None:
        """What fills no block, a head that is the embedding, and all that is no linear layer."""
        if role not in self.quantized:
            return str(role.value)
        if role is Role.HEAD and self._model.tied:
            return "tied to the input embedding"
        size = BLOCK_TYPES[block_type_of(spec)].block_size
        return f"{shape[-1]} columns do not fill blocks of {size}" if shape[-1] % size else None

    def layout(self, module: str, shape: tuple[int, ...], dtype: str, spec: QuantSpec) -> Layout:
        """The weight under its GGUF name."""
        return [(self._stored_name(f"{module}.weight"), block_type_of(spec), shape)]

    def encode(self, module: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Rows of blocks, in llama.cpp's order."""
        name = f"{module}.weight"
        rows = torch.from_numpy(pack(block_type_of(tensor.spec), tensor))
        return {self._stored_name(name): self._model.arranged(name, rows)}

    def layout_copied(self, name: str, dtype: str, shape: tuple[int, ...]) -> Layout | None:
        """Vectors as float32, matrices as they are; nothing where the file has no place for it."""
        if self._has_no_place(name):
            return []
        kind = _PLAIN_DTYPES.get(DTYPES[dtype])
        if kind is None:
            raise FormatError("format", f"{name}: {dtype}: format 'gguf' holds {', '.join(PLAIN)}")
        stored = self._stored_name(name)
        self._model.check_rows(name, shape)
        return [(stored, "F32" if len(shape) < 2 else kind, shape)]

    def encode_copied(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """In llama.cpp's order; gains of norms with what the model adds to them."""
        if self._has_no_place(name):
            return {}
        arranged = self._model.arranged(name, tensor)
        if tensor.ndim < 2:
            arranged = self._model.family.gain(name, arranged)
        return {self._stored_name(name): arranged.float() if arranged.dtype == torch.float64 else arranged}

    def config(self, spec: QuantSpec, quantized: Iterable[str], copied: Iterable[str]) -> dict[str, Any]:
        """Nothing: readers look into the file."""
        return {}

    @property
    def container(self) -> GgufContainer:
        """One file, with all keys of the model where there is one."""
        if self._checkpoint is None:
            return GgufContainer()
        return GgufContainer(self._model.architecture, self._add_keys, self._model.tensors())

    def _add_keys(self, writer: GGUFWriter) -> None:
        add_general(writer, self._bound, self._mix.file_type)
        self._model.add_to(writer)
        self._tokenizer.add_to(writer)

    def _has_no_place(self, name: str) -> bool:
        """Whether a tensor is left out: what is computed, and a head that is the embedding."""
        return name.endswith(_BUFFERS) or (name.startswith("lm_head.") and self._model.tied)

    def _stored_name(self, name: str) -> str:
        found = self._names.get_name(name, try_suffixes=_SUFFIXES)
        if found is None:
            raise FormatError("format", f"{name}: llama.cpp's {self._model.architecture} has no such tensor")
        return found

    @property
    def _bound(self) -> Checkpoint:
        assert self._checkpoint is not None, "of_model comes first"
        return self._checkpoint

    @cached_property
    def _model(self) -> Model:
        return Model.of(self._bound.config)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.of(self._bound)

    @cached_property
    def _mix(self) -> Mix:
        file_type = file_type_of(self._recipe) if self._recipe else None
        assert file_type is not None, "of_recipe comes first, with a recipe that was checked"
        model = self._model
        grouped = model.n_heads // model.n_kv_heads
        return Mix(file_type, model.n_layers, grouped, tied=model.tied, large=model.large)

    @cached_property
    def _names(self) -> TensorNameMap:
        from gguf import MODEL_ARCH, get_tensor_name_map

        return get_tensor_name_map(MODEL_ARCH[self._model.family.architecture], self._model.n_layers)


def block_type_of(spec: QuantSpec) -> str:
    """The block type that holds the result of these settings."""
    for name, kind in BLOCK_TYPES.items():
        if all(getattr(spec, field) == value for field, value in kind.settings.items()):
            return name
    raise AssertionError(f"no block type holds {spec}")
