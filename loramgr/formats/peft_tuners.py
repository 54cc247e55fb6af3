"""Adapters of PEFT's methods beside LoRA, module by module: the tensors' names taken apart, and one update of each.

Formulas and file layouts: PEFT 0.21.2, `tuners/<method>/layer.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loramgr.adapter import (
    Butterfly,
    Delta,
    Hadamard,
    Kronecker,
    LowRank,
    Orthogonal,
    Reflected,
    Replacement,
    Scale,
    Update,
)
from loramgr.errors import IncompatibleError
from loramgr.formats.configuration import Fields
from loramgr.formats.peft_config import LoraSettings, PeftSettings
from loramgr.formats.peft_keys import PREFIX
from loramgr.formats.peft_methods import TUNERS
from loramgr.tensorfile import TensorSpec, TensorView
from loramgr.views import ComputedTensor

if TYPE_CHECKING:
    import torch

__all__ = ["TunerModule", "split_tensors", "updates_of"]


@dataclass(frozen=True, slots=True)
class TunerModule:
    """A module that the adapter updates: its name in the trained model and its tensors by role."""

    name: str
    tensors: dict[str, TensorView] = field(default_factory=dict)

    def refused(self, problem: str, hint: str | None = None) -> IncompatibleError:
        """Return the error for tensors that do not make an update."""
        return IncompatibleError(f"module {self.name}: {problem}", hint)

    def take(self, role: str, dimensions: Iterable[int]) -> TensorView:
        """Return the tensor in that role; IncompatibleError where it is missing, empty or of another dimension."""
        view = self.tensors.get(role)
        if view is None:
            raise self.refused(f"the file holds no {role}")
        if len(view.spec.shape) not in dimensions or 0 in view.spec.shape:
            raise self.refused(f"{role} is {view.spec.shape}: empty, flattened, or of another layer")
        return view


def split_tensors(
    method: str, tensors: Mapping[str, TensorView]
) -> tuple[dict[str, TunerModule], dict[str, TensorView], dict[str, TensorView]]:
    """Return the modules of the method, what they share (VeRA's projections), and the rest of the tensors."""
    roles = "|".join(TUNERS[method].roles)
    own = re.compile(
        rf"{re.escape(PREFIX)}(?P<module>.+)\.(?P<role>{roles})"
        r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
    )
    modules: dict[str, TunerModule] = {}
    shared: dict[str, TensorView] = {}
    rest: dict[str, TensorView] = {}
    adapters: dict[str | None, str] = {}
    for name, view in tensors.items():
        match = own.fullmatch(name)
        if match is not None:
            role = match["role"] + (f".{match['leaf']}" if method == "LN_TUNING" else "")
            module = modules.setdefault(match["module"], TunerModule(match["module"]))
            if role in module.tensors:
                raise module.refused(f"{role} stands in the file twice")
            module.tensors[role] = view
            adapters.setdefault(match["adapter"], name)
        elif method == "VERA" and (found := re.fullmatch(r"base_model\.(vera_[AB])(?:\.[^.]+)?", name)):
            shared[found[1]] = view
        else:
            rest[name] = view
    if len(adapters) > 1:
        raise IncompatibleError(
            f"the tensors do not agree on one adapter's name: {', '.join(map(repr, sorted(adapters.values())))}",
            "save each adapter to a folder of its own",
        )
    return modules, shared, rest


def updates_of(method: str, settings: PeftSettings, modules: Mapping[str, TunerModule]) -> dict[str, Update]:
    """Turn every module's tensors into updates by parameter; raises IncompatibleError, naming the module.

    Not those of VeRA and MiSS, which need more than their own.
    """
    updates: dict[str, Update] = {}
    for name, module in modules.items():
        if 0 in {size for view in module.tensors.values() for size in view.spec.shape} and method == "ADALORA":
            continue  # all of its ranks were taken away: it changes nothing
        made = _MAKERS[method](module, settings)
        updates |= {f"{name}.{parameter}": update for parameter, update in made.items()}
    return updates


Made = dict[str, Update]


def _ia3(module: TunerModule, settings: PeftSettings) -> Made:
    vector = module.take("ia3_l", range(1, 6))
    flag = settings.fields.flag("fan_in_fan_out")
    names = settings.fields.names("feedforward_modules")
    shape = vector.spec.shape
    if vector.spec.elements not in shape:
        raise module.refused(f"ia3_l is {shape}, not one value for each input or output")
    if _is_named(module.name, names, settings.fields):
        return {"weight": Scale(vector, "input", flag)}
    return {"weight": Scale(vector, "output", flag), "bias": Scale(vector, "output", optional=True)}


def _is_named(module: str, names: tuple[str, ...], fields: Fields) -> bool:
    """Say whether a module is among those named: by the end of its name, or by an expression given alone."""
    value = fields.content.get("feedforward_modules")
    if isinstance(value, str):
        try:
            return re.fullmatch(value, module) is not None
        except re.error as error:
            raise fields.refused("feedforward_modules", f"a regular expression ({error})") from error
    return any(f".{module}".endswith(f".{name}") for name in names)


def _loha(module: TunerModule, settings: PeftSettings) -> Made:
    cores = [role for role in ("hada_t1", "hada_t2") if role in module.tensors]
    if len(cores) == 1:
        raise module.refused(f"the file holds {cores[0]} without the other one")
    views = [module.take(role, (2,)) for role in TUNERS["LOHA"].roles[:4]]
    rank = views[1].spec.shape[0]
    alpha, scaling = _alpha_and_scaling(module, _layer_settings(settings), rank)
    t1, t2 = (module.take(role, (4,)) if cores else None for role in ("hada_t1", "hada_t2"))
    return {"weight": Hadamard(views[0], views[1], views[2], views[3], rank, alpha, scaling, t1, t2)}


def _lokr(module: TunerModule, settings: PeftSettings) -> Made:
    layer = _layer_settings(settings)
    w1 = _factor(module, "lokr_w1", (2,))
    w2 = _factor(module, "lokr_w2", (2, 3, 4))
    core = module.take("lokr_t2", (4,)) if "lokr_t2" in module.tensors else None
    if core is not None and len(w2) == 1:
        raise module.refused("the file holds lokr_t2 beside a whole lokr_w2")
    pairs = [views[1].spec.shape[0] for views in (w1, w2) if len(views) == 2]
    ranks = layer.ranks_of(module.name)
    if not pairs and len(ranks) > 1:
        raise module.refused("rank_pattern gives it more than one rank, and its tensors do not say which")
    rank = pairs[0] if pairs else ranks[0]
    alpha, scaling = _alpha_and_scaling(module, layer, rank)
    return {"weight": Kronecker(w1, w2, rank if pairs else None, alpha, scaling, core)}


def _factor(module: TunerModule, role: str, dimensions: tuple[int, ...]) -> tuple[TensorView, ...]:
    halves = [half for half in (f"{role}_a", f"{role}_b") if half in module.tensors]
    if role in module.tensors and halves:
        raise module.refused(f"the file holds {role} and {halves[0]}")
    if halves:
        return module.take(f"{role}_a", (2,)), module.take(f"{role}_b", (2,))
    return (module.take(role, dimensions),)


def _adalora(module: TunerModule, settings: PeftSettings) -> Made:
    a, b, e = (module.take(role, (2,)) for role in ("lora_A", "lora_B", "lora_E"))
    rank = a.spec.shape[0]
    if b.spec.shape[1] != rank or e.spec.shape != (rank, 1):
        raise module.refused(f"lora_A is {a.spec.shape}, lora_B {b.spec.shape} and lora_E {e.spec.shape}")
    fields = settings.fields
    initial = fields.rank("init_r")
    kept = _kept_ranks(module, fields, initial)
    if rank not in (kept, initial):
        raise module.refused(f"lora_A has rank {rank}, the configuration says {kept}")
    alpha = fields.number("lora_alpha")
    scaling = (alpha if alpha > 0 else float(initial)) / (initial + 1e-5)
    scaled = ComputedTensor(TensorSpec(e.spec.name, "F64", a.spec.shape), lambda: a.load().double() * e.load().double())
    return {"weight": LowRank("linear", scaled, b, rank, alpha, scaling, fields.flag("fan_in_fan_out"))}


def _kept_ranks(module: TunerModule, fields: Fields, initial: int) -> int:
    """Return how many ranks the configuration's mask leaves the module."""
    for key, mask in fields.mapping("rank_pattern").items():
        if re.fullmatch(rf"{re.escape(module.name)}\.lora_E(\.[^.]+)?", key):
            if not (isinstance(mask, list) and len(mask) == initial and all(isinstance(each, bool) for each in mask)):
                raise fields.refused("rank_pattern", f"lists of {initial} times true or false")
            return sum(mask)
    return initial


def _oft(module: TunerModule, settings: PeftSettings) -> Made:
    fields = settings.fields
    if len(module.tensors) != 1:
        raise module.refused("tensors of a layer and of an embedding")
    role = next(iter(module.tensors))
    vectors = module.take(role, (2,))
    blocks, values = vectors.spec.shape
    size = (1 + math.isqrt(1 + 8 * values)) // 2
    if size * (size - 1) // 2 != values:
        raise module.refused(f"{role} is {vectors.spec.shape}, no triangles of skew-symmetric blocks")
    if fields.flag("block_share") and blocks != 1:
        raise module.refused(f"block_share is set, and {role} has {blocks} blocks")
    if fields.flag("coft"):
        vectors = _constrained(vectors, _freedom(fields))
    terms = None
    if fields.content.get("use_cayley_neumann") is None or fields.flag("use_cayley_neumann"):
        number = fields.content.get("num_cayley_neumann_terms")
        terms = 5 if number is None else fields.rank("num_cayley_neumann_terms")
    is_embedding = role == "oft_embedding_R"
    if is_embedding:  # an embedding is turned the other way: W R, and Rᵀ is R of -Q
        vectors = _negated(vectors)
    flags = fields.flag("fan_in_fan_out"), fields.flag("block_share")
    return {"weight": Orthogonal(vectors, size, terms, *flags, is_embedding)}


def _negated(view: TensorView) -> ComputedTensor:
    return ComputedTensor(view.spec, lambda: -view.load())


def _freedom(fields: Fields) -> float:
    """Return how far COFT lets the rotations go, by default as PEFT does."""
    eps = 6e-5 if fields.content.get("eps") is None else fields.number("eps")
    if eps <= 0:
        raise fields.refused("eps", "a number above 0")
    return eps


def _constrained(view: TensorView, eps: float) -> ComputedTensor:
    """Return the triangles with every block's skew-symmetric matrix brought back to the norm eps / √blocks (COFT)."""
    spec = TensorSpec(view.spec.name, "F64", view.spec.shape)
    largest = eps / math.sqrt(view.spec.shape[0])

    def make() -> torch.Tensor:
        vectors = view.load().double()
        norms = (2.0 * vectors * vectors).cumsum(1)[:, -1:].sqrt()  # both triangles; a cumulative sum has one order
        return vectors * (largest / norms.clamp(min=largest))

    return ComputedTensor(spec, make)


def _hra(module: TunerModule, settings: PeftSettings) -> Made:
    vectors = module.take("hra_u", (2,))
    rank = settings.fields.rank("r")
    if vectors.spec.shape[1] != rank:
        raise module.refused(f"hra_u is {vectors.spec.shape}, the configuration says rank {rank}")
    return {"weight": Reflected(vectors, settings.fields.flag("apply_GS"))}


def _c3a(module: TunerModule, settings: PeftSettings) -> Made:
    """W + C / inputs, every block of C circulant with the kernel as its first row (C3A, arXiv 2407.19342)."""
    kernel = module.take("c3a_kernel", (3,))
    rows, columns, size = kernel.spec.shape
    spec = TensorSpec(kernel.spec.name, kernel.spec.dtype, (rows * size, columns * size))

    def make() -> torch.Tensor:
        import torch

        places = (torch.arange(size)[None] - torch.arange(size)[:, None]) % size
        return kernel.load()[:, :, places].transpose(1, 2).reshape(spec.shape)

    return {"weight": Delta(ComputedTensor(spec, make), 1.0 / (columns * size))}


def _boft(module: TunerModule, settings: PeftSettings) -> Made:
    blocks, scale = module.take("boft_R", (4,)), module.take("boft_s", (2,))
    factors, count, size, other = blocks.spec.shape
    fits = size == other and 1 in scale.spec.shape
    if factors > 1:
        fits = fits and size % 2 == 0 and count % (1 << (factors - 1)) == 0
    if not fits:
        raise module.refused(f"boft_R is {blocks.spec.shape} and boft_s {scale.spec.shape}")
    return {"weight": Butterfly(blocks, scale, settings.fields.flag("fan_in_fan_out"))}


def _ln_tuning(module: TunerModule, settings: PeftSettings) -> Made:
    return {role.rpartition(".")[2]: Replacement(view) for role, view in module.tensors.items()}


def _layer_settings(settings: PeftSettings) -> LoraSettings:
    if settings.lora is None:
        raise ValueError("the method has no rank")
    return settings.lora


def _alpha_and_scaling(module: TunerModule, layer: LoraSettings, rank: int) -> tuple[float, float]:
    ranks = layer.ranks_of(module.name)
    if rank not in ranks:
        raise module.refused(f"its tensors have rank {rank}, the configuration says {' or '.join(map(str, ranks))}")
    alpha = layer.alphas_of(module.name)[0]
    return alpha, layer.scaling(alpha, rank)


_MAKERS: dict[str, Callable[[TunerModule, PeftSettings], Made]] = {
    "IA3": _ia3,
    "LOHA": _loha,
    "LOKR": _lokr,
    "ADALORA": _adalora,
    "OFT": _oft,
    "BOFT": _boft,
    "C3A": _c3a,
    "HRA": _hra,
    "LN_TUNING": _ln_tuning,
}
