"""The main job, from nothing to a folder that can be opened: `make demo`.

Starts the service, submits SmolLM2-135M over HTTP, follows its events, downloads the result, and judges it through transformers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.client import Client, HalfquadClientError
from tests.models import CACHE, cached, english

RECIPE = {"format": "compressed-tensors", "nbits": 4, "group_size": 64}
RESULT = CACHE.parent / "demo" / "SmolLM2-135M-Instruct-4bit"
N_TOKENS = 2048
START_TIMEOUT_S = 120


def main() -> None:
    print("1. A real model: SmolLM2-135M-Instruct, from its package")
    source = cached("smollm2-135m")
    print(f"   {source}")
    data_dir = CACHE.parent / "demo" / "data"
    shutil.rmtree(data_dir.parent, ignore_errors=True)
    with service(data_dir, source.parent) as client:
        job = run_job(client, source)
        download(client, job)
    print("   service stopped")
    show(job)
    show_energies(job)
    judge(source)
    print(f"\nThe result: {RESULT}")


@contextmanager
def service(data_dir: Path, source_root: Path) -> Iterator[Client]:
    """`halfquad up` on a free port, stopped at the end."""
    print("2. The service: halfquad up")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data_dir.mkdir(parents=True)
    environment = os.environ | {"HALFQUAD_DATA_DIR": str(data_dir), "HALFQUAD_SOURCE_ROOTS": str(source_root)}
    log = data_dir.parent / "service.log"
    with log.open("wb") as file:
        command = [Path(sys.executable).with_name("halfquad"), "up", "--port", str(port)]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            wait_until_ready(client, process, log)
            print(f"   http://127.0.0.1:{port}/docs")
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_until_ready(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up and process.poll() is None:
        try:
            next(client.list(limit=1), None)
        except HalfquadClientError:
            time.sleep(0.2)
        else:
            return
    raise SystemExit(f"the service did not come up:\n{log.read_text()}")


def run_job(client: Client, source: Path) -> dict[str, Any]:
    print("3. The job: POST /v1/jobs, then its events")
    job = client.submit(source, RECIPE, labels={"from": "demo"})
    print(f"   {job['id']}  {json.dumps(RECIPE)}")
    for event in client.events(job["id"]):
        print(f"   {event.seq:>3} {event.type:<9} {json.dumps(event.data)[:110]}")
    job = client.get(job["id"])
    if job["status"] != "succeeded":
        raise SystemExit(f"the job {job['status']}: {job['error']}")
    return job


def download(client: Client, job: dict[str, Any]) -> None:
    shutil.rmtree(RESULT, ignore_errors=True)
    for artifact in client.artifacts(job["id"]):
        client.download(job["id"], artifact["name"], RESULT / artifact["name"])


def show(job: dict[str, Any]) -> None:
    metrics, durations = job["result"]["outputs"][0]["metrics"], job["durations"]
    print("4. What it says of itself")
    print(f"   source {metrics['nbytes_in'] / 1e6:.1f} MB, result {metrics['nbytes_out'] / 1e6:.1f} MB")
    print(f"   {metrics['tensors_quantized']} tensors quantized, {metrics['tensors_copied']} copied")
    print(f"   {metrics['bits_per_weight']:.3f} bits per quantized weight, scales and zero points included")
    print(f"   relative error {metrics['relative_error']:.4f} over all; the worst five:")
    for tensor in metrics["worst_tensors"]:
        print(f"     {tensor['relative_error']:.4f}  {tensor['sqnr_db']:.1f} dB  {tensor['name']}")
    print(
        "   seconds by phase: "
        + ", ".join(f"{phase} {took:.2f}" for phase, took in durations.items() if took is not None)
    )


def show_energies(job: dict[str, Any]) -> None:
    """Where the weights of the columns came from, tensor by tensor, as the report has it."""
    report = json.loads((RESULT / "halfquad_report.json").read_text())
    sources = Counter(tensor["energy"] for tensor in report["tensors"] if tensor["spec"])
    said = ", ".join(f"{source} for {count} tensors" for source, count in sources.most_common())
    print(f"   preset {job['recipes'][0]['preset']}; input energy {said}")


def judge(source: Path) -> None:
    """Perplexity and KL through transformers, which shares no code with the writer."""
    from hqq_core.evaluate import compare, generate, load_model, tokenize

    print(f"5. What transformers says of it ({N_TOKENS} tokens of Python's own documentation)")
    result = load_model(RESULT)
    comparison = compare(load_model(source), result, tokenize(source, english(), N_TOKENS))
    print(f"   perplexity {comparison.source_perplexity:.2f} -> {comparison.perplexity:.2f}")
    print(f"   KL {comparison.kl:.3f} nats, same first choice {comparison.agreement:.1%}")
    print(f"   it continues: {generate(result, RESULT, 'The capital of France is', n_tokens=12)!r}")


if __name__ == "__main__":
    main()
