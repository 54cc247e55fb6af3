"""Module names of kohya, LyCORIS and diffusers, resolved against the modules of a base.

diffusers puts the pipeline's component first (`unet.down_blocks…`). kohya also writes underscores in place of dots; the
spelling loses which underscores were dots, so only the base's own names can say it, or those that its modules have in
another layout of the same model. A name that fits two modules, or none, is refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from loramgr.adapter import Decomposed, LowRank, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.factor_views import reshaped
from loramgr.formats.other_layouts import other_names
from loramgr.formats.row_pieces import Cut, joined, placed
from loramgr.tensorfile import TensorSpec

__all__ = ["ForeignNames", "component_of", "flattened", "is_spelled", "kohya_component"]

Separator = Literal["_", "."]
# what stands before a module's path: sd-scripts, LyCORIS (`lycoris_`), OneTrainer; diffusers and ComfyUI
_COMPONENT = {
    "_": re.compile(
        r"lora_(?:unet|te\d?|transformer|prior_unet|prior_te|text_encoder(?:_\d)?|llm_adapter)_|lycoris_|lora_"
    ),
    ".": re.compile(r"(?:unet|transformer(?:_2)?|text_encoder(?:_\d)?|prior|model\.diffusion_model|diffusion_model)\."),
}
_UNET = ("unet", "transformer", "model.diffusion_model", "diffusion_model")
_ROOTS = {
    "lora_unet_": _UNET,
    "lora_transformer_": _UNET,
    "lora_te_": ("text_encoder", "cond_stage_model.transformer"),
    "lora_te1_": ("text_encoder", "conditioner.embedders.0.transformer"),
    "lora_te2_": ("text_encoder_2", "conditioner.embedders.1.transformer"),
    "lora_te3_": ("text_encoder_3",),
    "unet.": _UNET,
    "diffusion_model.": _UNET,
    "transformer.": ("transformer",),
    "transformer_2.": ("transformer_2",),
    "text_encoder.": ("text_encoder", "cond_stage_model.transformer", "conditioner.embedders.0.transformer"),
    "text_encoder_2.": ("text_encoder_2", "conditioner.embedders.1.transformer"),
    "text_encoder_3.": ("text_encoder_3",),
}
# under which models lie in those that were trained: PEFT's and DDP's wrappers, heads of transformers, pipelines
_PREFIXES = frozenset(
    {
        *("base_model_model", "module", "model", "transformer", "text_model", "vision_model", "language_model"),
        *("model_language_model", "bert", "roberta", "distilbert", "albert", "electra", "deberta", "gpt_neox", "vit"),
        *("unet", "text_encoder", "diffusion_model", "model_diffusion_model"),
    }
)
_SPELLED = {
    "text_encoder_3.": "lora_te3_",
    "text_encoder_2.": "lora_te2_",
    "text_encoder.": "lora_te_",
    "unet.": "lora_unet_",
    "transformer.": "lora_unet_",
}
_HINT = "give the base that it was trained on with --base"
_WHOLE = (
    "give a base that has all of them: the checkpoint of the whole pipeline in one .safetensors file, not the folder "
    "of one of its models"
)


def flattened(module: str, separator: Separator = "_") -> str:
    """Return a module's name as the format spells it, without its component."""
    return module.replace(".", separator)


def component_of(name: str, separator: Separator = "_") -> str:
    """Return the prefix that says of what component a module is, with its last separator; empty for none."""
    match = _COMPONENT[separator].match(name)
    return match[0] if match and len(match[0]) < len(name) else ""


def is_spelled(flat: str, module: str) -> bool:
    """Say whether the flat name is the module's as kohya spells it, with or without the component's own name."""
    component = component_of(flat)
    rest = flat.removeprefix(component)
    starts = ("", *(f"{flattened(root)}_" for root in _ROOTS.get(component, ())))
    return flattened(module) in {f"{start}{rest}" for start in starts}


