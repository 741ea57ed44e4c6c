"""Readers by the name that a config.json gives its layout; they share no code with the writers, and know them not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hqq_core.errors import VerificationError
from hqq_core.verify.readers._module import Module, Reader
from hqq_core.verify.readers.affine import AffineReader
from hqq_core.verify.readers.awq import AwqReader
from hqq_core.verify.readers.bitnet import BitnetReader
from hqq_core.verify.readers.compressed_tensors import CompressedTensorsReader
from hqq_core.verify.readers.gptq import GptqReader
from hqq_core.verify.readers.hqq import HqqReader
from hqq_core.verify.readers.humming import HummingReader

__all__ = ["Module", "Reader", "left_alone", "reader_of"]

READERS: dict[str, Callable[[dict[str, Any]], Reader]] = {
    "awq": AwqReader.of,
    "bitnet": BitnetReader.of,
    "compressed-tensors": CompressedTensorsReader.of,
    "gptq": GptqReader.of,
    "hqq": HqqReader.of,
    "humming": HummingReader.of,
    "metal": AffineReader.of_metal,
    "mlx": AffineReader.of_mlx,
}
LEFT_ALONE = ("ignore", "modules_to_not_convert", "skip_modules")  # one of them in each layout


def left_alone(config: dict[str, Any]) -> frozenset[str]:
    """Modules that a config.json tells readers not to look for: full names, or last parts of them."""
    lists = (config["quantization_config"].get(key) for key in LEFT_ALONE)
    return frozenset(str(name) for names in lists if isinstance(names, list) for name in names)


def reader_of(config: dict[str, Any]) -> Reader:
    """The reader that a config.json asks for, as a runtime would find it."""
    try:
        settings = config["quantization_config"]
        if "quant_method" not in settings and config["quantization"] == settings:
            settings = {"quant_method": "mlx", **settings}
        return READERS[settings["quant_method"]](settings)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise VerificationError(
            "config.json", f"no quantization_config that is understood: {type(error).__name__}: {error}"
        ) from error
