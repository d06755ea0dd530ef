"""base + LoRA adapter as one checkpoint, merged as it is read: W + scaling * B A.

Reads PEFT's directories (arXiv 2106.09685 as the library `peft` writes it) without peft and torch.
Products are summed in float64 and rounded to float32; the sum with W is rounded once, to W's dtype.
peft sums products in float32, which moves their last bits, and rounds an embedding's change to W's
dtype before it adds it. So merged bfloat16 layers are the same bit for bit, float32 ones to a part
in 2^22 of the tensor's largest number.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import CheckpointError, ResidualError
from fedgraft.provenance import Record
from fedgraft.weights.arithmetic import narrow, refuse_non_finite, widen
from fedgraft.weights.checkpoint import (
    BLOCK_ELEMENTS,
    DTYPES,
    EMBEDDING,
    OUTPUT_LAYER,
    Array,
    Checkpoint,
    Fill,
    TensorFiles,
    TensorInfo,
    read_tensors,
)

PREFIX = "adapter_model"
LINEAR = ("lora_B.weight", "lora_A.weight")
EMBEDDED = ("lora_embedding_B", "lora_embedding_A")
PARTS = (*LINEAR, *EMBEDDED, "lora_B.bias", "base_layer.weight", "base_layer.bias")
TENSOR = re.compile(rf"base_model\.model\.(.+?)\.({'|'.join(map(re.escape, PARTS))}|weight|bias)")
"""Names of an adapter's tensors: the module, and what of it. `weight` and `bias` alone, or of the
base layer, stand in the place of the base's: modules_to_save, trained biases, saved embeddings."""

PLAIN: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {"peft_type": ("LORA",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}
)
"""Settings of which some values are implemented; other beginnings change the base's weights."""
UNDERSTOOD = frozenset(
    re.findall(
        r"\w+",
        "alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying eva_config "
        "exclude_modules fan_in_fan_out inference_mode layers_pattern layers_to_transform r "
        "lora_alpha lora_bias lora_dropout megatron_core modules_to_save peft_version "
        "qalora_group_size rank_pattern revision target_modules task_type use_rslora",
    )
)
"""Settings that are implemented, say what the tensors show, or matter to training alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    """What an adapter makes of one tensor; names are those of the adapter's tensors."""

    replacement: str | None = None
    factors: tuple[str, ...] = ()
    """B and A, or only what is added."""
    scaling: float = 1.0
    transposed: bool = False
    """The tensor holds inputs x outputs: (B A)^T is added."""


