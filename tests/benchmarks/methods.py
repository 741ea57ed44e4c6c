"""Ways to quantize a model in memory, each a generator of (tensor, dequantized weight).

The study puts a weight into the model before it asks for the next one: a method may look at the model as it has become.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

from hqq_core import QuantSpec, Recipe, energy, quantize
from hqq_core.energy import Correlations, Fold
from tests.benchmarks import calibrated, inputs, peers
from tests.benchmarks.inputs import Moments
from tests.benchmarks.subjects import Subject

Options = dict[str, str]
Solved = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Method:
    """A way to quantize and its options, written name:key=value,key=value."""

    label: str
    name: str
    options: Options

    @classmethod
    def parse(cls, label: str) -> Method:
        name, _, rest = label.partition(":")
        if name not in METHODS:
            raise SystemExit(f"method {name!r}: wanted one of {', '.join(METHODS)}")
        return cls(label, name, dict(pair.split("=", 1) for pair in rest.split(",") if pair))

    def solve(self, bench: Bench, nbits: int, group_size: int) -> Solved:
        return METHODS[self.name](bench, bench.subject.names(group_size), Setting(nbits, group_size, self.options))


@dataclass(frozen=True)
class Setting:
    """What a method is asked for."""

    nbits: int
    group_size: int
    options: Options

    def spec(self, **fixed: str) -> QuantSpec:
        """Our solver's settings: a preset, float zeros, and what options say of single fields."""
        options = self.options | fixed
        recipe = Recipe(nbits=self.nbits, group_size=self.group_size, preset=options.get("preset", "balanced"))
        fields = {key: int(options[key]) for key in ("iters", "starts") if key in options}
        fields |= {key: float(options[key]) for key in ("lp_norm", "beta", "kappa") if key in options}
        fields |= {key: options[key] for key in ("scale_dtype",) if key in options}
        return QuantSpec(**recipe.spec(options.get("zero", "float")).to_dict() | fields)

    def nearest(self) -> QuantSpec:
        """Round to nearest between the smallest and the largest weight."""
        return self.spec(iters="0", starts="1")


@dataclass
class Bench:
    """A subject, and what methods may want beside it: each energy is made once."""

    subject: Subject
    calibration: str
    sinq: Path | None = None
    _energies: dict[Iterable[tuple[str, str]], Moments] = field(default_factory=dict)

    @cached_property
    def folds(self) -> Fold:
        """All that a job on this source would apply."""
        merged = Fold()
        for fold in energy.fold(self.subject.checkpoint):
            if fold.columns.keys() | fold.rows.keys() <= self.subject.source.keys():
                for part in energy.PARTS:
                    getattr(merged, part).update(getattr(fold, part))
        return merged

    @cached_property
    def correlations(self) -> Correlations:
        """Those of random tokens, in a file that goes with the process."""
        path = Path(tempfile.mkdtemp(prefix="halfquad-")) / "correlations"
        atexit.register(shutil.rmtree, path.parent)
        found = energy.synthetic(self.subject.checkpoint, correlations=path).correlations
        assert found
        return found

    def energies(self, options: Options, default: str = "none") -> Moments:
        """Vectors by tensor name, as `energy`, `tokens`, `seed`, `offset`, `exponent` and `weigh` ask for them."""
        options = {"energy": default} | options
        key = tuple((key, options.get(key, "")) for key in ("energy", "tokens", "seed", "offset", "exponent", "weigh"))
        if key not in self._energies:
            self._energies[key] = self.measure(options["energy"], options)
        return self._energies[key]

    def measure(self, kind: str, options: Options) -> Moments:
        if kind == "none":
            return {}
        if kind == "analytic":
            return energy.analytic(self.subject.checkpoint).vectors
        if kind == "synthetic" and not options.keys() & {"offset", "exponent", "weigh"}:
            seen = {
                key: int(options[name]) for name, key in (("tokens", "n_tokens"), ("seed", "seed")) if name in options
            }
            return energy.synthetic(self.subject.checkpoint, **seen).vectors
        if kind in ("synthetic", "text"):
            return inputs.energies(self.subject, self.ids(kind, options), options.get("weigh", "alike"))
        raise SystemExit(f"energy {kind!r}: wanted none, analytic, synthetic or text")

    def ids(self, kind: str, options: Options) -> torch.Tensor:
        """Windows of calibration text, or of random tokens."""
        n_tokens = int(options.get("tokens", 2048))
        if kind == "text":
            return self.subject.windows(self.calibration, n_tokens, last=True)
        drawn = {key: float(options[key]) for key in ("offset", "exponent") if key in options}
        return inputs.random_ids(self.subject, n_tokens, int(options.get("seed", 0)), **drawn)


def rtn(bench: Bench, names: list[str], setting: Setting) -> Solved:
    """Round to nearest."""
    return solved(bench.subject, names, setting.nearest(), {})


