"""mlx-lm, formats `mlx` and `awq`, on a CPU; scales, biases and activations are widened to float32, codes stay packed."""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model, load_model
from protocol import Answer, Task, counted, serve


def compute(task: Task) -> Answer:
    """On mlx's quantized layers."""
    model, _ = load_model(task.folder)
    model.set_dtype(mx.float32)
    layers = counted(
        type(module).__name__
        for module in model.modules()
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
    )
    said = list(greedy(model, task.prompt, task.n_new))
    logits = logits_of(model, task.windows)
    return Answer(said, layers, logits=logits, rounding=own_rounding(model, task.windows) if task.rounding else None)


def logits_of(model: nn.Module, windows: list[list[int]]) -> np.ndarray:
    """Float32 [shape=(windows, tokens, vocabulary)]."""
    return np.stack([np.array(model(mx.array([window]))[0].astype(mx.float32)) for window in windows])


def own_rounding(model: nn.Module, windows: list[list[int]]) -> float:
    """What mlx's dense layers lose in float32, beside float64, of the largest logit; the model is dequantized by it."""
    mx.set_default_device(mx.cpu)  # which alone has float64
    dense = dequantize_model(model)
    single = logits_of(dense, windows)
    dense.set_dtype(mx.float64)
    double = logits_of(dense, windows)
    return float(np.abs(single - double).max() / np.abs(double).max())


def greedy(model: nn.Module, prompt: list[int], n_new: int) -> Iterator[int]:
    """The likeliest next token, n_new times."""
    cache, ids = make_prompt_cache(model), prompt
    for _ in range(n_new):
        ids = [int(mx.argmax(model(mx.array([ids]), cache=cache)[0, -1]))]
        yield ids[0]


if __name__ == "__main__":
    serve(compute, ["mlx-lm", "mlx"])
