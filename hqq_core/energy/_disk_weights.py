"""A model whose weights stay on disk: each torch function gets those it touches, read for it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hqq_core.checkpoint import ShardReader
from hqq_core.energy._stored import Fed, Stored, named_tensors, stored_parameters
from hqq_core.energy._threads import Multiply
from hqq_core.errors import EnergyError

Gather = Callable[[Fed, torch.Tensor], None]

_META = {"shape", "dtype", "ndim", "requires_grad", "is_meta", "layout", "grad", "is_leaf", "is_sparse", "is_quantized"}
_META_CALLS = {"size", "dim", "numel", "stride", "__len__", "is_floating_point", "element_size", "is_contiguous"}
# Function: positions of the input and the weight. Products with a weight of other layout than these have are not gathered: which
# of a square weight's axes are the inputs could not be told from its shape.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    torch.nn.functional.linear: (0, 1),  # (out, in)
    torch.addmm: (1, 2),  # Conv1D: (in, out)
}


class DiskWeights(TorchFunctionMode):
    """Parameters that live on disk while this is entered; `gather` sees the inputs of all products with them.

    Parameters
    ----------
    model : transformers model on the meta device
    readers : dict of str to ShardReader
    gather : callable
        Gets which stored tensors (and whose expert's slice) are multiplied, and with what: Tensor [shape=(n, in_features)].
    product : callable
        Gets how to multiply, and the input; gives the product.
    on_read : callable
        Gets the bytes of each tensor before it is read.
    """

    def __init__(
        self,
        model: Any,
        readers: dict[str, ShardReader],
        gather: Gather,
        product: Callable[[Multiply, torch.Tensor], torch.Tensor],
        on_read: Callable[[int], None],
    ) -> None:
        super().__init__()
        self._model, self._gather, self._product, self._on_read = model, gather, product, on_read
        self._homes = {name: reader for reader in readers.values() for name in reader.entries}
        stored = stored_parameters(model, list(self._homes))
        self._tensors = [tensor for _, tensor in named_tensors(model)]  # ids stay taken while this lives
        self._stored = {id(tensor): stored[name] for name, tensor in named_tensors(model) if name in stored}

    def holds(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter of the model is in the checkpoint."""
        return id(parameter) in self._stored

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        touched = [value for value in _flat(args, kwargs) if id(value) in self._stored]
        if touched:
            name = getattr(func, "__name__", "")
            if name == "__get__":
                name = func.__self__.__name__
                if name == "device":
                    return torch.device("cpu")  # where it will be when it is needed
            if name in _META or name in _META_CALLS:
                return func(*args, **kwargs)
            if func is torch.nn.functional.embedding:
                return self._embed(*args, **kwargs)
            if func is torch.Tensor.__getitem__ and self._is_expert(*args):
                return self._expert(args[0], int(args[1]))
        if func in _PRODUCTS:
            return self._multiply(func, args, kwargs)
        return func(*tree_map(self._real, args), **tree_map(self._real, kwargs)) if touched else func(*args, **kwargs)

    # reading

    def _real(self, value: Any) -> Any:
        stored = self._stored.get(id(value))
        return value if stored is None else self._load(stored, value)

    def _load(self, stored: Stored, like: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """A parameter, or one expert's part of it, converted as transformers converts it."""
        if stored.converter is None:
            tensor = self._read(stored.names[0], expert)
        else:
            converter = deepcopy(stored.converter)
            for pattern, names in stored.tensors.items():
                for name in names if expert is None else [names[expert]]:
                    converter.add_tensor(stored.name, name, pattern, lambda name=name: self._read(name))
            value = converter.convert(stored.name, model=self._model, config=self._model.config)[stored.name]
            tensor = value[0] if isinstance(value, list) or expert is not None else value
        wanted = like.shape if expert is None else like.shape[1:]
        if tensor.shape != wanted:
            raise EnergyError(f"{stored.name}: {tuple(tensor.shape)} in the checkpoint: config wants {tuple(wanted)}")
        return tensor.to(like.dtype)

    def _read(self, name: str, expert: int | None = None) -> torch.Tensor:
        home = self._homes[name]
        entry = home.entries[name]
        if expert is None:
            self._on_read(entry.nbytes)
            return home.read(name)
        if expert >= entry.shape[0]:
            raise EnergyError(f"{name}: {entry.shape[0]} experts in the checkpoint: config wants more")
        self._on_read(entry.nbytes // entry.shape[0])
        return home.rows(name, [expert])[0]

    def _embed(self, ids: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Rows of a table, read row by row; what else `embedding` takes concerns gradients."""
        stored = self._stored[id(weight)]
        if stored.converter is not None:
            return torch.nn.functional.embedding(ids, self._real(weight))
        [name] = stored.names
        shape = self._homes[name].entries[name].shape
        used, places = ids.unique(return_inverse=True)
        if (
            len(shape) != 2 or shape[1] != weight.shape[1] or int(used[-1]) >= shape[0]
        ):  # more rows than used are padding
            raise EnergyError(f"{name}: {shape} in the checkpoint: config wants {tuple(weight.shape)}")
        return self._homes[name].rows(name, used.tolist()).to(weight.dtype)[places]

    def _is_expert(self, parameter: torch.Tensor, index: Any) -> bool:
        """Whether `parameter[index]` is one expert's part of a fused one, which can be read alone."""
        single = isinstance(index, int) or (isinstance(index, torch.Tensor) and index.ndim == 0)
        stored = self._stored.get(id(parameter))
        if stored is None or not single or parameter.ndim < 2:
            return False
        return stored.converter is None or all(len(names) == len(parameter) for names in stored.tensors.values())

    def _expert(self, parameter: torch.Tensor, index: int) -> torch.Tensor:
        stored = self._stored[id(parameter)]
        tensor = self._load(stored, parameter, index)
        if parameter.ndim == 3:
            tensor._halfquad_fed = stored.fed(index)  # type: ignore[attr-defined]
        return tensor

    # multiplying

    def _multiply(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        at, weight_at = _PRODUCTS[func]
        weight = args[weight_at] if len(args) > weight_at else None  # transformers gives none of these by name
        stored = self._stored.get(id(weight))
        fed = getattr(weight, "_halfquad_fed", None) if stored is None else stored.fed(None)
        args, kwargs = tree_map(self._real, args), tree_map(self._real, kwargs)
        if fed is None or not args[at].numel():
            return func(*args, **kwargs)
        self._gather(fed, args[at].reshape(-1, args[at].shape[-1]))
        return self._product(lambda rows: func(*args[:at], rows, *args[at + 1 :], **kwargs), args[at])


def _flat(args: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value
