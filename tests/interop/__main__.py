"""Every format in the runtimes that load it, on a real model: `make interop`, or

python -m tests.interop [--only NAME ...] [--fast] [--tokens N] [--resume] [--write]

Quantizes SmolLM2-135M (and tiny models of other families) for each cell of the matrix, lets each runtime compute logits and
greedy text in an environment of its own (made on first use, some GB), and holds them against transformers with the dequantized
weights.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from hqq_core import HalfquadError, Recipe, quantize_checkpoint
from tests.interop.environment import HOME
from tests.interop.line import Line, between_marks, compared, failed, table
from tests.interop.matrix import MATRIX, Cell, first_of_each, selected
from tests.interop.reference import Reference, Source
from tests.interop.runtime import RUNTIMES, Runtime

JOURNAL = HOME.parent / "lines.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def main() -> int:
    """Print a line for each cell; the exit code says whether all agreed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="formats and runtimes, by name")
    parser.add_argument("--fast", action="store_true", help="one cell for each format in a runtime")
    parser.add_argument("--tokens", type=int, default=256, help="of text for a real model, a multiple of 128")
    parser.add_argument("--resume", action="store_true", help="keep what agreed in the last run, and run the rest")
    parser.add_argument(
        "--write", action="store_true", help="put all lines, those of a resumed run too, into docs/formats.md"
    )
    arguments = parser.parse_args()
    lines = [line for line in journal() if line.agreed] if arguments.resume else []
    cells = selected(MATRIX, arguments.only, {line.key for line in lines})
    if arguments.fast:
        cells = first_of_each(cells)
    JOURNAL.parent.mkdir(parents=True, exist_ok=True)
    JOURNAL.write_text("".join(f"{line.json}\n" for line in lines))
    for line in run(cells, arguments.tokens):
        print(line.row, f"  {line.note}", flush=True)
        lines.append(line)
        with JOURNAL.open("a") as file:
            file.write(f"{line.json}\n")
    if arguments.write:
        PAGE.write_text(between_marks(PAGE.read_text(), table(lines)))
    print(f"{sum(line.agreed for line in lines)} of {len(lines)} agreed")
    return 0 if all(line.agreed for line in lines) else 1


def journal() -> list[Line]:
    """The lines of the last run, if there was one."""
    return [Line.of_json(text) for text in JOURNAL.read_text().splitlines()] if JOURNAL.exists() else []


def run(cells: Iterable[Cell], n_tokens: int) -> Iterator[Line]:
    """One line for each runtime of each cell."""
    sources: dict[str, Source] = {}
    with tempfile.TemporaryDirectory(prefix="halfquad-interop-") as folder:
        for i, cell in enumerate(cells):
            if cell.model not in sources:
                sources = {cell.model: Source(cell.model, Path(folder, f"source-{i}"), n_tokens)}
            runtimes = [RUNTIMES[name] for name in cell.runtimes]
            yield from shown(sources[cell.model], cell.recipe, runtimes, Path(folder, "result"))


def shown(source: Source, recipe: Recipe, runtimes: list[Runtime], result: Path) -> Iterator[Line]:
    """One result in each of its runtimes."""
    try:
        quantize_checkpoint(source.folder, result, recipe)
        reference = Reference(source, recipe)
        for runtime in runtimes:
            yield tried(runtime, source, recipe, reference, result)
    except HalfquadError as error:
        yield from (failed(runtime, source, recipe, str(error)) for runtime in runtimes)
    finally:
        shutil.rmtree(result, ignore_errors=True)
        gc.collect()


def tried(runtime: Runtime, source: Source, recipe: Recipe, reference: Reference, result: Path) -> Line:
    """A runtime's line, whatever becomes of it."""
    start = time.perf_counter()
    try:
        answer = runtime.answer(result, source.task)
        line = compared(runtime, source, recipe, reference, answer, time.perf_counter() - start)
        if line.agreed or not runtime.tells_rounding:
            return line
        answer = runtime.answer(result, source.task | {"rounding": True})
        return compared(runtime, source, recipe, reference, answer, time.perf_counter() - start)
    except (RuntimeError, OSError, ValueError, subprocess.TimeoutExpired) as error:
        return failed(runtime, source, recipe, str(error))


if __name__ == "__main__":
    sys.exit(main())
