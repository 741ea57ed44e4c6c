"""What llama.cpp wants to know of a model, from its config.json: keys of the architecture, and tensors that it computes with.

Keys and what becomes of each setting: llama.cpp v0.5, conversion/base.py, llama.py, gemma.py and phi.py. Settings that its graphs
do not know are refused, which a converter that merely leaves them out would get silently wrong; but for Mistral's window, up to
whose length nothing differs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hqq_core.checkpoint import Checkpoint
from hqq_core.errors import CheckpointError, FormatError, HalfquadError, short
from hqq_core.formats.gguf.families import Family, family_of
from hqq_core.source_card import front_matter

if TYPE_CHECKING:
    from gguf import GGUFWriter

_LICENSE = re.compile(r"[A-Za-z0-9._-]+")
# Layers of the 27B models, whose queries llama.cpp scales in another way.
_LARGEST_GEMMAS = {"GEMMA2": 46, "GEMMA3": 62}
_MAX_LAYERS = 512  # of any model in llama.cpp
_ROPE_KINDS = ("default", "llama3", "linear", "yarn", "longrope", "su")


@dataclass(frozen=True, slots=True)
class Rope:
    """How positions are rotated.

    Parameters
    ----------
    kind : str
        `rope_type` of config.json.
    theta : float
    settings : dict
        The other settings of that kind.
    local_theta : float or None
        Of the layers with a window, where that is another.
    """

    kind: str
    theta: float
    settings: dict[str, Any]
    local_theta: float | None = None

    @classmethod
    def of(cls, config: dict[str, Any]) -> Rope:
        """As transformers 5 writes it (rope_parameters) or as 4 did (rope_theta, rope_scaling)."""
        found = config.get("rope_parameters") or config.get("rope_scaling") or {}
        local = found.get("sliding_attention") or {}
        settings = found.get("full_attention") or found
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind not in _ROPE_KINDS:
            raise FormatError("format", f"rope_type {kind!r}: format 'gguf' holds {', '.join(_ROPE_KINDS)}")
        theta = settings.get("rope_theta", config.get("rope_theta", 10_000.0))
        local_theta = local.get("rope_theta", config.get("rope_local_base_freq"))
        return cls(kind, float(theta), settings, None if local_theta is None else float(local_theta))


@dataclass(frozen=True, slots=True)
class Model:
    """A config.json, read for GGUF; what it lacks or what llama.cpp cannot compute is an error at birth."""

    config: dict[str, Any]
    family: Family
    rope: Rope

    @classmethod
    def of(cls, config: dict[str, Any]) -> Model:
        """Read and check; a FormatError names the setting that llama.cpp has no graph for."""
        family = family_of(config)
        if family is None:
            raise FormatError("format", f"model_type {config.get('model_type')!r}: no model of format 'gguf'")
        try:
            model = cls(config, family, Rope.of(config))
            model._check()
        except HalfquadError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: describes no {family.architecture} model: {short(error)}") from error
        return model

    def number(self, key: str) -> int:
        """A whole number that must be there."""
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json: {key} {value!r}: wanted a whole number above 0")
        return value

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the family."""
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

        return MODEL_ARCH_NAMES[MODEL_ARCH[self.family.architecture]]

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output head, too."""
        return bool(self.config.get("tie_word_embeddings", self.family.norm_offset))  # Gemma's are unless said

    def check_rows(self, name: str, shape: tuple[int, ...]) -> None:
        """CheckpointError where a tensor that has a place has not as many rows as that wants."""
        if not shape:
            raise CheckpointError(f"{name}: a single number: wanted one axis or more")
        heads = self._heads(name)
        wanted = heads * self.head_size if heads else shape[0]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            wanted = self.number("vocab_size")
        if shape[0] != wanted:
            raise CheckpointError(f"{name}: {shape[0]} rows: wanted {wanted}, as config.json has it")

    def _heads(self, name: str) -> int | None:
        return {"q_proj": self.n_heads, "k_proj": self.n_kv_heads}.get(name.split(".")[-2])

    def arranged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor, by its source name, with its rows in the order that llama.cpp wants them."""
        heads = self._heads(name)
        if not self.family.permuted or heads is None:
            return tensor
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return self.number("num_hidden_layers")

    @property
    def n_heads(self) -> int:
        """Query heads of a layer."""
        return self.number("num_attention_heads")

    @property
    def n_kv_heads(self) -> int:
        """Key heads of a layer."""
        return self.number("num_key_value_heads") if self.config.get("num_key_value_heads") else self.n_heads

    @property
    def head_size(self) -> int:
        """Numbers of a head."""
        given = self.config.get("head_dim")
        return self.number("head_dim") if given else self.number("hidden_size") // self.n_heads

    @property
    def rotated(self) -> int:
        """Numbers of a head that are rotated."""
        part = self.rope.settings.get("partial_rotary_factor", self.config.get("partial_rotary_factor", 1.0))
        return int(self.head_size * part)

    @property
    def trained_context(self) -> int:
        """Positions before the rotation was stretched."""
        key = "original_max_position_embeddings"
        found = self.rope.settings.get(key) or self.config.get(key) or self.number("max_position_embeddings")
        return int(found)

    @property
    def large(self) -> bool:
        """Whether llama.cpp takes it for a model of 70B parameters."""
        grouped = self.n_kv_heads != self.n_heads
        return self.n_layers == 80 and grouped and self.family.architecture in ("LLAMA", "QWEN2")

    def add_to(self, writer: GGUFWriter) -> None:
        """Keys of the architecture."""
        writer.add_block_count(self.n_layers)
        writer.add_context_length(self.number("max_position_embeddings"))
        writer.add_embedding_length(self.number("hidden_size"))
        writer.add_feed_forward_length(self.number("intermediate_size"))
        writer.add_head_count(self.n_heads)
        writer.add_head_count_kv(self.n_kv_heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_vocab_size(self.number("vocab_size"))
        writer.add_layer_norm_rms_eps(float(self.config.get("rms_norm_eps", 1e-6)))
        self._add_attention(writer)
        self._add_rope(writer)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Factors of the rotation, float32 by GGUF name, where the model has some."""
        if self.rope.kind == "llama3":
            return {"rope_freqs.weight": self._llama3_factors()}
        if self.rope.kind in ("longrope", "su"):
            return {f"rope_factors_{size}.weight": self._factors(size) for size in ("long", "short")}
        return {}

    def _add_attention(self, writer: GGUFWriter) -> None:
        if cap := self.config.get("attn_logit_softcapping"):
            writer.add_attn_logit_softcapping(float(cap))
        if cap := self.config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(float(cap))
        if self.family.windows:
            writer.add_sliding_window(self.number("sliding_window"))
        if self.family.architecture == "PHI3":
            writer.add_sliding_window(self.config.get("sliding_window") or 0)  # 0 tells Phi-4 from the others

    def _add_rope(self, writer: GGUFWriter) -> None:
        from gguf import RopeScalingType

        rope = self.rope
        writer.add_rope_dimension_count(self.rotated)
        writer.add_rope_freq_base(rope.theta)
        if rope.local_theta is not None:
            writer.add_rope_freq_base_swa(rope.local_theta)
        if self.family.architecture == "PHI3" or rope.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(self.trained_context)
        if rope.kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(RopeScalingType(rope.kind))
            writer.add_rope_scaling_factor(float(rope.settings["factor"]))
        if rope.kind in ("longrope", "su"):
            writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
            writer.add_rope_scaling_attn_factors(self._attention_factor())
        if rope.kind == "yarn":
            self._add_yarn(writer)

    def _add_yarn(self, writer: GGUFWriter) -> None:
        adders = {
            "attention_factor": writer.add_rope_scaling_yarn_attn_factor,
            "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
            "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
        }
        for key, add in adders.items():
            if self.rope.settings.get(key) is not None:
                add(float(self.rope.settings[key]))

    def _attention_factor(self) -> float:
        """What longrope multiplies queries and keys with."""
        if given := self.rope.settings.get("attention_factor"):
            return float(given)
        stretched = self.number("max_position_embeddings") / self.trained_context
        return math.sqrt(1 + math.log(stretched) / math.log(self.trained_context)) if stretched > 1 else 1.0

    def _factors(self, size: str) -> torch.Tensor:
        factors = self.rope.settings.get(f"{size}_factor")
        if not isinstance(factors, list) or len(factors) != self.rotated // 2:
            wanted = f"{self.rotated // 2} numbers, one for each pair of a head that is rotated"
            raise CheckpointError(f"config.json: {size}_factor: wanted {wanted}")
        return torch.tensor(factors, dtype=torch.float32)

    def _llama3_factors(self) -> torch.Tensor:
        """By how much each frequency is lowered: none of the fast ones, all of the slow ones, and some between."""
        settings = self.rope.settings
        try:
            factor, low, high = (float(settings[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: rope_type 'llama3' without a sound {error}") from error
        exponents = torch.arange(0, self.rotated, 2, dtype=torch.float32) / self.rotated
        turns = self.trained_context * self.rope.theta**-exponents / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return 1 / ((1 - smooth) / factor + smooth)

    def _check(self) -> None:
        self._require("num_hidden_layers", self.n_layers, self.n_layers <= _MAX_LAYERS, f"up to {_MAX_LAYERS}")
        activation = self.config.get("hidden_activation") or self.config.get("hidden_act") or self.family.activation[0]
        self._require("hidden_act", activation, activation in self.family.activation, self.family.activation)
        if self.family.architecture != "PHI3":
            self._require("partial_rotary_factor", self.rotated, self.rotated == self.head_size, "1, all of a head")
        if self.family.norm_offset:
            self._require("tie_word_embeddings", self.tied, self.tied, "true")
        if self.family.windows:
            self._check_windows()
        elif self.config.get("use_sliding_window"):
            first = self.config.get("max_window_layers", 0)
            self._require(
                "max_window_layers", first, first >= self.n_layers, f"{self.n_layers}, no layer with a window,"
            )
        if self.family.architecture != "LLAMA":
            for key in ("attention_bias", "mlp_bias"):
                self._require(key, self.config.get(key), not self.config.get(key), "false")
        self.tensors()

    def _check_windows(self) -> None:
        """Gemma's layers with a window, and the scale of its queries, which llama.cpp does not read but know."""
        full = self.family.windows
        wanted = ["sliding_attention" if (i + 1) % full else "full_attention" for i in range(self.n_layers)]
        given = self.config.get("layer_types", wanted)
        self._require("layer_types", given, given == wanted, f"full attention in every {full}th layer")
        largest = self.n_layers == _LARGEST_GEMMAS[self.family.architecture]
        size = self.number("hidden_size") // self.n_heads if largest else self.head_size
        scalar = self.config.get("query_pre_attn_scalar", size)
        self._require("query_pre_attn_scalar", scalar, scalar == size, size)

    @staticmethod
    def _require(key: str, got: object, ok: bool, wanted: object) -> None:
        if not ok:
            raise FormatError("format", f"config.json: {key} {got!r}: llama.cpp computes with {wanted} alone")


def add_general(writer: GGUFWriter, checkpoint: Checkpoint, file_type: str) -> None:
    """Keys of any model: what it is called, whose it is, and how it was quantized."""
    from gguf import GGML_QUANT_VERSION, GGUFType, LlamaFileType

    writer.add_type(GGUFType.MODEL)
    name = checkpoint.config.get("_name_or_path")
    if isinstance(name, str) and name:
        writer.add_name(name.rstrip("/").rpartition("/")[2].encode(errors="replace").decode())
    if licence := _licence(checkpoint):
        writer.add_license(licence)
    writer.add_quantized_by("Halfquad")
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{file_type}"])


def _licence(checkpoint: Checkpoint) -> str | None:
    """As the front matter of the model card has it."""
    name = front_matter(checkpoint).get("license")
    return name if isinstance(name, str) and _LICENSE.fullmatch(name) else None
