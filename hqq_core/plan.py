"""build_plan(): what becomes of every tensor, why, and how many bytes it takes, before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hqq_core.architectures import Role, role, ties_head
from hqq_core.checkpoint import Checkpoint
from hqq_core.energy import Energies, Fold
from hqq_core.errors import CheckpointError, FormatError, SpecError
from hqq_core.formats import check_model, check_recipe, settled, writer_for, writer_of
from hqq_core.formats.base import CheckpointWriter, Layout
from hqq_core.outputs import output_folders
from hqq_core.recipe import Recipe
from hqq_core.safetensors_file import DTYPES, TensorEntry, tensor_nbytes
from hqq_core.solver import SOLVABLE_DTYPES, resolve_group_size
from hqq_core.spec import QuantSpec

VERSION = 4
EMPTY_FILE_NBYTES = 64  # a header without tensors, and its padding


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What becomes of one tensor.

    Parameters
    ----------
    name, dtype : str
        As in the source; dtype in safetensors' words.
    shape : tuple of int
    shard, file : str
        The file it is read from and the one it is written to.
    spec : QuantSpec or None
        None: copied unchanged.
    reason : str
        Why it is quantized or copied.
    nbytes_in, nbytes_out : int
    energy : {"synthetic", "analytic", "none"} or None
        Where the weights of its columns come from; None: copied, nothing is weighted.
    preset : str or None
        The recipe's, of which `spec` has the solver's steps and starts; None: copied.
    folded : tuple of {"columns", "rows", "values"}
        What a fold does to it; see `energy.Fold`.
    correlated : bool
        The solver goes on with correlations between its inputs.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    file: str
    spec: QuantSpec | None
    reason: str
    nbytes_in: int
    nbytes_out: int
    energy: str | None = None
    preset: str | None = None
    folded: tuple[str, ...] = ()
    correlated: bool = False

    @property
    def solver(self) -> str | None:
        """What the solver does with it; None: copied."""
        if self.spec is None:
            return None
        if self.spec.iters == 0 and self.spec.starts == 1:
            return "round to nearest"
        if self.correlated:
            return "least squares, coordinate descent"
        return "least squares" if self.spec.lp_norm == 2 else "half-quadratic"

    @property
    def problem(self) -> tuple[QuantSpec | None, str | None, tuple[str, ...], bool]:
        """What the solver is given: plans that agree on it share what it finds."""
        return self.spec, self.energy, self.folded, self.correlated

    @property
    def module(self) -> str:
        """The module whose weight this is."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The work on one input file."""

    index: int
    file: str
    tensors: tuple[TensorPlan, ...]

    @property
    def nbytes_in(self) -> int:
        """Bytes of tensor data to read."""
        return sum(tensor.nbytes_in for tensor in self.tensors)

    @property
    def nbytes_out(self) -> int:
        """Bytes of tensor data to write."""
        return sum(tensor.nbytes_out for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one recipe makes of a checkpoint; `shards` are independent of each other.

    Parameters
    ----------
    recipe : Recipe
    spec : QuantSpec
    shards : tuple of ShardPlan
    carried, left_out : tuple of str
        Names of the other files of the folder that come along, and of those that do not.
    energy_note : str
        Why input energies of a better source were not to be had; empty where they were.
    folder : str
        Where below the job's output the result lies; empty: there.
    """

    recipe: Recipe
    spec: QuantSpec
    shards: tuple[ShardPlan, ...]
    carried: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    energy_note: str = ""
    folder: str = ""
    version: int = VERSION

    @property
    def tensors(self) -> Iterator[TensorPlan]:
        """All tensors, shard by shard."""
        return (tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def nbytes_in(self) -> int:
        """Bytes of tensor data to read."""
        return sum(shard.nbytes_in for shard in self.shards)

    @property
    def nbytes_out(self) -> int:
        """Bytes of tensor data to write."""
        return sum(shard.nbytes_out for shard in self.shards)

    @property
    def finish_nbytes(self) -> int:
        """Bytes that the finish needs beside what the shards wrote."""
        return writer_of(self.recipe).container.finish_nbytes(self.nbytes_out)

    def with_energies(self, energies: Energies) -> Plan:
        """The same plan, weighted by input energies and folded wherever there is what it takes.

        A group along axis 0 lies within one column, whose weight and factor change nothing there.
        """
        if not self.recipe.weighted:
            return self
        folded = self._folded(energies.folds) if self.recipe.fold else {}
        correlated = energies.correlations.places if energies.correlations and self.recipe.correlated else {}

        def profiled(tensor: TensorPlan) -> TensorPlan:
            own = folded.get(tensor.name, ())
            if tensor.spec is None:
                return dataclasses.replace(tensor, folded=own)
            source = energies.source(tensor.name)
            return dataclasses.replace(
                tensor, folded=own, energy=source, correlated=source == "synthetic" and tensor.name in correlated
            )

        shards = (dataclasses.replace(shard, tensors=tuple(map(profiled, shard.tensors))) for shard in self.shards)
        return dataclasses.replace(self, shards=tuple(shards), energy_note=energies.note)

    def _folded(self, folds: Iterable[Fold]) -> dict[str, tuple[str, ...]]:
        """By tensor, what the folds do to it that can be applied: all their weights are quantized, the rest is copied."""
        quantized = {tensor.name: tensor.spec is not None for tensor in self.tensors}
        found: dict[str, tuple[str, ...]] = {}
        for fold in folds:
            parts = [("columns", fold.columns), ("rows", fold.rows), ("values", fold.values)]
            if all(quantized.get(name) is (part != "values") for part, names in parts for name in names):
                for part, names in parts:
                    found |= {name: (*found.get(name, ()), part) for name in names}
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        fields = dataclasses.asdict(self)
        return fields | {"recipe": self.recipe.to_dict()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Plan:
        """Build from `to_dict`'s result, also after a trip through JSON."""
        if fields["version"] != VERSION:
            raise CheckpointError(f"plan of version {fields['version']!r}: wanted {VERSION}")
        return cls(
            recipe=Recipe.from_dict(fields["recipe"]),
            spec=QuantSpec.from_dict(fields["spec"]),
            shards=tuple(_shard_from_dict(shard) for shard in fields["shards"]),
            carried=tuple(fields["carried"]),
            left_out=tuple(fields["left_out"]),
            energy_note=fields["energy_note"],
            folder=fields["folder"],
        )


def build_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Decide on every tensor of a checkpoint from its headers alone.

    Raises
    ------
    FormatError, SpecError
        The recipe asks for what the format or this checkpoint cannot give; names the setting.
    """
    return build_plans(checkpoint, [recipe])[0]


def build_plans(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> tuple[Plan, ...]:
    """A plan for each recipe of one job, of the same shards.

    Raises
    ------
    FormatError, SpecError
        As `build_plan`, and as `outputs.output_folders`.
    """
    folders = output_folders(recipes)
    headers = checkpoint.headers()
    carried, left_out = map(tuple, checkpoint.carried_files())
    plans = []
    for folder, recipe in zip(folders, map(settled, recipes), strict=True):
        spec, shards = _plan_shards(checkpoint, headers, recipe)
        plans.append(Plan(recipe, spec, shards, carried, left_out, folder=folder))
    return tuple(plans)


def _plan_shards(
    checkpoint: Checkpoint, headers: dict[str, dict[str, TensorEntry]], recipe: Recipe
) -> tuple[QuantSpec, tuple[ShardPlan, ...]]:
    spec, writer = check_recipe(recipe), writer_for(recipe, checkpoint)
    _check_names(recipe, [entry for file in headers.values() for entry in file.values()], checkpoint)
    tensors = [
        _plan_tensor(entry, shard, checkpoint, recipe, spec, writer)
        for shard, entries in headers.items()
        for entry in entries.values()
    ]
    if not any(tensor.spec for tensor in tensors):
        raise CheckpointError(f"none of {len(tensors)} tensors can be quantized: {_main_obstacle(tensors)}")
    _check_roles(tensors, writer, recipe, checkpoint.config)
    tensors = _assign_files(tensors, recipe, writer)
    return spec, tuple(
        ShardPlan(index, name, tuple(tensor for tensor in tensors if tensor.shard == name))
        for index, name in enumerate(headers)
    )


def _check_roles(tensors: list[TensorPlan], writer: CheckpointWriter, recipe: Recipe, config: dict[str, Any]) -> None:
    roles: dict[bool, set[Role]] = {True: set(), False: set()}
    for tensor in tensors:
        roles[tensor.spec is not None].add(role(tensor.name, tensor.shape, config))
    check_model(writer, recipe, roles[True], roles[False], config)


def stored_tensors(tensor: TensorPlan, writer: CheckpointWriter) -> Layout:
    """What will be stored for one tensor: name, type in the words of the writer's container, and shape of each."""
    if tensor.spec:
        return writer.layout(tensor.module, tensor.shape, tensor.dtype, tensor.spec)
    layout = writer.layout_copied(tensor.name, tensor.dtype, tensor.shape)
    return [(tensor.name, tensor.dtype, tensor.shape)] if layout is None else layout


def _plan_tensor(
    entry: TensorEntry, shard: str, checkpoint: Checkpoint, recipe: Recipe, spec: QuantSpec, writer: CheckpointWriter
) -> TensorPlan:
    kind = role(entry.name, entry.shape, checkpoint.config)
    own = writer.tensor_spec(spec, entry.name, entry.shape, entry.dtype) if _solvable(entry) else spec
    reason = _why_copied(entry, kind, recipe, own, writer, checkpoint)
    nbytes = tensor_nbytes(entry.dtype, entry.shape)
    tensor = TensorPlan(entry.name, entry.dtype, entry.shape, shard, "", None, reason or kind.value, nbytes, nbytes)
    if reason is None:
        tensor = dataclasses.replace(tensor, spec=own, energy="none", preset=recipe.preset)
    return dataclasses.replace(tensor, nbytes_out=writer.container.nbytes(stored_tensors(tensor, writer)))


def _why_copied(
    entry: TensorEntry, kind: Role, recipe: Recipe, spec: QuantSpec, writer: CheckpointWriter, checkpoint: Checkpoint
) -> str | None:
    """The reason to copy a tensor, or None; FormatError where the user asked for what cannot be."""
    module = entry.name.rpartition(".")[0]
    if _named(module, recipe.skip_modules):
        return "skip_modules names it"
    asked = entry.name.endswith(".weight") and _named(module, recipe.include_modules)
    if not asked and kind not in writer.quantized:
        return str(kind.value)
    reason = _obstacle(entry, kind, spec, writer)
    if asked and kind is Role.HEAD and ties_head(checkpoint.config):
        reason = "tied to the input embedding by config.json"
    if asked and reason:
        raise FormatError("include_modules", f"{module}: cannot be quantized: {reason}")
    return reason


def _obstacle(entry: TensorEntry, kind: Role, spec: QuantSpec, writer: CheckpointWriter) -> str | None:
    """What keeps a tensor from being quantized, whoever asks."""
    if not _solvable(entry):
        return f"dtype {entry.dtype} is not solved"
    try:
        resolve_group_size(entry.shape, spec)
    except SpecError as error:
        return str(error)
    return writer.refusal(kind, entry.shape, spec)


def _solvable(entry: TensorEntry) -> bool:
    return DTYPES[entry.dtype] in SOLVABLE_DTYPES


def _named(module: str, names: Iterable[str]) -> bool:
    """Whether `names` has the module's full name or last parts of it."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def _check_names(recipe: Recipe, entries: list[TensorEntry], checkpoint: Checkpoint) -> None:
    """A name that matches nothing is a slip of the pen: say so."""
    modules = {entry.name.rpartition(".")[0] for entry in entries}
    for field in ("include_modules", "skip_modules"):
        for name in getattr(recipe, field):
            if not any(_named(module, [name]) for module in modules):
                head = name.rpartition(".")[2] == "lm_head" and ties_head(checkpoint.config)
                why = (
                    " (config.json ties the output head to the input embedding)" if head else ": wanted its last parts"
                )
                raise SpecError(field, f"{field} {name!r}: no such module in the checkpoint{why}")


def _assign_files(tensors: list[TensorPlan], recipe: Recipe, writer: CheckpointWriter) -> list[TensorPlan]:
    """Cut each shard's tensors, in order, into files no larger than the limit, and number all files through."""
    numbers: list[int] = []
    seen: set[str] = set()
    current, size, shard = 0, 0, ""
    for tensor in tensors:
        stored = stored_tensors(tensor, writer)
        for name, _, _ in stored:
            if name in seen:
                raise CheckpointError(
                    f"{tensor.shard}: what {tensor.name!r} becomes would be stored as {name!r}, a name taken"
                )
            seen.add(name)
        nbytes = tensor.nbytes_out + writer.container.header_nbytes(stored)
        if tensor.shard != shard or size + nbytes > recipe.max_shard_nbytes:
            current, size, shard = current + 1, EMPTY_FILE_NBYTES, tensor.shard
        size += nbytes
        numbers.append(current)
    return [
        dataclasses.replace(tensor, file=writer.container.part_name(number, current))
        for tensor, number in zip(tensors, numbers, strict=True)
    ]


def _main_obstacle(tensors: list[TensorPlan]) -> str:
    """The commonest reason among tensors that are not copied for what they are."""
    by_role = {kind.value for kind in Role}
    reasons = [tensor.reason for tensor in tensors if tensor.reason not in by_role]
    return max(reasons, key=reasons.count, default="there is no linear layer among them")


def _shard_from_dict(fields: dict[str, Any]) -> ShardPlan:
    return ShardPlan(fields["index"], fields["file"], tuple(_tensor_from_dict(tensor) for tensor in fields["tensors"]))


def _tensor_from_dict(fields: dict[str, Any]) -> TensorPlan:
    spec = fields["spec"]
    return TensorPlan(
        **fields
        | {
            "shape": tuple(fields["shape"]),
            "folded": tuple(fields["folded"]),
            "spec": None if spec is None else QuantSpec.from_dict(spec),
        }
    )
