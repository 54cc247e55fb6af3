"""Tensor names that end with the tensor's role: those of kohya, LyCORIS and diffusers, taken apart.

A name is a module's path and a suffix; the suffix says what the tensor is to the module. Sources: sd-scripts
`networks/lora.py`, LyCORIS 4.1 `modules/*.py` (`weight_list`), diffusers 0.42 `utils/state_dict_utils.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from loramgr.errors import IncompatibleError
from loramgr.tensorfile import TensorView

__all__ = ["DIFFUSERS_ROLES", "KOHYA_ROLES", "LYCORIS_ROLES", "Module", "modules_of", "split_name", "unexplained"]

KOHYA_ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
}
LYCORIS_ROLES = {
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")},
    **{f".{part}.weight": part for part in ("a1", "a2", "b1", "b2", "bm", "p_layer", "q_layer")},
    **{f".base_{part}": f"base_{part}" for part in ("p", "q", "lambda")},
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "w_norm",
    ".b_norm": "b_norm",
    ".oft_blocks": "oft_blocks",
    ".rescale": "rescale",
    ".on_input": "on_input",
    ".lambda_layer": "lambda_layer",
    ".scalar": "scalar",
}
DIFFUSERS_ROLES = {
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "lora_bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".alpha": "alpha",
}


@dataclass(frozen=True, slots=True)
class Module:
    """A module that an adapter updates: its name as the file has it, and its tensors by role."""

    name: str
    tensors: dict[str, TensorView] = field(default_factory=dict)

    def refused(self, problem: str, hint: str | None = None) -> IncompatibleError:
        """Return the error for tensors that do not make an update."""
        return IncompatibleError(f"module {self.name}: {problem}", hint)

    def shape(self, role: str) -> tuple[int, ...]:
        """Return the shape of the tensor in that role."""
        return self.tensors[role].spec.shape

    def need(self, *roles: str) -> None:
        """Raise IncompatibleError, naming the first of the roles that the file lacks."""
        for role in roles:
            if role not in self.tensors:
                there = ", ".join(sorted(self.tensors))
                raise self.refused(f"the file holds {there}, and no {role}")

    def allow(self, *roles: str) -> None:
        """Raise IncompatibleError, naming the first tensor that is in none of the roles."""
        others = sorted(set(self.tensors) - set(roles))
        if others:
            raise self.refused(f"the tensor {self.tensors[others[0]].spec.name} does not belong to its other tensors")


def split_name(name: str, roles: Mapping[str, str]) -> tuple[str, str] | None:
    """Return module and role of a tensor's name, by the longest suffix that fits; None where none does."""
    if not name.endswith(_ends(frozenset(roles))):
        return None
    found = max((suffix for suffix in roles if name.endswith(suffix)), key=len)
    return (name.removesuffix(found), roles[found]) if len(name) > len(found) else None


@cache
def _ends(suffixes: frozenset[str]) -> tuple[str, ...]:
    return tuple(suffixes)


def modules_of(
    tensors: Mapping[str, TensorView], roles: Mapping[str, str], renamed: Mapping[str, str] | None = None
) -> tuple[dict[str, Module], list[str]]:
    """Collect the tensors of every module; the second value lists the names that no suffix explains.

    `renamed` gives some modules another name, None none. Raises IncompatibleError when a module has two tensors in one
    role.
    """
    modules: dict[str, Module] = {}
    left: list[str] = []
    for name in sorted(tensors):
        parts = split_name(name, roles)
        if parts is None:
            left.append(name)
            continue
        path = parts[0] if renamed is None else renamed.get(parts[0], parts[0])
        module = modules.setdefault(path, Module(path))
        if parts[1] in module.tensors:
            raise module.refused(f"{module.tensors[parts[1]].spec.name} and {name} are the same tensor of it")
        module.tensors[parts[1]] = tensors[name]
    return modules, left


def unexplained(names: Iterable[str], many: int = 10) -> IncompatibleError:
    """Return the error for tensors that no rule of the format explains."""
    listed = sorted(names)
    more = f" and {len(listed) - many} more" if len(listed) > many else ""
    return IncompatibleError(f"no rule explains these tensors: {', '.join(listed[:many])}{more}")
