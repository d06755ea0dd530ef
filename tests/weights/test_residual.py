"""base + residual gives back instruct, and where it does not the record says so."""

import errno
import math
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tests.weights.checkpoints import DTYPES, Tensors, nudged, random_tensors, save

from fedgraft.errors import ArtefactError, CheckpointError, NonFiniteError, ResidualError
from fedgraft.provenance import Record
from fedgraft.weights import residual as residual_module
from fedgraft.weights.checkpoint import Checkpoint, TensorFiles
from fedgraft.weights.family import Family
from fedgraft.weights.graft import graft
from fedgraft.weights.residual import CARRYING, Residual, extract, verify

EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def family(folder: Path, base: Tensors, instruct: Tensors, **options: Any) -> Family:
    return Family.open(
        save(folder / "base", base, **options), save(folder / "instruct", instruct, **options)
    )


def restored(residual: Residual, base: Tensors) -> Tensors:
    """base + residual in float32, rounded once: the law in one line, in memory."""
    return {
        name: (base[name].astype(np.float32) + residual.read(name).astype(np.float32)).astype(
            base[name].dtype
        )
        for name in base
    }


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_base_plus_residual_gives_back_instruct_bit_for_bit(
    tmp_path: Path, dtype: str, num_shards: int
) -> None:
    base = random_tensors(dtype=dtype)
    instruct = nudged(base, size=1e-6 if dtype == "F32" else 2e-3)
    residual = extract(
        family(tmp_path, base, instruct, num_shards=num_shards), tmp_path / "residual"
    )
    not_restored = {
        name: int(np.count_nonzero(found.view("u1") != instruct[name].view("u1")))
        for name, found in restored(residual, base).items()
    }
    if dtype == "F32":  # no float32 holds every difference of two others
        assert residual.record.figures["num_not_restored"] < 10
    else:
        assert not any(not_restored.values())
        assert residual.record.figures["num_not_restored"] == 0


WORDS = st.lists(
    st.integers(0, 2**16 - 1).filter(lambda word: word & 0x7F80 != 0x7F80), min_size=8, max_size=8
)