def ours(bench: Bench, names: list[str], setting: Setting) -> Solved:
    """Our solver as a job has it (`fold=0`: without folds), on energies raised to `power`; `refresh` more rounds on those that
    the quantized model shows; `mean=1`: biases, where there are some, take up the mean error of the output.
    """
    subject, options = bench.subject, setting.options
    kind, power = options.get("energy", "none"), float(options.get("power", 1))
    vectors = bench.energies(options)
    folds = bench.folds if kind != "none" and options.get("fold") != "0" else Fold()
    recipe = Recipe(preset=options.get("preset", "balanced"), energy=kind)
    correlations = bench.correlations if recipe.correlated else None
    means = inputs.means(subject, bench.ids(kind, options)) if options.get("mean") == "1" else {}
    for round_ in range(int(options.get("refresh", 0)) + 1):
        if round_:
            vectors = bench.measure(kind, {"weigh": "alike"} | options)
        powers = {name: h**power for name, h in vectors.items()}
        for name, W_r in solved(subject, names, setting.spec(), powers, folds, correlations):
            bias = subject.bias(name) if name in means else None
            if bias is not None:
                bias += (subject.source[name].float() - W_r) @ means[name]
            yield name, W_r


def solved(
    subject: Subject,
    names: list[str],
    spec: QuantSpec,
    vectors: Moments,
    folds: Fold | None = None,
    correlations: Correlations | None = None,
) -> Solved:
    """Our solver on each weight alone; what folds multiply is divided out again, as norms and rows before do in a result."""
    folds = folds or Fold()
    for name in names:
        W, h = subject.source[name], vectors.get(name)
        columns, rows = folds.columns.get(name, torch.ones(W.shape[1])), folds.rows.get(name, torch.ones(len(W)))
        quantized = quantize(
            W, spec, energy=None if h is None else h / columns.square(), columns=columns, rows=rows,
            correlation=correlations.read(name) if correlations and name in correlations.places else None,
        )  # fmt: skip
        yield name, quantized.dequantize(torch.float32) / columns / rows[:, None]


def hqq(bench: Bench, names: list[str], setting: Setting) -> Solved:
    """The hqq package; `dtype` of its scales and zeros and of what it computes in."""
    return peers.hqq(bench.subject, names, setting.nbits, setting.group_size, setting.options.get("dtype", "float32"))


def hqq_beta(bench: Bench, names: list[str], setting: Setting) -> Solved:
    """Hqq with its main branch's fix of beta."""
    return peers.with_growing_beta(hqq(bench, names, setting))


def sinq(bench: Bench, names: list[str], setting: Setting) -> Solved:
    """SINQ."""
    return peers.sinq(bench.subject, names, setting.nbits, setting.group_size, _checkout(bench))


def presinq(bench: Bench, names: list[str], setting: Setting) -> Solved:
    """Pre-SINQ's folding (`n_iter`, `n_repeat`), and on it `then`: hqq, rtn or ours."""
    subject, options = bench.subject, setting.options
    n_iter, n_repeat = int(options.get("n_iter", 4)), int(options.get("n_repeat", 3))
    peers.fold_presinq(subject, _checkout(bench), setting.group_size, n_iter, n_repeat)
    with subject.rebased():
        if options.get("then", "hqq") == "ours":
            vectors = bench.measure(options.get("energy", "none"), {"weigh": "alike"} | options)
            power = float(options.get("power", 1))
            yield from solved(subject, names, setting.spec(), {name: h**power for name, h in vectors.items()})
        else:
            yield from METHODS[options.get("then", "hqq")](bench, names, setting)


def gptq(bench: Bench, names: list[str], setting: Setting) -> Solved:
    """GPTQ on calibration text, or (`data=synthetic`) random tokens; grid by min and max, or (`grid=ours`) our weighted one."""
    spec = setting.spec() if setting.options.get("grid") == "ours" else setting.nearest()
    ids = bench.ids(setting.options.get("data", "text"), setting.options)
    return calibrated.gptq(bench.subject, names, spec, ids, damp=float(setting.options.get("damp", 0.01)))


def awq(bench: Bench, names: list[str], setting: Setting) -> Solved:
    """AWQ's search for column scales on calibration text, or (`data=synthetic`) random tokens; `grid` as for gptq."""
    spec = setting.spec() if setting.options.get("grid") == "ours" else setting.nearest()
    ids = bench.ids(setting.options.get("data", "text"), setting.options)
    return calibrated.awq(bench.subject, names, spec, ids)


def stored(bench: Bench, names: list[str], setting: Setting) -> Solved:
    """Weights that another tool wrote to `folder`, dequantized; with every other parameter it wrote."""
    subject, folder = bench.subject, Path(setting.options["folder"])
    weights = {name: W for file in sorted(folder.glob("*.safetensors")) for name, W in load_file(file).items()}
    with subject.rebased(weights):
        for name in names:
            yield name, weights[name]


def _checkout(bench: Bench) -> Path:
    if bench.sinq is None:
        raise SystemExit("--sinq: wanted a checkout of SINQ's repository")
    return bench.sinq


METHODS: dict[str, Callable[[Bench, list[str], Setting], Solved]] = {
    "rtn": rtn, "ours": ours, "hqq": hqq, "hqq-beta": hqq_beta, "sinq": sinq, "presinq": presinq, "gptq": gptq, "awq": awq,
    "stored": stored,
}  # fmt: skip
