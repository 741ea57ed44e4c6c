"""GgufWriter: the format by itself, and bound to a recipe and a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch

from hqq_core.architectures import QUANTIZED, Role, ties_head
from hqq_core.checkpoint import Checkpoint
from hqq_core.errors import FormatError
from hqq_core.formats.base import CheckpointWriter, Layout
from hqq_core.formats.gguf.blocks import BLOCK_TYPES, pack
from hqq_core.formats.gguf.container import GgufContainer
from hqq_core.formats.gguf.metadata import Model
from hqq_core.formats.gguf.mixes import MAIN_TYPES, Mix
from hqq_core.formats.gguf.tokenizer import Tokenizer
from hqq_core.recipe import Recipe
from hqq_core.safetensors_file import DTYPES, NAMES
from hqq_core.spec import QuantSpec
from hqq_core.tensors import QuantizedTensor

if TYPE_CHECKING:
    from gguf import GGUFWriter, TensorNameMap

_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".masked_bias")  # of old checkpoints: computed, not learned


class GgufWriter(CheckpointWriter):
    name = "gguf"
    quantized = (*QUANTIZED, Role.EMBEDDING, Role.HEAD)
