"""What can go wrong, as a tree; every message says what was looked at, what was got and what was wanted.

HalfquadError
├── SpecError            a setting that cannot exist (also a ValueError); `field` names it
│   └── FormatError      a setting that this format, or who reads it, cannot hold
├── CheckpointError      a source or a written folder that cannot be trusted; names the file
├── TensorError          a tensor that cannot be quantized; `tensor` names it
├── VerificationError    a result that is not what was solved; `name` names the tensor or file
├── EnergyError          input energies that cannot be had the way that was asked for
├── StorageFullError     no room left where the result is written
└── Cancelled            the caller asked to stop
"""

from __future__ import annotations


class HalfquadError(Exception):
    """Root of all errors raised on purpose here; `code` is stable and fit for programs."""

    code = "halfquad_error"


class SpecError(HalfquadError, ValueError):
    """A setting that cannot exist.

    Parameters
    ----------
    field : str
        Name of the setting, as the caller wrote it.
    message : str
        What was got and what was wanted.

    Attributes
    ----------
    recipe : int
        Which of several recipes it stands in, from 0.
    """

    code = "invalid_setting"
    recipe = 0

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class FormatError(SpecError):
    """A setting that is sound, but that the wanted format or its runtimes cannot hold."""

    code = "format_cannot_hold"


class CheckpointError(HalfquadError):
    """A checkpoint that is damaged, hostile or not a safetensors checkpoint."""

    code = "invalid_checkpoint"


class TensorError(HalfquadError):
    """A tensor whose values cannot be quantized."""

    code = "invalid_tensor"

    def __init__(self, tensor: str, message: str) -> None:
        super().__init__(f"{tensor}: {message}")
        self.tensor = tensor


class VerificationError(HalfquadError):
    """A result that is not what was solved, or not of the source it is held against.

    Parameters
    ----------
    name : str
        The tensor at fault, or the file.
    message : str
        What was got and what was wanted.
    """

    code = "result_damaged"

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


class EnergyError(HalfquadError):
    """Input energies that cannot be had the way that was asked for."""

    code = "energy_unavailable"


class StorageFullError(HalfquadError, OSError):
    """No room left for the result; what was half written is gone again."""

    code = "storage_full"


class Cancelled(HalfquadError):
    """The caller asked to stop; what was half written is gone again."""

    code = "cancelled"


def short(error: BaseException) -> str:
    """Type and first line, cut, of an error that other people's code raised: it may quote a whole config."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
