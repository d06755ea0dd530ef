"""How a tensor lies in a file in few bytes, and comes back as float32.

Each tensor `t` is stored as flat parts, `t.shape` among them; which other parts it has says how it
comes back. So the files alone are enough, and one file may hold tensors of several forms:

    packed     t.packed, t.ends     blocks of exact numbers in byte planes, and where each ends
    low rank   t.left, t.right      two factors: left @ right
    sign       t.signs, t.scale     a bit a number, and the one magnitude they share
    int8       t.codes, t.scales    a byte a number, and a scale for every 128 of them

Numbers come back a frame at a time, at any place, so that nothing ever holds a whole tensor.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from fedgraft.errors import CheckpointError
from fedgraft.weights.arithmetic import Floats
from fedgraft.weights.checkpoint import Array, Fill, TensorFiles, TensorInfo
from fedgraft.weights.planes import pack, unpack

FRAME = 1 << 16
"""Numbers that are packed together; part of the format."""
SCALED = 128
"""Numbers that share a scale in int8; part of the format."""

Parts = Iterator[tuple[str, str, Iterable[Array]]]
"""(part, dtype, flat blocks): what `write_growing` writes of one tensor."""
KINDS = (("packed", "ends"), ("left", "right"), ("signs", "scale"), ("codes", "scales"))
"""The parts of a tensor beside its shape, by form."""
Decode = Callable[[int, Floats], None]
"""Puts the frame with a number into an array of its size."""


def packed_parts(shape: tuple[int, ...], blocks: Iterable[Array]) -> Parts:
    """Store a tensor exactly; all of its `blocks` but the last hold FRAME numbers."""
    ends = [0]

    def frames() -> Iterator[Array]:
        for block in blocks:
            data = pack(block.astype(np.float32, copy=False))
            ends.append(ends[-1] + len(data))
            yield np.frombuffer(data, np.uint8)

    yield "packed", "U8", frames()
    yield "ends", "I64", [np.array(ends[1:], np.int64)]
    yield from _shape_part(shape)


def low_rank_parts(left: Floats, right: Floats) -> Parts:
    """Store a matrix as the product of its factors, of m times r and r times n numbers."""
    yield "left", "F32", [left.reshape(-1)]
    yield "right", "F32", [right.reshape(-1)]
    yield from _shape_part((left.shape[0], right.shape[1]))


def sign_parts(shape: tuple[int, ...], blocks: Iterable[Array]) -> Parts:
    """Store a tensor as signs and their mean magnitude (BitDelta, arXiv 2402.10193, section 3.1).

    That magnitude has the least squared error. Zero counts as positive, as in the released code
    (the paper's equation 1 counts it as negative). The second stage of BitDelta, which trains the
    scales, needs data and is left out.
    """
    total = 0.0

    def signs() -> Iterator[Array]:
        nonlocal total
        for block in blocks:
            numbers = block.astype(np.float32, copy=False)
            total += float(np.abs(numbers).sum(dtype=np.float64))
            yield np.packbits(numbers >= 0)

    yield "signs", "U8", signs()
    yield "scale", "F32", [np.array([total / max(math.prod(shape), 1)], np.float32)]
    yield from _shape_part(shape)


def int8_parts(shape: tuple[int, ...], blocks: Iterable[Array]) -> Parts:
    """Store a tensor in -127 .. 127, every SCALED numbers with a scale: their largest / 127."""
    scales: list[Floats] = []

    def codes() -> Iterator[Array]:
        for block in blocks:
            runs = np.zeros((-(-block.size // SCALED), SCALED), np.float32)
            runs.reshape(-1)[: block.size] = block
            scale = np.abs(runs).max(axis=1) / np.float32(127)
            scales.append(scale)
            with np.errstate(divide="ignore", invalid="ignore"):
                quotients = np.where(scale[:, None] > 0, runs / scale[:, None], 0)
            rounded = np.rint(quotients).clip(-127, 127)  # a subnormal scale is rounded itself
            yield rounded.astype(np.int8).reshape(-1)[: block.size]

    yield "codes", "I8", codes()
    yield "scales", "F32", scales
    yield from _shape_part(shape)


def logical(parts: TensorFiles) -> dict[str, TensorInfo]:
    """Return the tensors that the parts stand for; they come back as float32.

    Raises CheckpointError where the parts of a tensor are not those of one form and shape.
    """
    names = [part.removesuffix(".shape") for part in parts.tensors if part.endswith(".shape")]
    shapes = {name: tuple(map(int, parts.read(f"{name}.shape"))) for name in names}
    for name, shape in shapes.items():
        _check_sizes(parts, name, math.prod(shape))
    return {
        name: replace(parts.tensors[f"{name}.{_kind(parts, name)[0]}"], dtype="F32", shape=shape)
        for name, shape in shapes.items()
    }


@contextmanager
def opened(parts: TensorFiles, name: str, shape: tuple[int, ...]) -> Iterator[Fill]:
    """Open what holds a tensor of the shape: fills arrays with its numbers, from any place on."""
    frame = FRAME
    match _kind(parts, name):
        case ("packed", _):
            decoder = _unpacking(parts, name)
        case ("left", _):
            frame = max(1, FRAME // shape[1]) * shape[1]  # whole rows
            decoder = _multiplying(parts, name, shape[1], frame)
        case ("signs", _):
            decoder = _signing(parts, name)
        case _:
            decoder = _scaling(parts, name)
    with decoder as decode:
        yield _filling(frame, math.prod(shape), decode, f"{parts.path}: tensor {name!r}")


def _filling(frame: int, size: int, decode: Decode, place: str) -> Fill:
    """Fill arrays from frames: at once where a whole one fits, else from the one decoded last.

    A frame is decoded the same way whatever array it is for, so any reader gets the same numbers.
    """
    last = np.empty(min(frame, size), np.float32)
    held = -1

    def decoded(number: int, out: Floats) -> None:
        try:
            decode(number, out)
        except ValueError as error:
            raise CheckpointError(
                f"{place}: expected numbers as they were written, found {error}; the file was "
                "damaged. Make it again"
            ) from error

    def fill(first: int, block: Array) -> None:
        nonlocal held
        while block.size:
            number, skipped = divmod(first, frame)
            length = min(frame, size - number * frame)
            taken = block[: length - skipped]
            if taken.size == length:
                decoded(number, taken)
            else:
                if number != held:
                    decoded(number, last[:length])
                    held = number
                taken[:] = last[skipped : skipped + taken.size]
            first, block = first + taken.size, block[taken.size :]

    return fill


@contextmanager
def _unpacking(parts: TensorFiles, name: str) -> Iterator[Decode]:
    ends = np.concatenate([[0], parts.read(f"{name}.ends")]).tolist()
    with parts._opened(f"{name}.packed") as fill:

        def decode(number: int, out: Floats) -> None:
            first, end = ends[number], ends[number + 1]
            if not 0 <= first <= end <= ends[-1]:
                raise ValueError(f"a block from byte {first} to {end}")
            data = np.empty(end - first, np.uint8)
            fill(first, data)
            unpack(data.data, out)

        yield decode


@contextmanager
def _multiplying(parts: TensorFiles, name: str, columns: int, frame: int) -> Iterator[Decode]:
    right = parts.read(f"{name}.right").reshape(-1, columns)
    left = np.empty((frame // columns, right.shape[0]), np.float32)
    with parts._opened(f"{name}.left") as fill:

        def decode(number: int, out: Floats) -> None:
            rows = left[: out.size // columns]
            fill(number * left.size, rows.reshape(-1))
            np.matmul(rows, right, out=out.reshape(-1, columns))

        yield decode


@contextmanager
def _signing(parts: TensorFiles, name: str) -> Iterator[Decode]:
    scale = parts.read(f"{name}.scale")[0]
    values = np.array([-scale, scale], np.float32)
    with parts._opened(f"{name}.signs") as fill:

        def decode(number: int, out: Floats) -> None:
            packed = np.empty(-(-out.size // 8), np.uint8)
            fill(number * FRAME // 8, packed)
            np.take(values, np.unpackbits(packed, count=out.size), out=out, mode="clip")

        yield decode


@contextmanager
def _scaling(parts: TensorFiles, name: str) -> Iterator[Decode]:
    with parts._opened(f"{name}.codes") as codes, parts._opened(f"{name}.scales") as scales:

        def decode(number: int, out: Floats) -> None:
            code = np.empty(out.size, np.int8)
            scale = np.empty(-(-out.size // SCALED), np.float32)
            codes(number * FRAME, code)
            scales(number * FRAME // SCALED, scale)
            np.multiply(code, np.repeat(scale, SCALED)[: out.size], out=out)

        yield decode


def _kind(parts: TensorFiles, name: str) -> tuple[str, str]:
    """The parts that a tensor has beside its shape."""
    found = [kind for kind in KINDS if all(f"{name}.{part}" in parts.tensors for part in kind)]
    if len(found) != 1:
        raise CheckpointError(
            f"{parts.path}: expected tensor {name!r} in one form, found {len(found)}; the file was "
            "written by another version of fedgraft or damaged. Make it again"
        )
    return found[0]


def _check_sizes(parts: TensorFiles, name: str, size: int) -> None:
    kind = _kind(parts, name)
    one, two = (parts.tensors[f"{name}.{part}"].num_elements for part in kind)
    match kind:
        case ("packed", _):
            fits = two == -(-size // FRAME)
        case ("left", _):
            fits = one * two % max(size, 1) == 0  # m r times r n, of m n
        case ("signs", _):
            fits = (one, two) == (-(-size // 8), 1)
        case _:
            fits = (one, two) == (size, -(-size // SCALED))
    if not fits:
        raise CheckpointError(
            f"{parts.path}: expected parts of {size} numbers for tensor {name!r}, found "
            f"{kind[0]} of {one} and {kind[1]} of {two}; the file was damaged. Make it again"
        )


def _shape_part(shape: tuple[int, ...]) -> Parts:
    yield "shape", "I64", [np.array(shape, np.int64)]
