"""A Hub to try things against by hand: `python -m tests.fakehub --port 8899 --folder hub --repo team-a/tiny=models/tiny`."""

import argparse
import signal
from pathlib import Path

from tests.fakehub.server import FakeHub


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fakehub", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--folder", type=Path, required=True, help="repos are kept here, also for the next start")
    parser.add_argument(
        "--repo", action="append", default=[], metavar="ID=FOLDER", help="a repo to begin with, from a folder"
    )
    parser.add_argument("--xet", action="store_true", help="offer Xet, with a store in the folder")
    arguments = parser.parse_args()
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # in all threads: one of them would die of it
    with FakeHub(arguments.folder, port=arguments.port, xet=arguments.xet) as hub:
        for repo_id, _, folder in (text.partition("=") for text in arguments.repo):
            if repo_id not in hub.state.repos:
                hub.add_repo(repo_id, Path(folder) if folder else None)
        print(f"HF_ENDPOINT={hub.endpoint}", flush=True)
        print(f"tokens: {hub.write_token} (alice, team-a, team-b), {hub.read_token} (the same, read only)", flush=True)
        signal.sigwait(signals)


if __name__ == "__main__":
    main()
