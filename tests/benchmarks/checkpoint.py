"""A whole synthetic checkpoint: peak memory, and wall time over the time to only read and rewrite the same bytes.

python -m tests.benchmarks.checkpoint [--gigabytes 4 8] [--format mlx metal]
Each run is a process of its own; needs twice the largest size on disk. Several formats are made of one read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from hqq_core import Checkpoint, Recipe, build_plans, quantize_checkpoint
from hqq_core.safetensors_file import CHUNK_NBYTES, SafetensorsWriter
from tests.vocabularies import save_tokenizer

SHARD_NBYTES = 256_000_000
HIDDEN, FEED_FORWARD, VOCABULARY = 2048, 7680, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--format", nargs="+", default=["compressed-tensors"])
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(RUNS[arguments.run](Path.cwd(), arguments.format)))
        return
    print(
        f"{', '.join(arguments.format)}, 4 bit, group 64, {os.cpu_count()} cores; source in the page cache for both sides"
    )
    print(f"{'source':>14} {'result':>8} {'peak MB':>8} {'convert s':>10} {'rewrite s':>10} {'ratio':>6} {'GB/s':>5}")
    for gigabytes in arguments.gigabytes:
        with tempfile.TemporaryDirectory(prefix="halfquad-bench-") as folder:
            n_shards = build(Path(folder) / "source", gigabytes * 1_000_000_000)
            rewrite = run("rewrite", folder, arguments.format)
            convert = run("convert", folder, arguments.format)
            print(
                f"{convert['nbytes_in'] / 1e9:>5.2f} GB / {n_shards:>3} {convert['nbytes_out'] / 1e9:>5.2f} GB "
                f"{convert['peak'] / 1e6:>8.0f} {convert['seconds']:>10.1f} {rewrite['seconds']:>10.1f} "
                f"{convert['seconds'] / rewrite['seconds']:>6.2f} {convert['nbytes_in'] / 1e9 / convert['seconds']:>5.2f}"
            )


def run(name: str, folder: str, formats: list[str]) -> dict:
    command = [sys.executable, "-m", "tests.benchmarks.checkpoint", "--run", name, "--format", *formats]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return json.loads(subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True).stdout)


def recipes_of(formats: list[str]) -> list[Recipe]:
    return [Recipe(format=name, nbits=4, group_size=64, energy="none") for name in formats]


def convert(folder: Path, formats: list[str]) -> dict:
    """The conversion, as `halfquad quantize` does it."""
    start = time.perf_counter()
    manifests = quantize_checkpoint(folder / "source", folder / "out", *recipes_of(formats))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    shutil.rmtree(folder / "out")
    nbytes_out = sum(manifest.metrics["nbytes_out"] for manifest in manifests)
    nbytes_in = manifests[0].metrics["nbytes_in"]
    return {"seconds": seconds, "peak": peak, "nbytes_in": nbytes_in, "nbytes_out": nbytes_out}


def rewrite(folder: Path, formats: list[str]) -> dict:
    """Only read the source, and write, sync and hash as many bytes as the result has: the floor."""
    plans = build_plans(Checkpoint.open(folder / "source"), recipes_of(formats))
    (folder / "copy").mkdir()
    start = time.perf_counter()
    buffer = memoryview(bytearray(CHUNK_NBYTES))
    for shard in plans[0].shards:
        with (folder / "source" / shard.file).open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        nbytes = sum(plan.shards[shard.index].nbytes_out for plan in plans)
        writer = SafetensorsWriter(folder / "copy" / shard.file, [("bytes", "U8", (nbytes,))])
        sizes = (min(CHUNK_NBYTES, nbytes - at) for at in range(0, nbytes, CHUNK_NBYTES))
        for size in sizes:
            writer.append("bytes", buffer[:size])
        writer.close()
    seconds = time.perf_counter() - start
    shutil.rmtree(folder / "copy")
    return {"seconds": seconds}


RUNS = {"convert": convert, "rewrite": rewrite}


def build(folder: Path, nbytes: int) -> int:
    """Write shards of Llama-like layers, each of its own random weights; returns how many."""
    folder.mkdir()
    layer_nbytes = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FEED_FORWARD)
    layers_per_shard = SHARD_NBYTES // layer_nbytes
    n_shards = math.ceil(nbytes / (layers_per_shard * layer_nbytes))
    weight_map = {}
    for i in range(n_shards):
        file = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        shapes = {
            f"model.layers.{layer}.{module}.weight": shape
            for layer in range(i * layers_per_shard, (i + 1) * layers_per_shard)
            for module, shape in SHAPES.items()
        }
        if i == 0:
            shapes |= {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
        writer = SafetensorsWriter(folder / file, [(name, "BF16", shape) for name, shape in shapes.items()])
        generator = torch.Generator().manual_seed(i)
        for name, shape in shapes.items():
            writer.write(name, torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator))
        writer.close()
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": n_shards * layers_per_shard}))
    save_tokenizer(folder, "gpt-2", VOCABULARY)
    return n_shards


SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (FEED_FORWARD, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, FEED_FORWARD),
    **{f"{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")},
}
CONFIG = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FEED_FORWARD, "num_attention_heads": 16,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}  # fmt: skip


if __name__ == "__main__":
    main()
