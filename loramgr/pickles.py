"""PyTorch `.bin` and `.pt` files: tensors only, no code (`torch.load(weights_only=True)`)."""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramgr.errors import IncompatibleError, IntegrityError, NotFoundError
from loramgr.tensorfile import LFS_MAGIC, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["MemoryTensor", "drop_shared", "read_pickle"]


@dataclass(frozen=True, slots=True)
class MemoryTensor:
    """A tensor in memory (or mapped from a file by torch), seen as a `TensorView`."""

    spec: TensorSpec
    tensor: torch.Tensor

    def read_bytes(self) -> memoryview:
        """Return the tensor's bytes, row-major and little-endian."""
        from loramgr.tensors import as_bytes

        return as_bytes(self.load())

    def load(self) -> torch.Tensor:
        """Return the tensor, contiguous."""
        return self.tensor.detach().contiguous()


# what torch and its unpickler raise for damaged bytes, beside their own error
_UNREADABLE = (
    RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, AssertionError, OverflowError,
    MemoryError, struct.error,
)  # fmt: skip
_SAVE = "save the adapter's tensors alone, by their names, best as safetensors"
_WRAPPERS = ("model_state_dict", "state_dict")
_BESIDE = frozenset({"epoch", "step", "global_step", "iteration", "iter"})


def read_pickle(path: Path, *, unwrap: bool = False) -> dict[str, MemoryTensor]:
    """Read a flat dictionary of tensors, mapped rather than loaded where the file allows it.

    With `unwrap` it may stand under `model_state_dict` or `state_dict`, with nothing beside it but counters.
    Names that share storage are all there; `drop_shared` says which of them a checkpoint keeps.
    Raises NotFoundError, IncompatibleError for a Git LFS pointer, for a pickle that holds anything but tensors or
    that would run code, and IntegrityError for a truncated file.
    """
    import torch

    try:
        with path.open("rb") as file:
            head = file.read(len(LFS_MAGIC))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise NotFoundError(f"{path}: no such file") from error
    if head == LFS_MAGIC:
        raise IncompatibleError(f"{path}: this is a Git LFS pointer, not the weights themselves", "git lfs pull")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle protocols before it refuses them
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK"))
    except pickle.UnpicklingError as error:
        raise _refusal(path, head, error) from error
    except _UNREADABLE as error:
        raise IntegrityError(f"{path}: not a readable PyTorch file: {_first_line(error)}") from error
    return _tensors(path, _unwrapped(path, content) if unwrap else content)


def _unwrapped(path: Path, content: Any) -> Any:
    wrapper = next((key for key in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)), None)
    if wrapper is None:
        return content
    others = [repr(key) for key in content if key != wrapper and key not in _BESIDE]
    if others:
        raise IncompatibleError(f"{path}: beside {wrapper} there is {', '.join(others[:5])}, which nothing explains")
    return content[wrapper]


def _refusal(path: Path, head: bytes, error: Exception) -> IncompatibleError | IntegrityError:
    """Tell a pickle that asks for code from one that is no pickle; torch has one exception for both."""
    unsafe = ("Unsupported global", "Unsupported class", "Unsupported operand", "not allowed", "Trying to")
    text = str(error)
    is_pickle = head.startswith((b"PK", b"\x80"))  # every protocol that torch.save writes begins so
    if is_pickle and any(phrase in text for phrase in unsafe):
        return IncompatibleError(
            f"{path}: the pickle holds more than tensors, or code to be run, and loramgr runs none: {_asked_for(text)}",
            "save it as safetensors where you trust it",
        )
    return IntegrityError(f"{path}: not a readable PyTorch file: {_first_line(error)}")


def _asked_for(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in lines if "GLOBAL" in line or "Unsupported" in line or "Trying" in line), lines[0])


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _tensors(path: Path, content: Any) -> dict[str, MemoryTensor]:
    import torch

    from loramgr.tensors import dtype_name

    if not isinstance(content, dict):
        raise IncompatibleError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors", _SAVE)
    tensors = {}
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            raise IncompatibleError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor", _SAVE)
        tensors[name] = MemoryTensor(TensorSpec(name, dtype_name(value.dtype), tuple(value.shape)), value)
    return tensors


def drop_shared(tensors: dict[str, MemoryTensor], yield_to_others: Iterable[str]) -> dict[str, str]:
    """Of the names that are one and the same tensor, say which ones `save_pretrained` leaves out.

    Returns left-out name → kept name. A name that ends with one of `yield_to_others` (the tied heads of
    transformers' model classes) yields to one that does not; else the first by code points is kept, as
    `safetensors.torch.save_model` does. Views of one storage that differ in place, shape or dtype are tensors of
    their own.
    """
    yielding = tuple(yield_to_others)
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, item in tensors.items():
        tensor = item.tensor
        if tensor.numel():
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            groups.setdefault(key, []).append(name)
    left_out: dict[str, str] = {}
    for names in groups.values():
        ordered = sorted(names, key=lambda name: (name.endswith(yielding), name))
        left_out.update((name, ordered[0]) for name in ordered[1:])
    return left_out
