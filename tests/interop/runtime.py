"""Runtimes: what loads a result, where it lives, and how near its arithmetic comes to the dequantized weights."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.interop.environment import Environment, Node, Own, Venv
from tests.interop.rounding import BLOCKS, PER_TOKEN

TIMEOUT_S = 900
EXACT = 1e-4  # of the largest logit: float32, with other sums, in a model that does not amplify them
TIMES_ROUNDING = 2  # half precision or 8 bit activations, with other sums than torch's


@dataclass(frozen=True)
class Arithmetic:
    """The types in which a reader dequantizes a weight, holds it and computes with it; None is the model's own.

    Parameters
    ----------
    dequantizes, holds, computes : str or None
        Names of torch types.
    activations : str or None
        How what a weight is multiplied with is rounded before: see `rounding`.
    """

    dequantizes: str | None = None
    holds: str | None = None
    computes: str | None = None
    activations: str | None = None

    def of(self, dtype: str) -> Arithmetic:
        """For a model of this type."""
        return Arithmetic(self.dequantizes or dtype, self.holds or dtype, self.computes or dtype, self.activations)

    @property
    def without_rounding(self) -> Arithmetic:
        """With the same weights, computed in float32."""
        return dataclasses.replace(self, computes="float32", activations=None)

    @property
    def rounds(self) -> bool:
        """Whether it computes in less than float32."""
        return self != self.without_rounding


WIDENED = Arithmetic(computes="float32")
FLOAT32 = Arithmetic("float32", "float32", "float32")
HALF = Arithmetic()


@dataclass(frozen=True)
class Runtime:
    """One loader.

    Parameters
    ----------
    name : str
    script : str
        In `runtimes/`.
    environment : Environment
    arithmetic : Arithmetic
    tells_rounding : bool
        Asked for it, it says what it loses itself in float32.
    """

    name: str
    script: str
    environment: Environment
    arithmetic: Arithmetic
    tells_rounding: bool = False

    def tolerated(self, rounding: float) -> float:
        """Largest difference to the reference that is no fault, relative to its largest value.

        `TIMES_ROUNDING` times `rounding`, which is what the reference, or the runtime with weights that are not packed, loses
        in this arithmetic; never less than `EXACT` where it computes in float32.
        """
        computes_exactly = self.arithmetic.computes == "float32" and not self.arithmetic.rounds
        return max(TIMES_ROUNDING * rounding, EXACT if computes_exactly else 0)

    def answer(self, folder: Path, task: dict[str, Any]) -> Answered:
        """What it computes for a folder; a RuntimeError has the last lines of what it said when it failed."""
        self.environment.prepare()
        with tempfile.TemporaryDirectory(prefix="halfquad-interop-") as output:
            asked = Path(output, "task.json")
            asked.write_text(json.dumps(task))
            ended = self.environment.run(self.script, folder, asked, Path(output), timeout_s=TIMEOUT_S)
            if ended.returncode:
                raise RuntimeError(_why(ended.stderr) or f"exit code {ended.returncode}")
            logits = Path(output, "logits.npy")
            fields = json.loads(Path(output, "answer.json").read_text())
            return Answered(**fields, logits=np.load(logits) if logits.exists() else None)


@dataclass(frozen=True)
class Answered:
    """What a runtime answered: `runtimes/protocol.py` says what each is."""

    greedy: list[int]
    logprobs: list[list[float]] | None
    layers: str
    versions: dict[str, str]
    logits: np.ndarray | None
    tokens: list[list[int]] | None = None
    rounding: float | None = None


def _why(stderr: str) -> str:
    """The last line that names an error, or the last at all."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0]]
    return (named or lines or [""])[-1][:300]


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime("transformers", "transformers_folder.py", Own(), WIDENED),
        Runtime("transformers (metal)", "transformers_folder.py", Own(), Arithmetic("float32", None, "float32")),
        Runtime("mlx-lm", "mlx_folder.py", Own(), FLOAT32, tells_rounding=True),
        Runtime(
            "mlx-lm (awq)", "mlx_folder.py", Own(), Arithmetic("float32", "float32")
        ),  # rounds -zero * scale to half
        Runtime("hqq", "hqq_library.py", Own(), FLOAT32),
        Runtime("transformers 4", "transformers_4.py", Venv("transformers4"), FLOAT32),
        Runtime("vLLM", "vllm_folder.py", Venv("vllm"), HALF),
        Runtime("gptqmodel", "gptqmodel_folder.py", Venv("gptqmodel"), HALF),
        Runtime("transformers (gguf)", "transformers_gguf.py", Own(), FLOAT32),
        Runtime(
            "llama.cpp", "llamacpp.mjs", Node("node"), Arithmetic("float32", "float32", "float32", activations=BLOCKS)
        ),
        Runtime(
            "transformers (bitnet)",
            "transformers_folder.py",
            Own(),
            Arithmetic(computes="float32", activations=PER_TOKEN),
        ),
    )
}
