"""Energies measured on random token ids: the model's own forward pass, weight by weight from disk."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hqq_core.architectures import Role, role
from hqq_core.checkpoint import Checkpoint, ShardReader
from hqq_core.energy._correlations import CorrelationFile, Correlations
from hqq_core.energy._disk_weights import DiskWeights, Gather
from hqq_core.energy._energies import Energies
from hqq_core.energy._means import Means
from hqq_core.energy._progress import Progress, counted, stoppable
from hqq_core.energy._stored import Fed
from hqq_core.energy._threads import row_products, single_threaded
from hqq_core.errors import EnergyError, HalfquadError, short

Passed = Callable[[int, Energies], None]

N_TOKENS = 2048
WINDOW = 512
MIN_EXPERT_TOKENS = 64  # an expert that fewer tokens reach is shown others of its layer until it has seen as many
SEED = 0
EXPONENT = 1.0
MORE_PARAMETERS = 4  # times what the checkpoint has: tied and fused ones differ in number, not by more
MAX_BUFFER_NUMEL = 1 << 28  # a causal mask of 16k positions

_FETCHING = (
    "auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "use_kernels",
    "backbone", "use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs",
)  # fmt: skip
_FACTORIES = (torch.arange, torch.zeros, torch.ones, torch.full, torch.linspace, torch.eye, torch.rand, torch.randn)

_NUMBERED = re.compile(r".*?\.\d+\.")
_HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out|proj_out)\.weight")  # multiplied with what the base model gives


def synthetic(
    checkpoint: Checkpoint,
    *,
    n_tokens: int = N_TOKENS,
    seed: int = SEED,
    exponent: float = EXPONENT,
    correlations: Path | None = None,
    passed: Passed | None = None,
    progress: Progress | None = None,
) -> Energies:
    """Energies measured on random token ids.

    Parameters
    ----------
    checkpoint : Checkpoint
    n_tokens : int
        Rounded up to whole windows of at most `WINDOW`.
    seed : int
    exponent : float
        Tokens are drawn with p(id) ~ (id + 50) ** -exponent: tokenizers number tokens by how common they are.
    correlations : Path, optional
        A file for what the inputs of a weight have to do with each other; it must stay as long as the result is used.
    passed : callable, optional
        Gets the index of a weight file and what was measured for its tensors, when the pass has come beyond it. Most often that
        is all there will be, for layers follow each other in files; only the result knows.
    progress : callable, optional
        Gets the source bytes read so far; what it raises stops the work.

    Returns
    -------
    Energies
        The same bytes for any number of threads.

    Raises
    ------
    EnergyError
        transformers is not there, does not know the family, or cannot run the model.
    """
    shapes = _shapes(checkpoint)
    # one piece for all sums: small results that outlive large temporaries scatter the heap, here by 700 MB
    room = torch.empty(sum(_n_inputs(shape) for shape in shapes.values()), dtype=torch.float64)

    def allocate(like: torch.Tensor) -> torch.Tensor:
        nonlocal room
        piece, room = room[: like.numel()], room[like.numel() :]
        return piece

    means = Means(lambda x: x.square().sum(0, dtype=torch.float64), allocate)
    taken: dict[str, Any] = {"n_tokens": n_tokens, "seed": seed, "exponent": exponent, "progress": progress}
    gather = means.add if passed is None else _Passing(checkpoint, means, passed)
    if correlations is None:
        run(checkpoint, gather, **taken)
        found = None
    else:
        found = _correlated(checkpoint, gather, correlations, taken)
    vectors = _fitting(means.by_name(shapes), shapes, checkpoint.config)
    return Energies(
        vectors, dict.fromkeys(vectors, "synthetic"), correlations=found.only(set(vectors)) if found else None
    )


class _Passing:
    """Gathers means, and tells of each weight file when the pass is in a later one, in a layer that the file has nothing of."""

    def __init__(self, checkpoint: Checkpoint, means: Means, passed: Passed) -> None:
        self._means, self._passed, self._config = means, passed, checkpoint.config
        self._shapes = [{n: e.shape for n, e in entries.items()} for entries in checkpoint.headers().values()]
        self._file = {name: i for i, shapes in enumerate(self._shapes) for name in shapes}
        self._layers = [{_layer(name) for name in shapes} - {""} for shapes in self._shapes]
        self._next = 0

    def __call__(self, fed: Fed, x: torch.Tensor) -> None:
        self._means.add(fed, x)
        file, layer = max(self._file[name] for name in fed[0]), _layer(fed[0][0])
        while self._next < file and layer not in self._layers[self._next]:
            shapes = self._shapes[self._next]
            vectors = _fitting(self._means.by_name(shapes, shapes), shapes, self._config)
            self._passed(self._next, Energies(vectors, dict.fromkeys(vectors, "synthetic")))
            self._next += 1


def _layer(name: str) -> str:
    """The first numbered module on the way to a tensor; empty where there is none."""
    found = _NUMBERED.match(name)
    return found.group() if found else ""


def _correlated(checkpoint: Checkpoint, gather: Gather, path: Path, taken: dict[str, Any]) -> Correlations:
    """Run, and write correlations beside what is gathered; on any error there is no file."""
    with row_products(torch.get_num_threads()) as product:
        file = CorrelationFile(path, product)

        def both(fed: Fed, x: torch.Tensor) -> None:
            gather(fed, x)
            file.add(fed, x)

        try:
            run(checkpoint, both, **taken)
            return file.close()
        except BaseException:
            file.discard()
            raise


def run(
    checkpoint: Checkpoint,
    gather: Gather,
    *,
    n_tokens: int = N_TOKENS,
    seed: int = SEED,
    exponent: float = EXPONENT,
    progress: Progress | None = None,
) -> None:
    """Pass random token ids through the model, and to `gather` what each weight is multiplied with."""
    count, shapes = counted(progress), _shapes(checkpoint).values()
    with stoppable(), ExitStack() as files:
        files.enter_context(torch.no_grad())
        n_threads = files.enter_context(single_threaded())
        readers = {name: files.enter_context(checkpoint.shard(name)) for name in checkpoint.files}
        product = files.enter_context(row_products(n_threads))
        with _errors_explained(checkpoint, ()):  # it reads none of our files: an OSError there is transformers' own
            model = _build(checkpoint.config, len(shapes), count)
        files.enter_context(_errors_explained(checkpoint, (OSError,)))
        n_ids = max((shape[0] for shape in shapes if shape), default=0)
        inputs = _inputs(model, n_ids, n_tokens, exponent, torch.Generator().manual_seed(seed))
        with DiskWeights(model, readers, gather, product, count) as weights:
            _top_up_experts(model, weights)
            output = model(**inputs)
        _gather_heads(output, readers, gather)


@contextmanager
def _errors_explained(checkpoint: Checkpoint, passing: tuple[type[Exception], ...]) -> Iterator[None]:
    """Other people's code on a stranger's config: whatever goes wrong there, there is another way."""
    try:
        yield
    except HalfquadError:
        raise
    except passing:
        raise
    except ModuleNotFoundError as error:
        raise EnergyError(f"{error.name} is not installed (extra: evaluate)") from error
    except Exception as error:
        raise EnergyError(f"{_family(checkpoint.config)}: {short(error)}") from error


def _family(config: dict[str, Any]) -> str:
    return reprlib.repr(config.get("model_type"))


def _build(config: dict[str, Any], n_stored: int, count: Callable[[int], None]) -> Any:
    """The base model of transformers' own class, with parameters on the meta device and buffers as they are.

    Parameters
    ----------
    config : dict
    n_stored : int
        Tensors in the checkpoint: a config that makes many more parameters is not this checkpoint's.
    count : callable
        Called between parameters; what it raises stops the work.
    """
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    if config.get("model_type") not in tuple(CONFIG_MAPPING):
        raise EnergyError(f"model_type {_family(config)}: transformers has no such family of its own")
    own = CONFIG_MAPPING[config["model_type"]].from_dict(_without_code(config))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with _EmptyOnMeta(MORE_PARAMETERS * n_stored + MORE_PARAMETERS, count):
            model = AutoModel.from_config(
                own, trust_remote_code=False, dtype=torch.float32, experts_implementation="eager"
            )
    finally:
        logging.set_verbosity(verbosity)
    for part in (model.config, model.config.get_text_config(decoder=True)):
        part.use_cache = False  # keys and values of all layers would be held to the end
    return model.eval()


def _without_code(value: Any) -> Any:
    """A config without what would make transformers fetch code or another config: from the repository or from a Hub."""
    if isinstance(value, dict):
        return {
            key: _without_code(item)
            for key, item in value.items()
            if key not in _FETCHING and not key.startswith(("_experts_impl", "_attn_impl"))
        }
    return [_without_code(item) for item in value] if isinstance(value, list) else value


class _EmptyOnMeta(TorchFunctionMode):
    """Gives `torch.empty`, with which modules make their weights, no memory; computed buffers stay real, and within bounds.

    Parameters
    ----------
    most : int
        Weights that may be made.
    count : callable
        Called for each; what it raises stops the work.
    """

    def __init__(self, most: int, count: Callable[[int], None]) -> None:
        super().__init__()
        self._left, self._count = most, count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            self._left -= 1
            self._count(0)
            if self._left < 0:
                raise EnergyError("config makes many more weights than the checkpoint has")
            return func(*args, **kwargs | {"device": "meta"})
        if func in _FACTORIES and _n_asked(args, kwargs) > MAX_BUFFER_NUMEL:
            raise EnergyError(f"config makes a buffer of more than {MAX_BUFFER_NUMEL} numbers")
        return func(*args, **kwargs)


def _n_asked(args: Any, kwargs: dict[str, Any]) -> float:
    """About as many numbers as a factory is asked for: its sizes multiplied, or the end of its range."""
    numbers = [
        abs(value)
        for arg in (*args, *(kwargs.get(key) for key in ("size", "end")))
        for value in (arg if isinstance(arg, list | tuple) else [arg])
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return math.prod(max(number, 1) for number in numbers)


def _inputs(
    model: Any, n_ids: int, n_tokens: int, exponent: float, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Random token ids in windows; noise of the right shape for models that hear."""
    if model.main_input_name not in ("input_ids", "input_features"):
        raise EnergyError(f"input {model.main_input_name!r}: only token ids and input_features can be made up")
    text = model.config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None) or WINDOW
    if text.vocab_size > n_ids:
        raise EnergyError(f"vocab_size {text.vocab_size}: no tensor of the checkpoint has as many rows")
    length = max(1, min(WINDOW, positions - 2, n_tokens))  # RoBERTa counts positions from 2
    frequency = (torch.arange(text.vocab_size, dtype=torch.float64) + 50) ** -exponent
    drawn = torch.multinomial(frequency, math.ceil(n_tokens / length) * length, replacement=True, generator=generator)
    ids = drawn.view(-1, length)
    if model.main_input_name == "input_features":  # log-mel spectrograms are normalised
        config = model.config
        shape = (len(ids), config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": torch.randn(shape, generator=generator), "decoder_input_ids": ids}
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


def _top_up_experts(model: Any, weights: DiskWeights) -> None:
    """Show each expert at least `MIN_EXPERT_TOKENS`: where the router sends fewer, others of the same layer."""

    def show_more(module: Any, args: tuple[Any, ...], output: Any) -> None:
        hidden, chosen = args[0], args[1]
        n_experts = len(next(p for p in module.parameters(recurse=False) if p.ndim == 3))
        for expert, n in enumerate(torch.bincount(chosen.flatten(), minlength=n_experts).tolist()[:n_experts]):
            others = (chosen != expert).all(-1).nonzero().flatten()
            missing = min(MIN_EXPERT_TOKENS - n, len(others))
            if missing > 0:
                picked = hidden[others[:: len(others) // missing][:missing]]
                alone = torch.full((missing, 1), expert)
                type(module).forward(module, picked, alone, torch.ones(missing, 1))

    for module in model.modules():
        fused = [p for p in module.parameters(recurse=False) if p.ndim == 3 and weights.holds(p)]
        if fused and hasattr(module, "_is_expert_parallel"):  # transformers' fused experts: (hidden, chosen, weight)
            module.register_forward_hook(show_more)


def _gather_heads(output: Any, readers: dict[str, ShardReader], gather: Gather) -> None:
    """The base model ends before its head, which is multiplied with the last hidden state."""
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        return
    shapes = {name: entry.shape for reader in readers.values() for name, entry in reader.entries.items()}
    heads = [name for name, shape in shapes.items() if _HEAD.fullmatch(name) and shape[1:] == hidden.shape[-1:]]
    for name in heads:
        gather(((name,), None), hidden.reshape(-1, hidden.shape[-1]))


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for header in checkpoint.headers().values() for name, entry in header.items()}


def _n_inputs(shape: tuple[int, ...]) -> int:
    """Most numbers that a stored tensor's energies can have."""
    return 0 if len(shape) < 2 or 0 in shape else math.prod(shape[:-2]) * max(shape[-2:])


def _fitting(
    means: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Those that are finite and have a value per input column of the tensor as it is stored."""

    def fits(name: str, mean: torch.Tensor) -> bool:
        shape = shapes[name]
        columns = shape[0] if role(name, shape, config) is Role.CONV1D else shape[-1]
        stacked = len(shape) == 3 and mean.shape[0] == shape[0]
        return mean.shape[-1] == columns and (len(shape) == 2 or stacked)

    return {name: mean for name, mean in means.items() if fits(name, mean) and mean.isfinite().all()}
