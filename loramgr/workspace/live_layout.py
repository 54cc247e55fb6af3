"""A model in memory as a merge sees it: its tensors by name, which names are one tensor, and its configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loramgr.checkpoints.families import TieGroup, tied_groups, tied_suffixes
from loramgr.errors import IncompatibleError, UsageError
from loramgr.pickles import MemoryTensor, drop_shared
from loramgr.tensorfile import TensorSpec
from loramgr.workspace.live_memory import extent, is_plain, overlaps
from loramgr.workspace.live_peft import base_name, refuse_wrapped_names, wrapped

if TYPE_CHECKING:
    import torch

__all__ = ["Layout", "named_tensors", "read_layout"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a model.

    `tensors` has one name of those that are one tensor, the one that `save_pretrained` would keep, `specs` what they
    are, and `ties` which other names there are; `config` is the model's configuration, None without one.
    """

    tensors: dict[str, torch.Tensor]
    specs: dict[str, TensorSpec]
    ties: list[TieGroup]
    config: dict[str, Any] | None

    def check_in_place(self, names: Iterable[str]) -> None:
        """Raise IncompatibleError, naming a tensor, unless their bytes can be changed, and no others' with them."""
        shared = overlaps(self.tensors)
        for name in names:
            tensor = self.tensors[name]
            if not is_plain(tensor):
                raise IncompatibleError(
                    f"{name} is a {type(tensor).__name__}, which may keep its weights in another form than it shows",
                    "attach to the unquantized model",
                )
            if tensor.device.type == "meta":
                raise IncompatibleError(f"{name} is on the meta device: it has no weights", "load the model's weights")
            if tensor.numel() > extent(tensor):
                raise IncompatibleError(f"elements of {name} share memory, so that it cannot be changed in place")
            if name in shared:
                raise IncompatibleError(
                    f"{name} and {shared[name]} share memory without being one tensor", "give each of them its own copy"
                )


def named_tensors(model: torch.nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a model's parameters and buffers, or a dictionary's tensors, by all their names.

    The components that torch.compile and PEFT put into names are left out, and so are the tensors of PEFT's own.
    Raises UsageError for anything else.
    """
    import torch

    if isinstance(model, torch.nn.Module):
        found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        found.update(model.named_buffers(remove_duplicate=False))
        wrappers = wrapped(model)
        own = ((base_name(name, wrappers), tensor) for name, tensor in found.items())
        return {name: tensor for name, tensor in own if name is not None}
    if isinstance(model, Mapping) and all(isinstance(tensor, torch.Tensor) for tensor in model.values()):
        return dict(model)
    raise UsageError(f"a {type(model).__name__} is neither a module nor a dictionary of tensors")


def read_layout(
    model: torch.nn.Module | Mapping[str, torch.Tensor], config: Mapping[str, Any] | None, *, keep_tied: bool
) -> Layout:
    """Look at a model or a dictionary of tensors; `config` is a dictionary's configuration, None without one.

    Which names are one tensor is what storage says. Of names that a dictionary leaves out, its configuration tells;
    without one, ties that may exist are `TieGroup`s that are not known, unless tied names are to change together.
    Raises IncompatibleError for a dictionary of a model that PEFT wrapped, since it cannot say what PEFT has merged.
    """
    named = named_tensors(model)
    if isinstance(model, Mapping):
        refuse_wrapped_names(named)
    specs = {name: _spec(name, tensor) for name, tensor in named.items()}
    aliases = _aliases(named, specs)
    own = {name: tensor for name, tensor in named.items() if name not in aliases}
    specs = {name: specs[name] for name in own}
    if isinstance(model, Mapping):
        ties = [tie for tie in tied_groups(config, list(own), aliases) if tie.known or not keep_tied]
        return Layout(own, specs, ties, None if config is None else dict(config))
    return Layout(own, specs, _shown(aliases), _configuration(model))


def _shown(aliases: Mapping[str, str]) -> list[TieGroup]:
    groups: dict[str, list[str]] = {}
    for left_out, kept in aliases.items():
        groups.setdefault(kept, []).append(left_out)
    return [TieGroup(kept, tuple(names)) for kept, names in groups.items()]


def _aliases(tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Return left-out name → kept name of those that are one tensor."""
    views = {
        name: MemoryTensor(specs[name], tensor)
        for name, tensor in tensors.items()
        if is_plain(tensor) and tensor.device.type != "meta"
    }
    return drop_shared(views, tied_suffixes(list(tensors)))


def _configuration(module: torch.nn.Module) -> dict[str, Any] | None:
    """Return the configuration of a transformers model, which other modules may be wrapped around."""
    for part in module.modules():
        to_dict = getattr(getattr(part, "config", None), "to_dict", None)
        if callable(to_dict):
            return dict(to_dict())
    return None


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    from loramgr.tensors import dtype_name

    try:
        dtype = dtype_name(tensor.dtype)
    except IncompatibleError:  # no file could hold it; binding refuses it by name when an adapter means it
        dtype = str(tensor.dtype)
    return TensorSpec(name, dtype, tuple(tensor.shape))
