"""Makes of every tensor that a fine-tune changed what an adapter has of it: factors, or the tensor as it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loramgr.algebra.goals import Goal
from loramgr.checkpoints.streaming import Budget
from loramgr.errors import IncompatibleError
from loramgr.formats.peft_writer import WrittenFactors, WrittenTensor
from loramgr.records import ModuleError
from loramgr.tensorfile import FLOAT_DTYPES, Data, FileTensor, TensorSpec
from loramgr.workspace.differing import Changed, Comparison, read_checked
from loramgr.workspace.home import Home
from loramgr.workspace.loading import loading_torch
from loramgr.workspace.sources import OpenBase

if TYPE_CHECKING:
    import torch

    from loramgr.algebra.extraction import Extraction

__all__ = ["Factoring"]

_MEMORY = 2 << 30  # bytes of matrices in the making; a larger one is made alone
_BYTES = 40  # that a value of a tensor takes meanwhile: both models', their difference, and what is computed of it


@dataclass
class Factoring:
    """Computes factors module by module; they wait in a file, so that their number is not bound by memory."""

    home: Home
    comparison: Comparison
    goal: Goal
    dtype: str
    device: str
    path: Path
    factors: dict[str, WrittenFactors] = field(default_factory=dict)
    tensors: list[WrittenTensor] = field(default_factory=list)
    errors: list[ModuleError] = field(default_factory=list)
    kept: list[Changed] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    memory: Budget = field(default_factory=lambda: Budget(_MEMORY))

    def run(self) -> None:
        """Make what every changed tensor becomes; `whole` names those whose factors would be no smaller than they."""
        from tqdm import tqdm

        changed = self.comparison.changed
        off = None if self.home.progress else True
        bar: Any = tqdm(total=len(changed), desc="extract", file=sys.stderr, delay=1, disable=off)
        with bar, loading_torch(), ThreadPoolExecutor(self.home.jobs) as pool, self.path.open("wb") as file:
            futures = [None if each.kind is None else pool.submit(self._extracted, each) for each in changed]
            try:
                for each, future in zip(changed, futures, strict=True):
                    placed = future is not None and self._placed(each, future.result(), file)
                    if not placed and not _is_same_but_for_dtype(self.comparison, each):
                        self._keep(each)
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self._complete()

    def _extracted(self, changed: Changed) -> Extraction:
        from loramgr.algebra.extraction import extracted
        from loramgr.tensors import torch_dtype

        with self.memory.holding(_BYTES * changed.view.spec.elements):
            matrix = _difference(self.comparison, changed, self.device)
            return extracted(matrix, self.goal, changed.name, torch_dtype(self.dtype))

    def _placed(self, changed: Changed, made: Extraction, file: BinaryIO) -> bool:
        """Append a module's factors to the file; False where they are no smaller than the tensor itself."""
        from loramgr.tensors import as_bytes

        if not made.rank:
            return True  # the same values in another dtype
        specs = [
            TensorSpec(f"{changed.module}.lora_{end}", self.dtype, shape)
            for end, shape in zip("AB", _shapes(changed, made.rank), strict=True)
        ]
        if sum(spec.nbytes for spec in specs) >= changed.view.spec.nbytes:
            self.whole.append(changed.module)
            return False
        views = []
        for spec, tensor in zip(specs, (made.lora_A, made.lora_B), strict=True):
            views.append(FileTensor(spec, self.path, file.tell()))
            file.write(as_bytes(tensor))
        self.factors[changed.module] = WrittenFactors(
            kind=str(changed.kind),
            shape_A=specs[0].shape,
            shape_B=specs[1].shape,
            dtype=self.dtype,
            make=lambda: (views[0].load(), views[1].load()),
            fan_in_fan_out=changed.transposed,
        )
        self.errors.append(ModuleError(changed.module, made.rank, made.norm, made.error / made.norm))
        return True

    def _complete(self) -> None:
        """Keep what else there is in the modules that are kept whole: PEFT loads such a module with all it has."""
        kept = {each.name for each in self.kept}
        modules = {each.module for each in self.kept if not each.name.endswith(".bias")} - self.factors.keys()
        for name, view in sorted(self.comparison.finetuned.checkpoint.tensors.items()):
            other = Changed(name, view, self.comparison.alignment.sources.get(name))
            inside = any(module in modules for module in _enclosing(name)) and other.module not in self.factors
            if inside and name not in kept and view.spec.dtype in FLOAT_DTYPES:
                self._keep(other)

    def _keep(self, changed: Changed) -> None:
        """Keep a tensor as it is; it is read when it is written."""
        name, tuned = changed.view.spec.name, self.comparison.finetuned
        self.kept.append(changed)

        def make() -> Data:
            from loramgr.tensors import as_bytes

            return as_bytes(_read_finite(tuned, name))

        self.tensors.append(WrittenTensor(replace(changed.view.spec, name=changed.name), make))


def _difference(comparison: Comparison, changed: Changed, device: str) -> torch.Tensor:
    """Return fine-tune minus base as the matrix (out, in) of the layer, in float64; raises as `_read_finite`."""
    tuned = _read_finite(comparison.finetuned, changed.view.spec.name).to(device).double()
    base = _read_finite(comparison.base, str(changed.source)).to(device).double()
    matrix = (tuned - base).flatten(1)
    return matrix.T if changed.transposed else matrix


def _enclosing(name: str) -> Iterator[str]:
    """Yield the modules that a parameter lies in, the innermost first."""
    while name := name.rpartition(".")[0]:
        yield name


def _is_same_but_for_dtype(comparison: Comparison, changed: Changed) -> bool:
    """Say whether the base has the same values in another dtype."""
    if changed.source is None:
        return False
    own, base = changed.view.spec, comparison.base.checkpoint.tensors[changed.source].spec
    if own.dtype == base.dtype or own.shape != base.shape:
        return False
    one, other = (
        _read_finite(model, name).double()
        for model, name in ((comparison.finetuned, own.name), (comparison.base, changed.source))
    )
    return bool(one.equal(other))


def _read_finite(model: OpenBase, name: str) -> torch.Tensor:
    """Return a tensor of the model, on the CPU; IncompatibleError, naming it, for NaN or infinite values."""
    from loramgr.algebra.finite import all_finite
    from loramgr.tensors import from_bytes

    tensor = from_bytes(read_checked(model, name), model.checkpoint.tensors[name].spec)
    if not all_finite(tensor):
        raise IncompatibleError(f"{name}: NaN or infinite values in {model.source}", "train it again")
    return tensor


def _shapes(changed: Changed, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of lora_A and lora_B as PEFT has them for the layer."""
    shape = changed.view.spec.shape
    outputs, inputs = (shape[1], shape[0]) if changed.transposed else (shape[0], shape[1])
    return (rank, inputs, *shape[2:]), (outputs, rank, *(1 for _ in shape[2:]))
