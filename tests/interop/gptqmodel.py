"""Formats `awq` and `gptq` in transformers through gptqmodel, on a CPU: logits beside those of the dequantized weights.

It wants an environment of its own, for gptqmodel 7.7.0 asks for a newer torch than it needs:

    pip install torch==2.13.0
    DISABLE_CUDA=1 pip install -c constraints.txt -e '.[evaluate]' setuptools wheel pypcre logbar device-smi threadpoolctl \\
        pillow dill requests accelerate pyarrow datasets torchao
    pip install --no-deps --no-build-isolation gptqmodel==7.7.0 defuser tokenicer optimum
    python -m tests.interop.gptqmodel
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from hqq_core import Recipe, quantize_checkpoint
from hqq_core.formats.gptq import FAMILIES
from tests.families import build, replaced
from tests.oracles import awq_weights, gptq_weights

TIMES_ROUNDING = 2  # gptqmodel computes in half precision, as do the dequantized weights, with other sums
RECIPES = [
    Recipe(format="awq", group_size=64, skip_modules=("layers.1.mlp.down_proj",)),
    Recipe(format="awq", group_size=128),
    *(Recipe(format="gptq", nbits=nbits, group_size=g) for nbits in (4, 8) for g in (32, 64, 128)),
]
READERS = {"awq": awq_weights, "gptq": gptq_weights}


def main() -> int:
    """Print a line for each family and recipe; the exit code says whether all agreed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    families = parser.parse_args().families
    agreed = True
    for family in families:
        for dtype in (torch.float16, torch.bfloat16):
            with tempfile.TemporaryDirectory() as folder:
                for i, recipe in enumerate(RECIPES):
                    agreed &= compare(family, dtype, recipe, Path(folder, str(i)))
    return 0 if agreed else 1


def compare(family: str, dtype: torch.dtype, recipe: Recipe, folder: Path) -> bool:
    """Quantize a tiny random model and compare what the loader computes with what the numpy reader's weights give."""
    from transformers import AutoModelForCausalLM

    tied = family.startswith("gemma")
    model = build(
        family, hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=3, tie_word_embeddings=tied
    )
    model.to(dtype).save_pretrained(folder / "m")
    quantize_checkpoint(folder / "m", folder / "out", recipe)
    read = READERS[recipe.format](folder / "out", dtype)
    reference = replaced(folder / "m", folder / "out", folder / "dequantized", read)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=dtype, device_map="cpu")
    wanted = logits(reference)
    got, plain = ((logits(model) - wanted).abs().max() / wanted.abs().max() for model in (loaded, reference.to(dtype)))
    packed = [type(module).__name__ for module in loaded.modules() if hasattr(module, "qweight")]
    what = f"{family:>12} {str(dtype).removeprefix('torch.'):>9} {recipe.format:>5} {recipe.nbits} bit g{recipe.group_size:<4}"
    how = f"{len(packed):>3} of {len(read)} layers  {'/'.join(sorted(set(packed))):<24}"
    print(f"{what} {how} {got:.1e}, by rounding alone {plain:.1e}", flush=True)
    return bool(got < TIMES_ROUNDING * plain) and len(packed) == len(read)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of a fixed text, as float32."""
    with torch.no_grad():
        return model(torch.arange(1, 25)[None] * 7 % 320).logits.float()


if __name__ == "__main__":
    sys.exit(main())