class Adapted(Checkpoint):
    """A base with an adapter on it: the tensors, and the content hash, of the merged checkpoint.

    Tokenizer and config are the base's. A record says that it descends from the base.
    """

    def __init__(self, base: str | Path | Checkpoint, adapter: Path) -> None:
        """Open both; `adapter` is a directory that peft or `fedgraft adapt` wrote.

        Raises CheckpointError where the adapter cannot be read, or does what is not implemented
        here (DoRA, PiSSA, ...), ResidualError where it was trained on another model.
        """
        self.base = Checkpoint.open(base)
        super().__init__(self.base.path, self.base.tensors, self.base.config)
        self.adapter = TensorFiles(adapter, _read_adapter(adapter))
        self._changes = _changes(self.base, self.adapter, _read_settings(adapter))
        trained = Record.read(adapter)
        on = trained.inputs.get("model") if trained else None
        if on and on != self.base.content_hash:
            raise ResidualError(
                f"{adapter}: expected the model that it was trained on, {on[:19]}, found "
                f"{self.base.path} with {self.base.content_hash[:19]}; name that model"
            )

    @property
    def record(self) -> Record:
        """Made here: what is known of the base, and that this descends from it."""
        known = self.base.record
        return Record.make(
            "checkpoint",
            inputs={"base": self.base.content_hash, "adapter": self.adapter.content_hash},
            ancestors=(*(known.ancestors if known else ()), self.base.content_hash),
            residuals=known.residuals if known else (),
        )

    @contextmanager
    def _opened(self, name: str) -> Iterator[Fill]:
        change = self._changes.get(name, _Change())
        with self._unmerged(name, change) as fill:
            yield self._merging(fill, self.tensors[name], change) if change.factors else fill

    @contextmanager
    def _unmerged(self, name: str, change: _Change) -> Iterator[Fill]:
        """Give what is there before factors are added."""
        if change.replacement is None:
            with self.base._opened(name) as fill:
                yield fill
            return
        replacement, dtype = change.replacement, self.adapter.tensors[change.replacement].dtype
        with self.adapter._opened(replacement) as fill:

            def converted(first: int, block: Array) -> None:
                trained = np.empty(block.size, DTYPES[dtype])
                fill(first, trained)
                refuse_non_finite(trained, replacement, self.adapter.path)
                np.copyto(block, trained, casting="unsafe")

            yield converted

    def _merging(self, fill: Fill, info: TensorInfo, change: _Change) -> Fill:
        """Return a Fill that adds the product of the factors.

        It is computed in groups of rows that do not depend on what is asked for, because the last
        bits of a matrix product depend on the matrices' sizes.
        """
        width = math.prod(info.shape[1:])
        height = max(1, BLOCK_ELEMENTS // width)
        left, right = self._factors(change)
        wide = np.empty(height * width, np.float32)
        group, product = -1, np.empty(0, np.float32)

        def merged(first: int, block: Array) -> None:
            nonlocal group, product
            fill(first, block)
            done = 0
            while done < block.size:
                wanted, offset = divmod(first + done, height * width)
                if wanted != group:
                    rows = left[wanted * height : (wanted + 1) * height]
                    product = (change.scaling * (rows @ right)).astype(np.float32).ravel()
                    group = wanted
                part = block[done : done + product.size - offset]
                total = widen(part, wide)
                total += product[offset : offset + part.size]
                narrow(total, part)
                done += part.size

        return merged

    def _factors(self, change: _Change) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Read the matrices whose product has the rows and columns of the tensor."""
        read = [self.adapter.read(name) for name in change.factors]
        for name, numbers in zip(change.factors, read, strict=True):
            refuse_non_finite(numbers.ravel(), name, self.adapter.path)
        left, *rest = (numbers.astype(np.float64) for numbers in read)
        if not rest:
            return left[:, None], np.ones((1, 1))
        return (rest[0].T.copy(), left.T.copy()) if change.transposed else (left, rest[0])


def _read_adapter(folder: Path) -> dict[str, TensorInfo]:
    if (folder / f"{PREFIX}.bin").exists() and not (folder / f"{PREFIX}.safetensors").exists():
        raise CheckpointError(
            f"{folder}: expected {PREFIX}.safetensors, found the pickle {PREFIX}.bin, which can "
            "run code when it is opened, so fedgraft never does. Save the adapter again with peft, "
            "where you trust it"
        )
    return read_tensors(folder, PREFIX)


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json; refuse what would change the sum and is not implemented."""
    file = folder / "adapter_config.json"
    try:
        settings = dict(json.loads(file.read_bytes()))
        int(settings["r"]), float(settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: expected the config of a LoRA adapter, found {error!r}; name a directory "
            "that peft or `fedgraft adapt` wrote"
        ) from error
    for key, value in settings.items():
        if value and key not in UNDERSTOOD and value not in PLAIN.get(key, ()):
            raise CheckpointError(
                f"{file}: expected plain LoRA, found {key} = {value!r}, which is not implemented "
                "here; merge the adapter with peft (merge_and_unload) and name the merged model"
            )
    return settings


def _changes(
    base: Checkpoint, adapter: TensorFiles, settings: Mapping[str, Any]
) -> Mapping[str, _Change]:
    """Return what becomes of each tensor that the adapter changes."""
    modules: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in adapter.tensors:
        found = TENSOR.fullmatch(name)
        if not found:
            raise CheckpointError(
                f"{adapter.path}: expected tensors of plain LoRA, found {name!r}, which is not "
                "implemented here; merge the adapter with peft (merge_and_unload) and name the "
                "merged model"
            )
        modules[found[1]][found[2]] = name
    changes: dict[str, _Change] = {}
    for module, parts in modules.items():
        kind = EMBEDDED if parts.keys() & set(EMBEDDED) else LINEAR
        factors = tuple(parts[part] for part in kind if part in parts)
        if len(factors) == 1:
            raise CheckpointError(
                f"{adapter.path}: expected two factors for {module!r}, found {factors[0]!r} alone; "
                "the file is damaged. Fetch it again"
            )
        scaling = _scaling(module, settings)
        if factors or parts.keys() & {"weight", "base_layer.weight"}:
            changes[f"{module}.weight"] = _Change(
                replacement=parts.get("weight", parts.get("base_layer.weight")),
                factors=factors,
                scaling=scaling,
                transposed=kind == EMBEDDED or bool(settings.get("fan_in_fan_out")),
            )
        if parts.keys() & {"bias", "base_layer.bias", "lora_B.bias"}:
            changes[f"{module}.bias"] = _Change(
                replacement=parts.get("bias", parts.get("base_layer.bias")),
                factors=tuple(parts[part] for part in ("lora_B.bias",) if part in parts),
                scaling=scaling,
            )
    for name, change in changes.items():
        _check_fit(base, name, adapter, change, settings)
    return MappingProxyType(changes)


def _check_fit(
    base: Checkpoint,
    name: str,
    adapter: TensorFiles,
    change: _Change,
    settings: Mapping[str, Any],
) -> None:
    """Refuse an adapter of another model, by the name of the tensor."""
    if base.tied and name.endswith((EMBEDDING, OUTPUT_LAYER)):
        raise ResidualError(
            f"{adapter.path}: changes {name!r}, which {base.path} shares between embedding and "
            "output layer; attached, such an adapter changes one of the two, merged both. Train an "
            "adapter on the other modules"
        )
    if name not in base.tensors:
        raise ResidualError(
            f"{adapter.path}: changes {name!r}, which {base.path} does not have; name the model "
            "that the adapter was trained on"
        )
    shapes = [adapter.tensors[part].shape for part in change.factors]
    found = [adapter.tensors[change.replacement].shape] if change.replacement else []
    if len(shapes) == 2:
        rank = _ranked(name.removesuffix(".weight"), settings)
        if (inner := (shapes[0][-1], shapes[1][0])) != (rank, rank):
            raise CheckpointError(
                f"{adapter.path}: expected factors of rank {rank} for {name!r}, as its config "
                f"says, found {inner[0]} and {inner[1]}; the two files are not of one adapter"
            )
        outer = (shapes[0][0], shapes[1][1])
        found.append(outer[::-1] if change.transposed else outer)
    else:
        found += shapes
    for shape in found:
        if shape != base.tensors[name].shape:
            raise ResidualError(
                f"{adapter.path}: expected a change of {name!r} of shape "
                f"{list(base.tensors[name].shape)}, as in {base.path}, found {list(shape)}; name "
                "the model that the adapter was trained on"
            )


def _ranked(module: str, settings: Mapping[str, Any]) -> int:
    return int(_pattern(settings.get("rank_pattern"), module, settings["r"]))


def _scaling(module: str, settings: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) where it is rank-stabilised (arXiv 2312.03732)."""
    rank = _ranked(module, settings)
    alpha = float(_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"]))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: float) -> float:
    """Return the value of the first pattern that a module's name ends with, as peft matches it."""
    matches = (v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", module))
    return float(next(matches, otherwise))
