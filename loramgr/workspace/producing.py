"""Makes the bytes of every tensor of a model folder out of the base's, each byte of which is checked on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from loramgr.adapter import LowRank
from loramgr.checkpoints.fingerprint import digest_tensor
from loramgr.checkpoints.output import OutputTensor, Shard
from loramgr.checkpoints.regions import Region
from loramgr.checkpoints.residuals import ORIGINAL, ResidualFile
from loramgr.digests import TensorDigest
from loramgr.errors import IntegrityError
from loramgr.memory import Memory, fresh
from loramgr.tensorfile import Data, FileTensor, TensorSpec
from loramgr.workspace.computing import Merger
from loramgr.workspace.home import Home
from loramgr.workspace.planning import MergePlan, Target

__all__ = ["Producer"]

_COPIES = 4  # a weight, what is made of it, and what is on its way from one to the other
_COPIES_OF_SUM = 2  # nothing is on its way: a sum of low-rank deltas goes from tile to tile
_COPIES_WITH_RESIDUAL = 8


class Producer:
    """Makes the tensors that a plan says; several threads may use it at once.

    `bytes_read` counts what was read of the base, `kernels` what computed: "torch", "triton".
    """

    def __init__(self, plan: MergePlan, merger: Merger) -> None:
        self._plan = plan
        self._merger = merger
        self._residuals: dict[str, ResidualFile] = {}
        self._lock = Lock()
        self.bytes_read = 0
        self.kernels: set[str] = set()

    def outputs(self, *, reversible: bool = False) -> dict[str, OutputTensor]:
        """Return all tensors of the output, none of them made yet; `reversible` ones take more memory."""

        def output(target: Target) -> OutputTensor:
            memory = self._copies(target, reversible) * target.spec.nbytes
            return OutputTensor(target.spec, lambda region: self._fill(target, region), memory)

        return {name: output(target) for name, target in self._plan.targets.items()}

    def keep_residuals(self, folder: Path, shards: Sequence[Shard]) -> Mapping[str, ResidualFile]:
        """From now on keep what gives the base's tensors back; return the files, by the names of the shards."""
        files = {shard.name: ResidualFile(folder, shard.name) for shard in shards}
        self._residuals = {tensor.spec.name: files[shard.name] for shard in shards for tensor in shard.tensors}
        return files

    def produce(self, target: Target) -> Data:
        """Return the bytes of one tensor; IntegrityError when the base's are not those that were registered."""
        return self._produced(target, fresh)[0]

    def checked(self, names: Sequence[str], home: Home) -> list[tuple[str, TensorDigest]]:
        """Read tensors of the base that stay where they are, and return their digests, by name."""

        def check(name: str) -> tuple[str, TensorDigest]:
            digest, size = digest_tensor(self._plan.base.checkpoint.tensors[name])
            self._check(name, digest.sha256, size)
            return name, digest

        with ThreadPoolExecutor(home.jobs) as pool:
            return [*pool.map(check, names)]

    def _fill(self, target: Target, region: Region) -> None:
        view = None if target.source is None else self._plan.base.checkpoint.tensors[target.source]
        if self._is_kernel_copy(target) and isinstance(view, FileTensor):
            region.copy(view)
            self._check(str(target.source), region.digest.sha256, view.spec.nbytes)
            return
        data, parts = self._produced(target, region.memory)
        region.write(data)
        known = self._plan.base.tensors.get(target.spec.name)
        if parts and known is not None and region.digest != known:
            self._residuals[target.spec.name].add(target.spec.name, parts)

    def _produced(self, target: Target, memory: Memory) -> tuple[Data, dict[str, tuple[TensorSpec, Data]]]:
        """Return the bytes of a tensor and, where residuals are kept, what gives the base's tensor back."""
        from loramgr.tensors import as_bytes, from_bytes

        data = None if target.source is None else self._read(target.source, memory)
        if data is not None and self._is_copy(target):
            return data, {}
        stored = None if target.source is None else self._stored(target.source)
        weight = None
        if data is not None and stored is not None and not target.replaces_shape:
            weight = from_bytes(data, stored)
        if not target.contributions:
            from loramgr.algebra.casting import rounded
            from loramgr.tensors import torch_dtype

            assert weight is not None
            return as_bytes(rounded(weight, torch_dtype(target.spec.dtype)).contiguous()), {}
        keep = target.spec.name in self._residuals
        computed = self._merger.merge(target.spec, weight, target.contributions, residual=keep, memory=memory)
        with self._lock:
            self.kernels.add(computed.kernel)
        parts = computed.parts
        if keep and not parts and data is not None and stored is not None:
            parts = {ORIGINAL: (stored, data)}
        return as_bytes(computed.tensor), parts

    def _copies(self, target: Target, reversible: bool) -> int:
        """Return how many tensors of the target's size are held while it is made."""
        if self._is_kernel_copy(target):
            return 0
        if reversible:
            return _COPIES_WITH_RESIDUAL
        updates = [item.update for item in target.contributions]
        summed = all(isinstance(each, LowRank) and each.magnitude is each.table is None for each in updates)
        same = target.source is not None and self._stored(target.source).dtype == target.spec.dtype
        return _COPIES_OF_SUM if updates and summed and same and self._merger.device == "cpu" else _COPIES

    def _stored(self, name: str) -> TensorSpec:
        return self._plan.base.checkpoint.tensors[name].spec

    def _is_copy(self, target: Target) -> bool:
        """Say whether the tensor is one of the base's as it is."""
        if target.source is None or target.contributions:
            return False
        return self._stored(target.source).dtype == target.spec.dtype

    def _is_kernel_copy(self, target: Target) -> bool:
        """Say whether the tensor is copied from file to file and never held."""
        return self._is_copy(target) and isinstance(self._plan.base.checkpoint.tensors[str(target.source)], FileTensor)

    def _read(self, name: str, memory: Memory) -> Data:
        view = self._plan.base.checkpoint.tensors[name]
        data = view.read_bytes(memory) if isinstance(view, FileTensor) else view.read_bytes()
        self._check(name, hashlib.sha256(data).hexdigest(), len(data))
        return data

    def _check(self, name: str, sha256: str, size: int) -> None:
        """Count what was read of the base, and compare it with what the base has."""
        with self._lock:
            self.bytes_read += size
        base = self._plan.base
        known = base.tensors.get(name)
        if known is None or sha256 != known.sha256:
            raise IntegrityError(
                f"{name}: the bytes in {base.source} are not those that the base {base.name or base.digest} has",
                f"loramgr base verify {base.name or base.source}",
            )
