"""A model in memory as a checkpoint, and a residual that is put on it and taken off again.

The only file of `weights/` that knows torch. Numbers pass through the same blocks and the same
arithmetic as those of files, whatever device they are on, so that a live sum is the graft.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft.errors import CheckpointError, NonFiniteError, ResidualError
from fedgraft.provenance import Record
from fedgraft.weights.arithmetic import add, all_finite, narrow, refuse_non_finite, widen
from fedgraft.weights.checkpoint import (
    BLOCK_ELEMENTS,
    DTYPES,
    OUTPUT_LAYER,
    Array,
    Checkpoint,
    Fill,
    TensorInfo,
    is_tied,
)
from fedgraft.weights.family import anatomy_of, has_rows
from fedgraft.weights.merging import PLAIN, combined
from fedgraft.weights.residual import Difference, Residual
from fedgraft.weights.rows import RowMap
from fedgraft.weights.workers import each_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READABLE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""What safetensors calls the dtypes of weights that can be computed with."""

MARK = "_fedgraft_residuals"
"""Attribute of a model: the content hashes of the residuals that are on it. Copies carry it."""


class Live(Checkpoint):
    """A causal language model in memory: the tensors, names and content hash it has on disk.

    It shows the numbers as they were when they were first read; look anew after they have changed.

    A class of transformers that renames or fuses tensors while it loads them (mixtures of experts)
    has other names in memory than on disk; beside its files it is refused by name.
    """

    def __init__(self, model: "PreTrainedModel", folder: str | Path) -> None:
        """Look at `model`; `folder` holds its tokenizer, and its record where fedgraft made it.

        Raises CheckpointError for a tensor that is not in memory, not contiguous or quantised, and
        where the config says of the output layer what the module is not.
        """
        self.model = model
        named: dict[torch.Tensor, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            named.setdefault(tensor, name)
        self._flat = {name: _flat(name, tensor) for tensor, name in named.items()}
        tensors = {
            name: TensorInfo(
                dtype=READABLE[tensor.dtype], shape=tuple(tensor.shape), file=Path(folder), start=0
            )
            for tensor, name in named.items()
        }
        config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        if is_tied(config, tensors) is (OUTPUT_LAYER in tensors):
            raise CheckpointError(
                f"{type(model).__name__}: expected the output layer as the config has it "
                f"(tie_word_embeddings: {config['tie_word_embeddings']}), found that it "
                f"{'is not' if OUTPUT_LAYER in tensors else 'is'} the embedding; call "
                "model.tie_weights(), or set the config right"
            )
        super().__init__(Path(folder), tensors, config)

    @property
    def record(self) -> Record | None:
        """The record of the folder, with the residuals that were put on since."""
        record, put_on = super().record, _marks(self.model)
        if not put_on:
            return record
        record = record or Record.make("checkpoint")
        return record.model_copy(update={"residuals": (*record.residuals, *put_on)})

    @contextmanager
    def _opened(self, name: str) -> Iterator[Fill]:
        def fill(first: int, block: Array) -> None:
            part = self._flat[name][first : first + block.size]
            _bytes(block).copy_(part.view(torch.uint8))

        yield fill

    def write(self, name: str, first: int, block: Array) -> None:
        """Put the numbers of a block into the model, from the given index of a tensor on."""
        part = self._flat[name][first : first + block.size]
        part.view(torch.uint8).copy_(_bytes(block))


@dataclass(frozen=True, slots=True)
class Kept:
    """Of a block, the numbers that subtraction does not give back: where, and what they were."""

    places: NDArray[np.uint32]
    numbers: Array


class Applied:
    """A residual that is on a live model, until `remove` takes it off; made by `apply`."""

    def __init__(self, live: Live, residual: Residual | Difference, scale: float) -> None:
        self.live = Live(live.model, live.path)  # sees, and hashes, the numbers as they are now
        self.residual, self.scale = residual, scale
        self._rows = _match_rows(live, residual)
        self._kept: dict[str, list[Kept]] = {name: [] for name in live.tensors}
        try:
            self._each("putting on", self._add)
            residual.refuse_damage()
        except BaseException:
            self._each("taking off", self._subtract)
            raise
        _mark(live.model, (*_marks(live.model), residual.content_hash))
        self._content_hash = self._hash_now()

    @property
    def num_kept(self) -> int:
        """Numbers that are remembered, because subtraction does not give them back."""
        return sum(kept.places.size for blocks in self._kept.values() for kept in blocks)

    def remove(self) -> None:
        """Give every number the bits that it had before; a second call does nothing.

        Raises ResidualError where the model's numbers, or the residual's, are not as they were.
        """
        if not self._kept:
            return
        if self._hash_now() != self._content_hash:
            raise ResidualError(
                "expected the model's numbers as they were when the residual was put on, found "
                "others: it was trained or converted, or another residual was put on top. Take "
                "that one off first; after training, open the model again"
            )
        self._each("taking off", self._subtract)
        self._kept = {}
        ours = self.residual.content_hash
        _mark(self.live.model, tuple(mark for mark in _marks(self.live.model) if mark != ours))
        if self._hash_now() != self.live.content_hash:
            raise ResidualError(
                f"{self.residual.path}: expected the residual that was put on, found another; the "
                "files changed in between, and what they took off is not what was added. Open the "
                "model again"
            )

    def _hash_now(self) -> str:
        return Live(self.live.model, self.live.path).content_hash

    def _each(self, label: str, work: Callable[[str], None]) -> None:
        sizes = {name: info.num_bytes for name, info in self.live.tensors.items()}
        each_tensor(f"{label} {self.residual.path.name}", sizes, work, in_memory=True)

    def _addends(self, name: str) -> Iterator[Array]:
        """What is added to each block of a tensor, in float32."""
        sums = combined(name, [self.residual], [self.scale], PLAIN)
        if self._rows.straight or not has_rows(name):
            return sums
        width = math.prod(self.live.tensors[name].shape[1:])
        pairs = self._rows.fitted(sums, self.live.blocks(name), width, self.scale)
        return (added for _, added in pairs)

    def _add(self, name: str) -> None:
        first, total, small = 0, *_buffers(self.live.tensors[name])
        back, kept = np.empty_like(small), self._kept[name]
        exceptions = self.residual.exceptions.get(name) if self.scale == 1.0 else None
        for old, added in zip(self.live.blocks(name), self._addends(name), strict=True):
            with np.errstate(over="ignore", invalid="ignore"):
                new, finite = add(old, added, small)
                if exceptions:
                    exceptions.restore(new, old, first)
                again = narrow(np.subtract(widen(new, total), added, out=total[: old.size]), back)
            if not finite and not all_finite(new):
                refuse_non_finite(old, name, self.live.path)
                refuse_non_finite(added, name, self.residual.path)
                raise NonFiniteError(
                    f"{self.live.path}: expected sums within {old.dtype}, found larger ones in "
                    f"tensor {name!r} at scale {self.scale}; take a smaller scale"
                )
            bits = f"u{old.itemsize}"
            places = np.flatnonzero(again.view(bits) != old.view(bits))
            kept.append(Kept(places.astype(np.uint32), old[places]))
            self.live.write(name, first, new)
            first += old.size

    def _subtract(self, name: str) -> None:
        first, total, small = 0, *_buffers(self.live.tensors[name])
        for kept, new, added in zip(
            self._kept[name], self.live.blocks(name), self._addends(name), strict=False
        ):
            old = narrow(np.subtract(widen(new, total), added, out=total[: new.size]), small)
            old[kept.places] = kept.numbers
            self.live.write(name, first, old)
            first += old.size


def apply(live: Live, residual: Residual | Difference, scale: float = 1.0) -> Applied:
    """Add `scale * residual` to a model in memory, in place: the numbers that `graft` would write.

    In float32, rounded once to the model's dtype, on any device. Whether the model descends from
    the residual's base is not asked, for numbers in memory may have changed since they were read.

    Raises:
        ResidualError: The model has another architecture, size or vocabulary, or rows for tokens in
            another order; it has this residual already; the scale is not finite, or the residual's
            files are damaged.
        NonFiniteError: The model or the residual holds NaN or infinity, or a sum is too large for
            the model's dtype. The model is as it was before.
    """
    if not math.isfinite(scale):
        raise ResidualError(f"expected a finite scale, found {scale}; the plain sum has scale 1.0")
    difference = anatomy_of(live).first_difference(residual.anatomy)
    if difference:
        raise ResidualError(
            f"the residual {residual.path} does not fit the live model: {difference}. Extract it "
            "from the family that the model belongs to"
        )
    record = live.record
    if record and record.residuals and residual.content_hash in record.residuals:
        raise ResidualError(
            f"{live.path}: expected a model without the residual {residual.path}, found one that "
            "has it; a residual is added once. Take it off first, or add more of it at a larger "
            "scale"
        )
    return Applied(live, residual, scale)


@contextmanager
def applied(live: Live, residual: Residual | Difference, scale: float = 1.0) -> Iterator[Applied]:
    """Put a residual on a live model for as long as the block lasts; see `apply`."""
    on = apply(live, residual, scale)
    try:
        yield on
    finally:
        on.remove()


def _match_rows(live: Live, residual: Residual | Difference) -> RowMap:
    """Match rows by token; refuse what would move or add rows in memory."""
    vocabulary = anatomy_of(live).vocabulary
    rows = RowMap.match(vocabulary, residual.anatomy.vocabulary, residual.whole_rows, live.path)
    if rows.whole.any() or not np.array_equal(rows.picks, np.arange(vocabulary.num_rows)):
        raise ResidualError(
            f"{live.path}: expected the instruct side's tokens in the rows of its ids, found rows "
            "that would have to move or to be added; graft the checkpoint on disk instead"
        )
    return rows


def _marks(model: "PreTrainedModel") -> tuple[str, ...]:
    return getattr(model, MARK, ())


def _mark(model: "PreTrainedModel", hashes: tuple[str, ...]) -> None:
    setattr(model, MARK, hashes)


def _flat(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's own numbers in a row."""
    if tensor.dtype not in READABLE or tensor.is_meta or not tensor.is_contiguous():
        strided = "" if tensor.is_contiguous() else "strided "
        found = "none" if tensor.is_meta else f"{strided}{tensor.dtype}"
        raise CheckpointError(
            f"tensor {name!r} of the live model: expected contiguous numbers of "
            f"{', '.join(map(str, READABLE))} in memory, found {found}; open the whole model, "
            "without quantisation or offloading"
        )
    return tensor.detach().view(-1)


def _bytes(block: Array) -> torch.Tensor:
    return torch.from_numpy(block.view(np.uint8))


def _buffers(info: TensorInfo) -> tuple[Array, Array]:
    """Buffers for a block in float32 and in the tensor's dtype."""
    size = min(BLOCK_ELEMENTS, info.num_elements)
    return np.empty(size, np.float32), np.empty(size, DTYPES[info.dtype])
