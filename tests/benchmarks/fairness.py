"""How long one job waits behind a batch: one of another owner, beside one of the batch's own.

    python -m tests.benchmarks.fairness [--batch 200]

`halfquad up` with one worker, as a user starts it; a tiny model, all jobs submitted before the two are.
"""

import argparse
import tempfile
import time
from pathlib import Path

from tests.acceptance.conftest import Installation
from tests.checkpoints import save_llama

RECIPE = {"energy": "none"}
LOOK_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fairness", description=__doc__)
    parser.add_argument("--batch", type=int, default=200)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="halfquad-fairness-") as folder:
        source = save_llama(Path(folder) / "models" / "tiny")
        installation = Installation(Path(folder), source.parent, {}, embedded=True)
        try:
            installation.start()
            run(installation, source, asked.batch)
        finally:
            installation.close()


def run(installation: Installation, source: Path, n_jobs: int) -> None:
    submit = installation.client.submit
    submit(source, RECIPE, owner="warm")
    batch = [submit(source, RECIPE, owner="batch")["id"] for _ in range(n_jobs)]
    began_at, waiting = time.monotonic(), {}
    for owner in ("batch", "single"):
        waiting[submit(source, RECIPE, owner=owner)["id"]] = owner
    waits: dict[str, float] = {}
    while len(waits) < len(waiting):
        for job_id, owner in waiting.items():
            if owner not in waits and installation.client.get(job_id)["status"] == "succeeded":
                waits[owner] = time.monotonic() - began_at
                done = sum(installation.client.get(other)["status"] == "succeeded" for other in batch)
                print(f"{owner}'s job ended after {waits[owner]:.1f} s, {done} of the batch's {n_jobs} before it")
        time.sleep(LOOK_S)
    print(f"batch / single {waits['batch'] / waits['single']:.1f}")


if __name__ == "__main__":
    main()