@given(
    before=WORDS,
    after=WORDS,
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_what_is_not_restored_bit_for_bit_is_counted_by_tensor(
    tmp_path_factory: pytest.TempPathFactory,
    before: list[int],
    after: list[int],
    dtype: Literal["float32", "bfloat16"],
) -> None:
    folder = tmp_path_factory.mktemp("words")
    base, instruct = random_tensors(), random_tensors()
    name = "model.layers.0.norm.weight"
    # half the range of exponents, so that no difference overflows
    base[name] = (np.array(before, np.uint16) & 0xBFFF).view(DTYPES["BF16"])
    instruct[name] = (np.array(after, np.uint16) & 0xBFFF).view(DTYPES["BF16"])
    residual = extract(family(folder, base, instruct), folder / "residual", form=dtype)
    found = restored(residual, base)[name]
    wrong = int(np.count_nonzero(found.view(np.uint16) != instruct[name].view(np.uint16)))
    assert residual.record.figures["num_not_restored"] == wrong
    assert residual.record.figures["not_restored"] == ({name: wrong} if wrong else {})


def test_streamed_equals_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = TensorFiles.blocks
    monkeypatch.setattr(TensorFiles, "blocks", lambda self, name, n=7: blocks(self, name, n))
    base = random_tensors()
    instruct = nudged(base)
    residual = extract(family(tmp_path, base, instruct), tmp_path / "residual")
    for name, found in load_file(tmp_path / "residual" / "residual.safetensors").items():
        expected = instruct[name].astype(np.float32) - base[name].astype(np.float32)
        assert found.dtype == np.float32
        assert found.tobytes() == expected.tobytes()
    ratio = math.sqrt(
        sum(np.sum((instruct[n].astype(float) - base[n].astype(float)) ** 2) for n in base)
        / sum(np.sum(base[n].astype(float) ** 2) for n in base)
    )
    assert residual.relative_norm == pytest.approx(ratio, rel=1e-5)
    assert 0.05 < ratio < 0.2


def test_a_bfloat16_residual_is_the_float32_one_rounded_once(tmp_path: Path) -> None:
    base = random_tensors()
    parents = family(tmp_path, base, nudged(base))
    exact = extract(parents, tmp_path / "exact")
    rounded = extract(parents, tmp_path / "rounded", form="bfloat16")
    for name in base:
        expected = exact.read(name).astype(DTYPES["BF16"])
        assert rounded.read(name).tobytes() == expected.tobytes()


def test_the_residual_of_a_model_with_itself_is_zero(tmp_path: Path) -> None:
    base = random_tensors()
    residual = extract(family(tmp_path, base, base), tmp_path / "residual")
    assert residual.relative_norm == 0
    assert not any(residual.read(name).any() for name in residual.tensors)


def test_the_same_parents_give_the_same_bytes(tmp_path: Path) -> None:
    base = random_tensors()
    parents = family(tmp_path, base, nudged(base))
    files = []
    for name in ("first", "second"):
        extract(parents, tmp_path / name)
        found = sorted(file for file in (tmp_path / name).rglob("*") if file.is_file())
        files.append([(file.relative_to(tmp_path / name), file.read_bytes()) for file in found])
    assert files[0] == files[1]
    assert [str(name) for name, _ in files[0]] == [
        "fedgraft.json",
        "instruct/chat_template.jinja",
        "instruct/config.json",
        "instruct/generation_config.json",
        "instruct/tokenizer.json",
        "residual.safetensors",
    ]


def test_a_residual_knows_its_parents_by_content(tmp_path: Path) -> None:
    base = random_tensors()
    extract(family(tmp_path, base, nudged(base)), tmp_path / "residual")
    residual = Residual.open(tmp_path / "residual")
    assert residual.base_hash == Checkpoint.open(tmp_path / "base").content_hash
    assert residual.instruct_hash == Checkpoint.open(tmp_path / "instruct").content_hash
    assert str(tmp_path) not in (tmp_path / "residual" / "fedgraft.json").read_text()


@pytest.mark.parametrize(("base_rows", "instruct_rows"), [(18, 20), (20, 18), (19, 19)])
def test_padding_rows_that_the_base_lacks_are_carried_whole(
    tmp_path: Path, base_rows: int, instruct_rows: int
) -> None:
    base, instruct = random_tensors(rows=base_rows), random_tensors(seed=1, rows=instruct_rows)
    residual = extract(family(tmp_path, base, instruct), tmp_path / "residual")
    padded = np.zeros((20, 8), np.float32)
    padded[:base_rows] = base[EMBEDDING]
    expected = instruct[EMBEDDING].astype(np.float32) - padded[:instruct_rows]
    assert residual.whole_rows.tolist() == list(range(base_rows, instruct_rows))
    assert residual.read(EMBEDDING).tobytes() == expected.astype(np.float32).tobytes()
    assert residual.base_hash == Checkpoint.open(tmp_path / "base").content_hash
    assert residual.instruct_hash == Checkpoint.open(tmp_path / "instruct").content_hash


@pytest.mark.parametrize("side", ["base", "instruct"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_nan_and_infinity_are_refused_by_tensor_name(
    tmp_path: Path, side: str, number: float, dtype: str
) -> None:
    tensors = {"base": random_tensors(dtype=dtype), "instruct": random_tensors(dtype=dtype)}
    tensors[side][UP][3, 4] = number
    parents = family(tmp_path, **tensors)
    with pytest.raises(
        NonFiniteError, match=f"{tmp_path / side}: .* NaN or infinity in tensor '{UP}'"
    ):
        extract(parents, tmp_path / "residual")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["base", "instruct"]


def test_numbers_whose_squares_overflow_are_finite(tmp_path: Path) -> None:
    base = random_tensors(dtype="F32")
    base[UP][0, 0] = 1e30
    residual = extract(family(tmp_path, base, nudged(base)), tmp_path / "residual")
    assert 0 <= residual.relative_norm < 1


def test_a_residual_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    base = random_tensors()
    parents = family(tmp_path, base, nudged(base))
    extract(parents, tmp_path / "residual")
    with pytest.raises(ArtefactError, match="exists already"):
        extract(parents, tmp_path / "residual")
    assert extract(parents, tmp_path / "residual", overwrite=True)


def test_what_is_no_residual_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", random_tensors(), record=Record.make("checkpoint"))
    with pytest.raises(ResidualError, match="expected a residual, found checkpoint; make one with"):
        Residual.open(folder)
    with pytest.raises(ResidualError, match="expected a residual, found no record; make one with"):
        Residual.open(tmp_path / "nowhere")


def test_a_damaged_residual_is_refused(tmp_path: Path) -> None:
    base = random_tensors()
    extract(family(tmp_path, base, nudged(base)), tmp_path / "residual")
    with (tmp_path / "residual" / "residual.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="is truncated or has a tail"):
        Residual.open(tmp_path / "residual")


def test_a_disk_that_fills_up_leaves_nothing_and_the_next_run_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_tensors()
    parents = family(tmp_path, base, nudged(base))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(residual_module, "copy_companions", full)
        with pytest.raises(ArtefactError, match="No space left on device; nothing was left there"):
            extract(parents, tmp_path / "residual")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["base", "instruct"]
    assert extract(parents, tmp_path / "residual")


def python(code: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_file_system_that_takes_no_larger_file_is_one_clear_message(tmp_path: Path) -> None:
    base = random_tensors()
    family(tmp_path, base, nudged(base))
    process = python(
        """
        from pathlib import Path
        from fedgraft.weights.residual import Family, extract
        extract(Family.open("base", "instruct"), Path("residual"))
        """,
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1200, 1200)),
    )
    _, message = process.communicate()
    assert "ArtefactError: could not write" in message
    assert "File too large; nothing was left there. Free some space" in message
    assert sorted(child.name for child in tmp_path.iterdir()) == ["base", "instruct"]


def test_kill_9_leaves_no_residual_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    base = random_tensors()
    parents = family(tmp_path, base, nudged(base))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    process = python(
        """
        import sys, time
        from pathlib import Path
        from fedgraft.weights import residual
        def stall(*_):
            print("half way", flush=True)
            time.sleep(60)
        residual.copy_companions = stall
        residual.extract(residual.Family.open("base", "instruct"), Path("residual"))
        """,
        cwd=tmp_path,
    )
    assert process.stdout
    assert process.stdout.readline() == "half way\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "residual").exists()
    assert [child.name for child in tmp_path.glob(".residual*")]
    assert {file: file.read_bytes() for file in before} == before
    extract(parents, tmp_path / "residual")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["base", "instruct", "residual"]


ADVERSARIAL = {
    "BF16": [0.0, -0.0, 1e-40, -1e-40, 1e-30, 1.0, -1.0, 1.0078125, 3e4, -6e37, 6e37, 1e-38],
    "F16": [0.0, -0.0, 6e-8, -6e-8, 1e-5, 1.0, -1.0, 1.001, 3e4, -3e4, 65504.0, 6e-5],
    "F32": [0.0, -0.0, 1e-45, -1e-45, 1e-30, 1.0, -1.0, 1.0000001, 3e4, -1e38, 1e38, 1.2e-38],
}


@given(data=st.data(), dtype=st.sampled_from(sorted(ADVERSARIAL)), form=st.sampled_from(CARRYING))
def test_the_carrying_forms_give_the_instruct_model_back_whatever_its_numbers(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: str, form: Any
) -> None:
    folder = tmp_path_factory.mktemp("adversarial")
    numbers = st.lists(st.sampled_from(ADVERSARIAL[dtype]), min_size=8, max_size=8)
    sides = []
    for _ in range(2):
        tensors = random_tensors(dtype=dtype)
        for layer in (0, 1):
            values = np.array(data.draw(numbers))
            tensors[f"model.layers.{layer}.norm.weight"] = values.astype(DTYPES[dtype])
        sides.append(tensors)
    parents = family(folder, *sides)
    residual = extract(parents, folder / "residual", form=form)
    found = Checkpoint.open(graft(folder / "base", residual, folder / "graft"))
    assert found.content_hash == residual.instruct_hash
    assert verify(residual, parents).not_restored == {}
    half = graft(folder / "base", residual, folder / "half", scale=0.5)
    plain = graft(folder / "base", parents, folder / "plain", scale=0.5)
    assert (
        form == "auto" or Checkpoint.open(half).content_hash == Checkpoint.open(plain).content_hash
    )


def test_a_number_that_the_target_has_moved_is_no_exception(tmp_path: Path) -> None:
    name = "model.layers.0.norm.weight"
    base, instruct = random_tensors(), random_tensors()
    base[name][:2], instruct[name][:2] = 1.0, 1e-9
    residual = extract(family(tmp_path, base, instruct), tmp_path / "residual", form="auto")
    assert residual.record.figures["not_restored"] == {name: 2}
    target = base | {name: base[name].copy()}
    target[name][0] = 2.0
    record = Record.make("checkpoint", ancestors=(residual.base_hash,))
    out = graft(save(tmp_path / "target", target, record=record), residual, tmp_path / "graft")
    found = Checkpoint.open(out).read(name)
    assert found[0] == 1.0  # 2 + (1e-9 - 1)
    assert found[1].tobytes() == instruct[name][1].tobytes()


def test_auto_takes_bfloat16_for_the_tensors_that_it_restores(tmp_path: Path) -> None:
    base = random_tensors()
    instruct = nudged(base)
    name = "model.layers.0.norm.weight"
    instruct[name] = base[name] * np.array(2, base[name].dtype)
    residual = extract(family(tmp_path, base, instruct), tmp_path / "residual", form="auto")
    dtypes = {n: info.dtype for n, info in residual.tensors.items()}
    assert dtypes[name] == "BF16"
    assert dtypes[EMBEDDING] == "F32"
    assert all(x.tobytes() == instruct[n].tobytes() for n, x in restored(residual, base).items())


def test_a_form_that_there_is_not_is_refused(tmp_path: Path) -> None:
    base = random_tensors()
    with pytest.raises(ResidualError, match="among float32, bfloat16, auto, packed, found 'int3'"):
        extract(family(tmp_path, base, base), tmp_path / "residual", form="int3")  # type: ignore[arg-type]


def test_a_residual_without_its_instruct_folder_is_refused(tmp_path: Path) -> None:
    base = random_tensors()
    extract(family(tmp_path, base, nudged(base)), tmp_path / "residual")
    shutil.rmtree(tmp_path / "residual" / "instruct")
    with pytest.raises(
        ResidualError,
        match=f"{tmp_path / 'residual'}: expected the instruct side's config and tokenizer in "
        "instruct/, found no config.json there; copy the residual with that folder",
    ):
        Residual.open(tmp_path / "residual")


def test_a_residual_of_an_older_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    Record.make("residual", settings={"dtype": "float32"}).write(tmp_path / "old")
    with pytest.raises(ResidualError, match="in another layout; extract it again"):
        Residual.open(tmp_path / "old")


def test_verification_compares_hashes_and_adds_up(tmp_path: Path) -> None:
    base = random_tensors()
    parents = family(tmp_path, base, nudged(base))
    extract(parents, tmp_path / "exact")
    found = verify(Residual.open(tmp_path / "exact"), parents)
    assert found.sound
    assert (found.num_elements, found.not_restored) == (528, {})
    extract(parents, tmp_path / "rounded", form="bfloat16")
    rounded = Residual.open(tmp_path / "rounded")
    lossy = verify(rounded, parents)
    assert lossy.sound
    assert lossy.not_restored == rounded.record.figures["not_restored"]

    file = tmp_path / "exact" / "residual.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 64
    file.write_bytes(data)
    damaged = verify(Residual.open(tmp_path / "exact"), parents)
    assert not damaged.sound
    assert sum(damaged.not_restored.values()) == 1
    stranger = Family.open(save(tmp_path / "x", nudged(base, seed=5)), tmp_path / "instruct")
    assert not verify(rounded, stranger).sound
    small = save(tmp_path / "small", random_tensors(num_layers=1), num_hidden_layers=1)
    with pytest.raises(
        ResidualError, match=r"does not fit .*: num_hidden_layers is 1 and 2\. Name"
    ):
        verify(rounded, Family.open(small, small))


def test_verification_refuses_a_model_with_other_padding_rows_by_shape(tmp_path: Path) -> None:
    base = random_tensors()
    residual = extract(family(tmp_path, base, nudged(base)), tmp_path / "residual")
    padded = save(tmp_path / "padded", random_tensors(rows=24))
    with pytest.raises(
        ResidualError,
        match=f"does not fit {padded}: tensor 'lm_head.weight' has shape "
        r"\[24, 8\] and \[20, 8\]\. Name the two checkpoints",
    ):
        verify(residual, Family.open(tmp_path / "base", padded))