def kohya_component(module: str, *, is_pipeline: bool) -> tuple[str, str]:
    """Return kohya's prefix for a module and the rest of its name, without a pipeline's component.

    `transformer.` is a component only in the names of a pipeline (diffusers); elsewhere it is a part of the model.
    """
    for component, prefix in _SPELLED.items():
        if module.startswith(component) and (is_pipeline or not component.startswith("transformer")):
            return prefix, module.removeprefix(component)
    return ("lora_te_" if module.startswith("text_model.") else "lora_unet_"), module


@dataclass(frozen=True, slots=True)
class ForeignNames:
    """The modules of an adapter by the names that its file has, components first, parts joined by the separator."""

    modules: tuple[str, ...]
    separator: Separator

    @property
    def described(self) -> str:
        """What the names are until they are resolved, in a clause for a person."""
        if self.separator == "_":
            return "the names of kohya, with underscores in place of dots"
        return "the names of a pipeline's components"

    @property
    def is_needed(self) -> bool:
        """Whether the updates mean nothing before: dotted names are those of a pipeline, flat ones nobody's."""
        return self.separator == "_"

    def resolve(
        self, updates: Mapping[str, Update], specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> dict[str, Update]:
        """Return the updates by the base's names, their factors in the shape of its layers.

        Raises IncompatibleError, naming the module, where the base has none, or several, of that name.
        """
        model_type = (config or {}).get("model_type")
        prefixes = _PREFIXES | ({model_type} if isinstance(model_type, str) else set())
        others = other_names(specs)
        known = sorted({name.rpartition(".")[0] for name in specs if "." in name} | others.keys())
        bases = _Modules(known, self.separator, prefixes)
        found = self._found(bases)
        cuts: dict[str, list[Cut]] = {}
        for name, update in updates.items():
            module, _, parameter = name.rpartition(".")
            own = found.get(module, module)
            whole = {f"{own}.{parameter}": [Cut(name, update)]}
            for target, parts in (placed(name, update, others[own]) if own in others else whole).items():
                cuts.setdefault(target, []).extend(parts)
        return {target: _as_stored(joined(target, parts, specs), specs.get(target)) for target, parts in cuts.items()}

    def _found(self, bases: _Modules) -> dict[str, str]:
        """Return the base's name of every module; of components that it lacks the error says that others are there."""
        found: dict[str, str] = {}
        lacking: dict[str, IncompatibleError] = {}
        for component in sorted({component_of(module, self.separator) for module in self.modules}):
            mine = [name for name in self.modules if component_of(name, self.separator) == component]
            try:
                found |= bases.resolved(component, mine)
            except IncompatibleError as error:
                lacking[component] = error
        for component, why in lacking.items():
            others = ", ".join(sorted({component_of(name, self.separator) for name in found} - {""}))
            if not (others and component):
                raise why
            raise IncompatibleError(
                f"{why.message}: the base has the modules of {others} and not those of {component}", _WHOLE
            ) from why
        return found


def _as_stored(update: Update, spec: TensorSpec | None) -> Update:
    """Return the update for a layer of the tensor's dimensions: a 1×1 convolution is a linear layer and back."""
    if isinstance(update, Decomposed) and isinstance(update.inner, LowRank):
        return replace(update, inner=_low_rank_as_stored(update.inner, spec))
    return _low_rank_as_stored(update, spec) if isinstance(update, LowRank) else update


def _low_rank_as_stored(update: LowRank, spec: TensorSpec | None) -> LowRank:
    a, b = update.lora_A.spec.shape, update.lora_B.spec.shape
    if spec is None or len(spec.shape) == len(a) or len(spec.shape) < 2 or update.magnitude is not None:
        return update
    if set(a[2:]) - {1} or set(spec.shape[2:]) - {1}:
        return update
    ones = (1,) * (len(spec.shape) - 2)
    return replace(
        update,
        kind="conv" if ones else "linear",
        lora_A=reshaped(update.lora_A, (*a[:2], *ones)),
        lora_B=reshaped(update.lora_B, (*b[:2], *ones)),
    )


@dataclass(frozen=True, slots=True)
class _Modules:
    """The modules of a base, as names that the format may spell with the separator.

    `prefixes` are flattened modules that an adapter's names may have in front and the base's lack.
    """

    known: Collection[str]
    separator: Separator
    prefixes: frozenset[str]

    def resolved(self, component: str, modules: list[str]) -> dict[str, str]:
        """Return the base's name of every module of a component, by the change of prefix that drops the least."""
        rests = {module: module.removeprefix(component) for module in modules}
        roots = self._roots()
        for dropped in self._droppable(list(rests.values())):
            short = {module: rest.removeprefix(dropped) for module, rest in rests.items()}
            fitting = [root for root in roots if self._fits(root, short.values())]
            if fitting:
                names = self._under(_only(component, fitting, modules[0]))
                return {module: _one(module, names[rest]) for module, rest in short.items()}
        raise self._missing(rests)

    def _fits(self, root: str, names: Iterable[str]) -> bool:
        under = self._under(root)
        return all(name in under for name in names)

    def _droppable(self, rests: list[str]) -> Iterator[str]:
        """Yield the first parts that all the names share, the shortest first and none of them a number.

        Of flat names only what is known to be one component: any other start might be half of one.
        """
        parts = rests[0].split(self.separator)
        for end in range(len(parts)):
            dropped = "".join(f"{part}{self.separator}" for part in parts[:end])
            if (end and parts[end - 1].isdigit()) or not all(rest.startswith(dropped) for rest in rests):
                return
            if self.separator == "." or not end or dropped.removesuffix("_") in self.prefixes:
                yield dropped

    def _roots(self) -> list[str]:
        """Return the modules under which others lie before any number: what may stand before the adapter's names."""
        roots = {""}
        for name in self.known:
            parts = name.split(".")[:-1]
            numbers = [at for at, part in enumerate(parts) if part.isdigit()]
            roots.update(".".join(parts[:end]) for end in range(1, (numbers[0] if numbers else len(parts)) + 1))
        named = {root for listed in _ROOTS.values() for root in listed}
        roots.update(root for root in named if any(name.startswith(f"{root}.") for name in self.known))
        return sorted(roots)

    def _under(self, root: str) -> dict[str, list[str]]:
        """Return the modules under a root by their names in the format's spelling."""
        start = f"{root}." if root else ""
        found: dict[str, list[str]] = {}
        for name in self.known:
            if name.startswith(start):
                found.setdefault(flattened(name.removeprefix(start), self.separator), []).append(name)
        return found

    def _missing(self, rests: Mapping[str, str]) -> IncompatibleError:
        flat = {flattened(name, self.separator): name for name in self.known}
        absent = sorted(module for module, rest in rests.items() if rest not in flat) or sorted(rests)
        close = difflib.get_close_matches(rests[absent[0]], list(flat), 3, 0.6)
        nearest = f"; the closest are {', '.join(flat[name] for name in close)}" if close else ""
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        return IncompatibleError(f"the base has no module for {absent[0]}{more}{nearest}", _HINT)


def _only(component: str, fitting: list[str], module: str) -> str:
    """Return the one root, of several the one that the component is known by, else the one without a prefix."""
    named = [root for root in (*_ROOTS.get(component, ()), "") if root in fitting]
    if len(fitting) > 1 and not named:
        roots = " and ".join(repr(root) for root in fitting[:2])
        raise IncompatibleError(f"{module}: the base has modules of its name under {roots}: ambiguous", _HINT)
    return fitting[0] if len(fitting) == 1 else named[0]


def _one(module: str, names: list[str]) -> str:
    if len(names) > 1:
        raise IncompatibleError(
            f"{module} could be {names[0]} or {names[1]} of the base: a name with underscores in place of dots is "
            "ambiguous",
            "write the adapter with dotted names (PEFT, diffusers)",
        )
    return names[0]
