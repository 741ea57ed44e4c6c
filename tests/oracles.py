"""Other people's readers: they judge what we wrote."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from hqq_core.checkpoint import INDEX, SINGLE


def hqq(module: str):
    """A module of the hqq library; its import warns about optional kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"hqq.{module}")


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    index = folder / INDEX
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [SINGLE]
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def hqq_layers(folder: Path, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The quantized layers of a folder in format `hqq`, as the hqq library loads them to compute in `dtype` on a CPU."""
    library = hqq("core.quantize")
    tensors = stored_tensors(folder)
    modules = sorted(name.removesuffix(".W_q") for name in tensors if name.endswith(".W_q"))
    layers = {}
    for module in modules:
        state = {
            name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] == module
        }
        layer = library.HQQLinear(None, None, compute_dtype=dtype, device="cpu", initialize=False)
        layer.load_state_dict(state)
        layers[module] = layer
    return layers


def mlx_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Dequantized weights of a folder in format `mlx`, by mlx."""
    import mlx.core as mx

    settings = json.loads((folder / "config.json").read_text())["quantization"]
    stored = {name: array for file in folder.glob("model*.safetensors") for name, array in mx.load(str(file)).items()}
    weights = {}
    for module in (name.removesuffix(".scales") for name in stored if name.endswith(".scales")):
        parts = (stored[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
        own = settings.get(module, {name: settings[name] for name in ("group_size", "bits", "mode")})
        weights[module] = from_mlx(mx.dequantize(*parts, **own))
    return weights


def from_mlx(array) -> torch.Tensor:
    """The same numbers, in the same type."""
    import mlx.core as mx

    dtype = getattr(torch, str(array.dtype).removeprefix("mlx.core."))
    return torch.from_numpy(np.array(array.astype(mx.float32))).to(dtype)


def awq_weights(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Dequantized weights of a folder in format `awq`, from the layout's description; strict about everything stored."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["version"], config["bits"], config["zero_point"]) == ("awq", "gemm", 4, True)
    shifts = np.array([0, 16, 4, 20, 8, 24, 12, 28])  # of outputs 0, 1, ... in a word
    weights = {}
    for module, stored in _modules(folder, ".qweight"):
        assert stored.keys() - {"bias"} == {"qweight", "qzeros", "scales"}
        q, zero = (
            _unpack(stored[name], shifts, 15) for name in ("qweight", "qzeros")
        )  # (inputs, outputs), (groups, outputs)
        weights[module] = _grouped(q, zero, stored["scales"], config["group_size"], dtype)
    return weights


def gptq_weights(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Dequantized weights of a folder in format `gptq`, version 1, as `awq_weights`."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["checkpoint_format"], config["sym"]) == ("gptq", "gptq", True)
    assert config["desc_act"] is False
    bits, group_size = config["bits"], config["group_size"]
    shifts, mask = np.arange(0, 32, bits), (1 << bits) - 1
    weights = {}
    for module, stored in _modules(folder, ".qweight"):
        assert stored.keys() - {"bias"} == {"qweight", "qzeros", "scales", "g_idx"}
        q, zero = _unpack(stored["qweight"].T, shifts, mask).T, _unpack(stored["qzeros"], shifts, mask) + 1
        assert (zero == 1 << (bits - 1)).all()
        assert (stored["g_idx"].numpy() == np.arange(len(q)) // group_size).all()
        weights[module] = _grouped(q, zero, stored["scales"], group_size, dtype)
    return weights


def humming_weights(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Dequantized weights of a folder in format `humming`, as `awq_weights`."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["has_zero_point"], config["is_fp_zero_point"]) == ("humming", True, True)
    nbits, group_size = int(config["b_dtype"].removeprefix("uint")), config["weight_scale_group_size"]
    weights = {}
    for module, stored in _modules(folder, ".zero_point"):
        assert stored.keys() - {"bias"} == {"weight", "weight_scale", "zero_point"}
        assert stored["weight"].dtype == torch.int32
        assert stored["weight_scale"].dtype == stored["zero_point"].dtype
        rows = np.unpackbits(stored["weight"].numpy().view(np.uint8), axis=1, bitorder="little")
        q = rows.reshape(len(rows), -1, nbits) @ (1 << np.arange(nbits))
        scale, zero = (
            stored[name].to(dtype).repeat_interleave(group_size, 1) for name in ("weight_scale", "zero_point")
        )
        weights[module] = (torch.from_numpy(q).to(dtype) - zero) * scale
    return weights


def _modules(folder: Path, suffix: str):
    """The tensors of each quantized module, by their last names."""
    tensors = stored_tensors(folder)
    for module in sorted(name.removesuffix(suffix) for name in tensors if name.endswith(suffix)):
        yield (
            module,
            {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] == module},
        )


def _unpack(words: torch.Tensor, shifts: np.ndarray, mask: int) -> np.ndarray:
    """Each word's codes side by side."""
    assert words.dtype == torch.int32
    return (words.numpy().view(np.uint32)[..., None] >> shifts & mask).reshape(len(words), -1).astype(np.int64)


def _grouped(
    q: np.ndarray, zero: np.ndarray, scales: torch.Tensor, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """(q - zero) * scale by groups of rows, transposed to (outputs, inputs)."""
    assert scales.shape == zero.shape == (len(q) // group_size, q.shape[1])
    steps = torch.from_numpy(q - zero.repeat(group_size, 0)).to(dtype)
    return (steps * scales.to(dtype).repeat_interleave(group_size, 0)).T.contiguous()


def compressed_tensors_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Dequantized weights of a folder in format `compressed-tensors`, by the compressed-tensors library."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    tensors = stored_tensors(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    modules = sorted(name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed"))
    weights = {}
    for module in modules:
        state = {
            name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] == module
        }
        weights[module] = compressor.decompress(state, scheme)["weight"]
    return weights


def gguf_model(folder: Path):
    """The model of a folder in format `gguf`, dequantized by transformers to float32."""
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()


def gguf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of `model.gguf` by their GGUF names, dequantized by the gguf library to float32."""
    from gguf import GGUFReader, dequantize

    return {
        tensor.name: torch.tensor(dequantize(tensor.data, tensor.tensor_type).copy()).view(
            *map(int, tensor.shape[::-1])
        )
        for tensor in GGUFReader(folder / "model.gguf").tensors
    }


def gguf_keys(folder: Path) -> dict[str, object]:
    """Keys of `model.gguf`, read by the gguf library."""
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(folder / "model.gguf").fields.items()}


def gguf_types(folder: Path) -> dict[str, str]:
    """Type of each tensor of `model.gguf`, in ggml's words."""
    from gguf import GGUFReader

    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(folder / "model.gguf").tensors}
