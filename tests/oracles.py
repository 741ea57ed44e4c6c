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
        weights[module] = from_mlx(mx.dequantize(*parts, **settings))
    return weights


def from_mlx(array) -> torch.Tensor:
    """The same numbers, in the same type."""
    import mlx.core as mx

    dtype = getattr(torch, str(array.dtype).removeprefix("mlx.core."))
    return torch.from_numpy(np.array(array.astype(mx.float32))).to(dtype)


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
