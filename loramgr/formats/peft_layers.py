"""One module's tensors in a PEFT adapter, checked and put together as updates of its parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

from loramgr.adapter import Decomposed, LowRank, LowRankKind, Opaque, Rows, Shift, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.expansion import block_diagonal, merged_linear
from loramgr.formats.peft_config import LoraSettings
from loramgr.formats.peft_keys import Role
from loramgr.tensorfile import TensorView

__all__ = ["Module", "decomposed", "grouped", "low_rank", "rows", "shift"]

_FACTORS: tuple[Role, ...] = ("lora_A", "lora_B", "embedding_A", "embedding_B", "lora_bias", "magnitude")
_MAX_CONVOLUTION = 5  # (out, in, depth, height, width)


@dataclass(frozen=True, slots=True)
class Module:
    """A module that the adapter updates: its name in the trained model and its tensors by role."""

    name: str
    tensors: dict[Role, TensorView] = field(default_factory=dict)

    @property
    def has_factors(self) -> bool:
        """Whether any tensor of LoRA is there."""
        return any(role in self.tensors for role in _FACTORS)

    @property
    def has_rows(self) -> bool:
        """Whether trained token rows are there."""
        return "rows" in self.tensors

    def refused(self, problem: str, hint: str | None = None) -> IncompatibleError:
        """Return the error for tensors that do not make an update."""
        return IncompatibleError(f"module {self.name}: {problem}", hint)

    def shape(self, role: Role) -> tuple[int, ...]:
        """Return the shape of the tensor in that role."""
        return self.tensors[role].spec.shape


def low_rank(module: Module, settings: LoraSettings, table: TensorView | None) -> LowRank:
    """Put the factors of a linear layer, embedding or convolution together, with `table` in the weight's place first.

    The rank is lora_A's first dimension; alpha and scaling follow the configuration's patterns. Raises
    IncompatibleError for half a pair, shapes that do not multiply, a rank the configuration contradicts, and for
    magnitudes or biases that are missing or that nobody announced. The magnitude of a convolution is left to
    `decomposed`.
    """
    a_role, b_role = _pair(module)
    module, slices = _expanded(module, settings)
    kind = _kind(module, a_role, b_role)
    rank = module.shape(a_role)[0] // slices
    if rank not in (ranks := settings.ranks_of(module.name)):
        raise module.refused(
            f"lora_A has rank {rank}, the configuration says {' or '.join(map(str, ranks))}",
            "correct r or rank_pattern in adapter_config.json: the scaling depends on it",
        )
    _check_magnitude(module, settings, kind, outputs=module.shape(b_role)[0])
    _check_bias(module, settings, kind)
    alpha = settings.alphas_of(module.name)[0]
    return LowRank(
        kind=kind,
        lora_A=module.tensors[a_role],
        lora_B=module.tensors[b_role],
        rank=rank * slices,
        alpha=alpha,
        scaling=settings.scaling(alpha, rank),
        fan_in_fan_out=settings.fan_in_fan_out and kind == "linear",
        magnitude=None if kind == "conv" else module.tensors.get("magnitude"),
        table=table,
    )


def decomposed(module: Module, update: LowRank) -> LowRank | Decomposed:
    """Return the update with the magnitude of a convolution around it; every other as it is."""
    magnitude = module.tensors.get("magnitude")
    return Decomposed(update, magnitude) if update.kind == "conv" and magnitude is not None else update


def grouped(module: Module) -> dict[str, Update] | None:
    """Return the factors of a grouped convolution as they are, which no product merges; None for any other layer."""
    shapes = [module.tensors[role].spec.shape for role in ("lora_A", "lora_B") if role in module.tensors]
    if len(shapes) != 2 or not 2 < len(shapes[0]) == len(shapes[1]) <= _MAX_CONVOLUTION:
        return None
    (total, *_), (_, rank, *kernel) = shapes
    if set(kernel) != {1} or not rank or total <= rank or total % rank:
        return None
    reason = f"module {module.name} is a grouped convolution ({total // rank} groups), whose delta PEFT does not define"
    views = [module.tensors[role] for role in sorted(module.tensors)]
    return {view.spec.name: Opaque(view, "lora", reason, total) for view in views}


def _expanded(module: Module, settings: LoraSettings) -> tuple[Module, int]:
    """Return the module with factors of the whole weight, and how many slices of it they are of."""
    tensors = dict(module.tensors)
    if settings.enabled is not None and {"lora_A", "lora_B"} <= tensors.keys() and len(module.shape("lora_B")) == 3:
        pair = merged_linear(module.name, tensors["lora_A"], tensors["lora_B"], settings.enabled)
        tensors["lora_A"], tensors["lora_B"] = pair
        return Module(module.name, tensors), sum(settings.enabled)
    side = settings.blocks.side(module.name) if settings.blocks is not None else None
    if side is not None and settings.blocks is not None and side in tensors:
        tensors[side] = block_diagonal(tensors[side], settings.blocks.count)
    return Module(module.name, tensors), 1


def _pair(module: Module) -> tuple[Role, Role]:
    pairs: tuple[tuple[Role, Role], ...] = (("lora_A", "lora_B"), ("embedding_A", "embedding_B"))
    present = [pair for pair in pairs if any(role in module.tensors for role in pair)]
    if len(present) != 1:
        found = ", ".join(sorted(module.tensors))
        raise module.refused(f"{found}: neither the factors of a layer nor those of an embedding")
    missing = [role for role in present[0] if role not in module.tensors]
    if missing:
        raise module.refused(f"the file holds no {missing[0].replace('embedding', 'lora_embedding')}")
    return present[0]


def _kind(module: Module, a_role: Role, b_role: Role) -> LowRankKind:
    """Return what layer the factors' shapes belong to, once they are known to multiply."""
    a, b = module.shape(a_role), module.shape(b_role)
    if len(a) < 2 or len(b) < 2 or 0 in a or 0 in b:
        raise module.refused(
            f"lora_A is {a} and lora_B is {b}: empty or flattened",
            "gather the shards (DeepSpeed ZeRO-3, FSDP) before saving the adapter",
        )
    if len(a) == len(b) == 2 and a[0] == b[1]:
        return "embedding" if a_role == "embedding_A" else "linear"
    if a_role == "lora_A" and 2 < len(a) == len(b) <= _MAX_CONVOLUTION and set(b[2:]) == {1} and a[0] == b[1]:
        return "conv"
    raise module.refused(f"lora_A is {a} and lora_B is {b}: the ranks do not fit each other")


