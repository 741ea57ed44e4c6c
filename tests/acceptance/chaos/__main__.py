"""By hand: `python -m tests.acceptance.chaos --jobs 200 --seed 1 --folder out`; 1 where an invariant does not hold."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.acceptance.chaos.report import Report, run_chaos


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance.chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept afterwards; unless given, a temporary one")
    parser.add_argument("--patience", type=float, default=180, help="seconds without any event before it is given up")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="halfquad-chaos-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report: Report = run_chaos(folder.resolve(), arguments.seed, arguments.jobs, patience_s=arguments.patience)
    print(f"seed {arguments.seed}, {time.monotonic() - began:.0f} s\n{report}")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
