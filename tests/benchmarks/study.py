"""What each way to quantize costs real models: weight error, KL and perplexity (encoders: cosine), seconds.

python -m tests.benchmarks.study --out results.jsonl [--models ...] [--nbits 4 3 2] [--group-sizes 64] [--methods ...]
python -m tests.benchmarks.study --table results.jsonl

One JSON line for each model, width, group size and method as it is done; what the file has is not done again.
Methods are names with options, such as ours:preset=best,energy=analytic,zero=int; see tests/benchmarks/methods.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hqq_core import QuantSpec, quantize
from tests.benchmarks.methods import Bench, Method
from tests.benchmarks.peers import NotApplicableError
from tests.benchmarks.subjects import Subject
from tests.models import MODELS, cached, english

CONTEXTS = {"tiny-qwen3moe-tinystories": 256, "tiny-gpt2-tinystories": 256}  # what they were trained with
DEFAULT_METHODS = [
    "rtn", "hqq", "hqq-beta",
    *(f"ours:preset={preset},energy={energy},zero={zero}"
      for preset in ("fast", "balanced", "best") for energy in ("none", "analytic", "synthetic") for zero in ("float", "int")),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of tests.models, or of folders")
    parser.add_argument("--models-dir", type=Path, default=Path(), help="where the folders of --models are")
    parser.add_argument("--nbits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[64, 32, 128])
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS)
    parser.add_argument("--tokens", type=int, default=10_240, help="to score; of whole windows")
    parser.add_argument("--text", type=Path, help="UTF-8 file to score; default: Python's own help topics")
    parser.add_argument(
        "--calibration", type=Path, help="UTF-8 file for methods that want data; default: the help topics"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sinq", type=Path, help="a checkout of github.com/huawei-csl/SINQ, for sinq and presinq")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="only print the table of these results")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read(arguments.table)))
        return
    if arguments.out is None:
        parser.error("--out: wanted a file for the results")
    torch.set_num_threads(arguments.threads)
    quantize(torch.ones(64, 64), QuantSpec())  # compiled once
    methods = [Method.parse(label) for label in arguments.methods]
    for model in arguments.models:
        study(model, methods, arguments)


def study(model: str, methods: list[Method], arguments: argparse.Namespace) -> None:
    """All settings of one model."""
    name = model.rpartition("/")[2]
    text = arguments.text.read_text() if arguments.text else english()
    same = {"model": name, "text": arguments.text.name if arguments.text else "pydoc", "tokens": arguments.tokens}
    settings = [
        (method, same | {"nbits": nbits, "group_size": group_size, "method": method.label})
        for group_size, nbits, method in itertools.product(arguments.group_sizes, arguments.nbits, methods)
    ]
    done = [key(line) for line in read(arguments.out)] if arguments.out.exists() else []
    todo = [(method, setting) for method, setting in settings if key(setting) not in done]
    if not todo:
        return
    folder = cached(model) if model in MODELS else arguments.models_dir / model
    subject = Subject(name, folder, text, arguments.tokens, CONTEXTS.get(name, 512))
    subject.listen()
    bench = Bench(subject, arguments.calibration.read_text() if arguments.calibration else english(), arguments.sinq)
    for method, setting in todo:
        subject.restore()
        try:
            line = setting | quantized(bench, method, setting["nbits"], setting["group_size"]) | subject.judge()
        except NotApplicableError as error:
            line = setting | {"not_run": str(error)}
        with arguments.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        result = line.get("not_run") or f"{loss(line):.5f}"
        print(*key(line), result, file=sys.stderr, flush=True)


def quantized(bench: Bench, method: Method, nbits: int, group_size: int) -> dict[str, Any]:
    """Put a method's weights into the model: relative squared error of all of them, and seconds."""
    subject = bench.subject
    start = time.perf_counter()
    bench.energies(method.options)
    seconds = {"profile_seconds": time.perf_counter() - start, "seconds": 0.0}
    solved = method.solve(bench, nbits, group_size)
    errors: dict[str, tuple[float, float]] = {}
    while True:
        start = time.perf_counter()
        item = next(solved, None)
        seconds["seconds"] += time.perf_counter() - start
        if item is None:
            break
        name, W_r = item
        W = subject.source[name].double()
        W_r = W_r.to(subject.dtype)
        subject.view(name).copy_(W_r)
        errors[name] = (W_r.double() - W).square().sum().item(), W.square().sum().item()
    missing = set(subject.names(group_size)) - errors.keys()
    assert not missing, f"{method.label} left out {missing}"
    error, norm = (sum(column) for column in zip(*errors.values(), strict=True))
    numel = sum(subject.source[name].numel() for name in errors)
    return {"rel_mse": error / norm if error else None, **seconds, "numel": numel, "n_tensors": len(errors)}


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a result the same one."""
    return tuple(line[field] for field in ("model", "text", "tokens", "nbits", "group_size", "method"))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: one row a result, beside hqq's of the same setting."""
    columns = (
        "model",
        "bits",
        "group",
        "method",
        "rel. MSE",
        "of hqq",
        "KL or 1 - cosine",
        "of hqq",
        "perplexity",
        "solve s",
    )
    done = [line for line in lines if "not_run" not in line]
    peers = {key(line)[:-1]: line for line in done if line["method"] == "hqq"}
    rows = [columns, ["---"] * len(columns)]
    for line in sorted(done, key=lambda line: (line["model"], -line["nbits"], line["group_size"])):
        peer = peers.get(key(line)[:-1])
        rows.append([
            line["model"], str(line["nbits"]), str(line["group_size"]), f"`{line['method']}`",
            f"{line['rel_mse']:.5f}" if line["rel_mse"] else "",
            f"{line['rel_mse'] / peer['rel_mse']:.3f}" if peer and line["rel_mse"] else "",
            f"{loss(line):.5f}", f"{loss(line) / loss(peer):.3f}" if peer else "",
            f"{line['perplexity']:.2f}" if "perplexity" in line else "", f"{line['seconds']:.1f}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def loss(line: dict[str, Any]) -> float:
    """KL, or for encoders what the cosine lacks."""
    return line["kl"] if "kl" in line else 1 - line["cosine"]


if __name__ == "__main__":
    main()