def _check_magnitude(module: Module, settings: LoraSettings, kind: LowRankKind, outputs: int) -> None:
    if "magnitude" not in module.tensors:
        if settings.use_dora:
            raise module.refused("use_dora is set, and the file holds no lora_magnitude_vector")
        return
    if not settings.use_dora:
        raise module.refused("the file holds a lora_magnitude_vector, and use_dora is not set")
    shape = module.shape("magnitude")
    if kind == "conv" and shape == (1, outputs, *(1,) * (len(shape) - 2)):
        return
    if shape != (outputs,):
        raise module.refused(f"lora_magnitude_vector is {module.shape('magnitude')}, it must be ({outputs},)")


def _check_bias(module: Module, settings: LoraSettings, kind: LowRankKind) -> None:
    if "lora_bias" not in module.tensors:
        if settings.lora_bias and kind != "embedding":
            raise module.refused("lora_bias is set, and the file holds no lora_B.bias")
        return
    if not settings.lora_bias:
        raise module.refused("the file holds a lora_B.bias, and lora_bias is not set: PEFT would drop it")
    outputs = module.shape("lora_B")[0] if "lora_B" in module.tensors else None
    if module.shape("lora_bias") != (outputs,):
        raise module.refused(f"lora_B.bias is {module.shape('lora_bias')}, it must be ({outputs},)")


def shift(module: Module, scaling: float, table: TensorView | None) -> Shift | None:
    """Return what `lora_B.bias` adds to the module's bias; None where there is none."""
    vector = module.tensors.get("lora_bias")
    return None if vector is None else Shift(vector, scaling, table)


def rows(module: Module, indices: tuple[int, ...], table: TensorView | None) -> Rows:
    """Put trained token rows (len(indices), dim) and their indices together; IncompatibleError when they differ."""
    shape = module.shape("rows")
    if len(shape) != 2 or shape[0] != len(indices):
        raise module.refused(f"trainable_tokens_delta is {shape}, and the configuration lists {len(indices)} indices")
    return Rows(indices, module.tensors["rows"], table)
