"""target + scale * residual, onto the right parent, once, whole or not at all."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.weights.checkpoints import DTYPES, TOKENS, Tensors, nudged, random_tensors, save

from fedgraft.errors import ArtefactError, NonFiniteError, ResidualError
from fedgraft.provenance import Record
from fedgraft.weights import graft as graft_module
from fedgraft.weights import writer
from fedgraft.weights.checkpoint import Checkpoint
from fedgraft.weights.family import Family
from fedgraft.weights.graft import graft
from fedgraft.weights.residual import Residual, extract

EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
BASE = random_tensors()
TRAINED = nudged(BASE, seed=2)


@pytest.fixture
def residual(tmp_path: Path) -> Path:
    """A residual beside its parents `base` and `instruct`."""
    parents = Family.open(
        save(tmp_path / "base", BASE, rope_theta=1e4),
        save(tmp_path / "instruct", nudged(BASE, seed=1), rope_theta=1e4),
    )
    return extract(parents, tmp_path / "residual").path


def child_of(parent: Path, **fields: Any) -> Record:
    """The record of a checkpoint that was trained from `parent`."""
    source = Checkpoint.open(parent)
    ancestors = (*(source.record.ancestors if source.record else ()), source.content_hash)
    return Record.make("checkpoint", ancestors=ancestors, **fields)


def numbers(path: Path) -> Tensors:
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_a_graft_onto_the_base_itself_is_the_instruct_model(tmp_path: Path, residual: Path) -> None:
    out = graft(tmp_path / "base", residual, tmp_path / "graft")
    assert same(numbers(out), nudged(BASE, seed=1))
    assert Checkpoint.open(out).content_hash == Residual.open(residual).instruct_hash


def test_scale_zero_changes_nothing(tmp_path: Path, residual: Path) -> None:
    out = graft(tmp_path / "base", residual, tmp_path / "graft", scale=0.0)
    assert same(numbers(out), BASE)


@given(scale=st.floats(-3, 3, allow_nan=False), dtype=st.sampled_from(["BF16", "F16", "F32"]))
def test_a_graft_is_the_sum_in_float32_rounded_once(
    tmp_path_factory: pytest.TempPathFactory, scale: float, dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("sum")
    base = random_tensors(dtype=dtype)
    parents = Family.open(save(folder / "base", base), save(folder / "instruct", nudged(base)))
    added = extract(parents, folder / "residual")
    target = nudged(base, seed=2)
    path = save(folder / "target", target, record=child_of(folder / "base"), num_shards=2)
    found = numbers(graft(path, folder / "residual", folder / "graft", scale=scale))
    for name, old in target.items():
        total = old.astype(np.float32) + np.float32(scale) * added.read(name)
        assert found[name].tobytes() == total.astype(old.dtype).tobytes()


def test_grafts_add_up(tmp_path: Path) -> None:
    base = random_tensors(dtype="F32")
    parents = Family.open(save(tmp_path / "base", base), save(tmp_path / "instruct", nudged(base)))
    extract(parents, tmp_path / "residual")
    a, b, both = (
        numbers(graft(tmp_path / "base", tmp_path / "residual", tmp_path / str(s), scale=s))
        for s in (0.5, 0.75, 1.25)
    )
    for name, old in base.items():
        np.testing.assert_allclose(a[name] + b[name] - old, both[name], atol=1e-7)


def test_a_graft_carries_all_of_the_instruct_side_but_the_numbers(
    tmp_path: Path, residual: Path
) -> None:
    out = graft(tmp_path / "base", residual, tmp_path / "graft")
    assert sorted(file.name for file in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "fedgraft.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (out / "chat_template.jinja").read_text() == "template of instruct"
    assert (out / "config.json").read_bytes() == (tmp_path / "instruct/config.json").read_bytes()


def test_the_config_states_the_dtype_and_the_rows_that_were_written(
    tmp_path: Path, residual: Path
) -> None:
    target = {name: tensor.astype(np.float32) for name, tensor in random_tensors(rows=24).items()}
    path = save(tmp_path / "target", target, record=child_of(tmp_path / "base"), vocab_size=24)
    config = json.loads((graft(path, residual, tmp_path / "graft") / "config.json").read_text())
    assert (config["dtype"], config["vocab_size"]) == ("float32", 24)


def test_a_config_of_older_transformers_keeps_its_word_for_the_dtype(tmp_path: Path) -> None:
    folders = [save(tmp_path / x, BASE, torch_dtype="float32") for x in ("base", "instruct")]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        del config["dtype"]
        (folder / "config.json").write_text(json.dumps(config))
    extract(Family.open(*folders), tmp_path / "residual")
    out = graft(tmp_path / "base", tmp_path / "residual", tmp_path / "graft")
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert "dtype" not in config


@pytest.mark.parametrize("rows", [18, 24])
def test_the_common_rows_are_grafted_and_the_target_keeps_its_rows(
    tmp_path: Path, residual: Path, rows: int
) -> None:
    target = random_tensors(seed=5, rows=rows)
    path = save(tmp_path / "target", target, record=child_of(tmp_path / "base"))
    found = numbers(graft(path, residual, tmp_path / "graft"))[EMBEDDING]
    added, common = Residual.open(residual).read(EMBEDDING), min(rows, 20)
    total = target[EMBEDDING].astype(np.float32)
    total[:common] += added[:common]
    assert found.tobytes() == total.astype(found.dtype).tobytes()
    assert found[common:].tobytes() == target[EMBEDDING][common:].tobytes()


def test_the_record_names_target_residual_and_all_ancestors(tmp_path: Path, residual: Path) -> None:
    path = save(tmp_path / "target", TRAINED, record=child_of(tmp_path / "base"))
    record = Record.read(graft(path, residual, tmp_path / "graft", scale=0.5))
    assert record
    target, added = Checkpoint.open(path).content_hash, Residual.open(residual).content_hash
    assert record.kind == "graft"
    assert record.inputs == {"target": target, "residual": added}
    assert record.ancestors == (Checkpoint.open(tmp_path / "base").content_hash, target)
    assert (record.residuals, record.settings) == ((added,), {"scale": 0.5})


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, residual: Path) -> None:
    outs = [graft(tmp_path / "base", residual, tmp_path / name) for name in ("first", "second")]
    first, second = (
        {file.name: file.read_bytes() for file in sorted(out.iterdir())} for out in outs
    )
    assert first == second


def grafted_already(tmp_path: Path) -> Path:
    return graft(tmp_path / "base", tmp_path / "residual", tmp_path / "once", scale=0.5)


def trained_from_a_graft(tmp_path: Path) -> Path:
    record = child_of(grafted_already(tmp_path), residuals=("sha256:1",))
    return save(tmp_path / "trained", TRAINED, record=record)


def trained_from_instruct(tmp_path: Path) -> Path:
    return save(tmp_path / "s1", TRAINED, record=child_of(tmp_path / "instruct"))


def trained_from_another_base(tmp_path: Path) -> Path:
    other = save(tmp_path / "other", random_tensors(seed=9))
    return save(tmp_path / "trained", TRAINED, record=child_of(other))


UNPROVEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "another base": (
        trained_from_another_base,
        "expected a descendant of the residual's base .* descends from another base.*--any-parent",
    ),
    "the other base itself": (
        lambda tmp_path: save(tmp_path / "other", random_tensors(seed=9)),
        "which has no record of its ancestors.*--any-parent",
    ),
    "a trained model without a record": (
        lambda tmp_path: save(tmp_path / "trained", TRAINED),
        "which has no record of its ancestors.*--any-parent",
    ),
}

REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a graft": (grafted_already, "found a graft .* a residual is added once"),
    "what was trained from a graft": (trained_from_a_graft, "trained from a graft"),
    "the instruct model": (lambda tmp_path: tmp_path / "instruct", "found the instruct model"),
    "what was trained from instruct": (trained_from_instruct, "or one trained from it"),
    "another architecture": (
        lambda tmp_path: save(tmp_path / "x", BASE, architectures=["Qwen2ForCausalLM"]),
        ": the architecture is Qwen2ForCausalLM and LlamaForCausalLM",
    ),
    "another size": (
        lambda tmp_path: save(tmp_path / "x", BASE, num_attention_heads=4),
        "num_attention_heads is 4 and 2",
    ),
    "another rotary base": (
        lambda tmp_path: save(tmp_path / "x", BASE, rope_theta=1e6),
        r"rope_theta is 1000000.0 and 10000.0\. Extract .* set them in the config.json of base and "
        "instruct model first",
    ),
    "another depth": (
        lambda tmp_path: save(tmp_path / "x", random_tensors(num_layers=3)),
        "tensor 'model.layers.2.mlp.up_proj.weight' is missing in the second",
    ),
    "another shape": (
        lambda tmp_path: save(tmp_path / "x", BASE | {UP: BASE[UP].reshape(8, 12)}),
        rf"tensor '{UP}' has shape \[8, 12\] and \[12, 8\]",
    ),
    "another vocabulary": (
        lambda tmp_path: save(tmp_path / "x", BASE, tokens=(*TOKENS[:15], "x", "y", "z")),
        "only 15 of 18 tokens are the same, the first other one is 'x' with id 15",
    ),
    "a token fewer than the base": (
        lambda tmp_path: save(tmp_path / "x", BASE, tokens=(*TOKENS[:-1], "<eot>")),
        r"expected a row for token '<\|im_end\|>', which the residual's base has, found none",
    ),
    "tied embeddings": (
        lambda tmp_path: save(tmp_path / "x", random_tensors(tied=True), tie_word_embeddings=True),
        "the embeddings are tied and not tied",
    ),
}


@pytest.mark.parametrize("case", UNPROVEN)
def test_a_target_of_another_or_unknown_base_is_refused_unless_any_parent(
    tmp_path: Path, residual: Path, case: str
) -> None:
    make, message = UNPROVEN[case]
    target = make(tmp_path)
    with pytest.raises(ResidualError, match=f"{target}.*{message}"):
        graft(target, residual, tmp_path / "graft")
    assert not (tmp_path / "graft").exists()
    record = Record.read(graft(target, residual, tmp_path / "graft", any_parent=True))
    assert record
    assert record.ancestors[-1] == Checkpoint.open(target).content_hash


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_grafted_is_refused_whatever_is_asked(
    tmp_path: Path, residual: Path, case: str
) -> None:
    make, message = REFUSED[case]
    target = make(tmp_path)
    for any_parent in (False, True):
        with pytest.raises(ResidualError, match=f"{target}.*{message}"):
            graft(target, residual, tmp_path / "graft", any_parent=any_parent)
    assert not (tmp_path / "graft").exists()


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_no_number_is_refused(tmp_path: Path, residual: Path, scale: float) -> None:
    with pytest.raises(ResidualError, match=f"expected a finite scale, found {scale}"):
        graft(tmp_path / "base", residual, tmp_path / "graft", scale=scale)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_in_the_target_are_refused_by_tensor_name(
    tmp_path: Path, residual: Path, number: float
) -> None:
    target = nudged(BASE)
    target[UP][0, 0] = number
    path = save(tmp_path / "target", target, record=child_of(tmp_path / "base"))
    with pytest.raises(NonFiniteError, match=f"{path}: .* NaN or infinity in tensor '{UP}'"):
        graft(path, residual, tmp_path / "graft")
    assert not (tmp_path / "graft").exists()


def test_nan_in_the_residual_is_refused_by_tensor_name(tmp_path: Path, residual: Path) -> None:
    file = residual / "residual.safetensors"
    last = "model.layers.1.norm.weight"
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    file.write_bytes(data)
    with pytest.raises(NonFiniteError, match=f"{residual}: .* NaN or infinity in tensor '{last}'"):
        graft(tmp_path / "base", residual, tmp_path / "graft")


def test_a_sum_too_large_for_the_dtype_is_refused_by_tensor_name(tmp_path: Path) -> None:
    base = random_tensors(dtype="F16")
    instruct = base | {UP: base[UP] + np.float16(100)}
    parents = Family.open(save(tmp_path / "base", base), save(tmp_path / "instruct", instruct))
    extract(parents, tmp_path / "residual")
    message = f"expected sums within float16, found larger ones in tensor '{UP}' at scale 1000"
    with pytest.raises(NonFiniteError, match=message):
        graft(tmp_path / "base", tmp_path / "residual", tmp_path / "graft", scale=1000)


def test_an_output_is_not_replaced_unless_asked(tmp_path: Path, residual: Path) -> None:
    out = graft(tmp_path / "base", residual, tmp_path / "graft")
    with pytest.raises(ArtefactError, match="exists already"):
        graft(tmp_path / "base", residual, out)
    graft(tmp_path / "base", residual, out, scale=0, overwrite=True)
    assert same(numbers(out), BASE)


def test_a_disk_without_room_is_refused_and_nothing_is_left(
    tmp_path: Path, residual: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(ArtefactError, match="GB of free space"):
        graft(tmp_path / "base", residual, tmp_path / "graft")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "instruct", "residual"]


def test_kill_9_leaves_no_checkpoint_and_the_next_run_cleans_up(
    tmp_path: Path, residual: Path
) -> None:
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    code = """
        import time
        from pathlib import Path
        from fedgraft.weights import graft
        blocks = graft.Checkpoint.blocks
        def stalling(self, name, *options):
            yield from blocks(self, name, *options)
            if name == "model.layers.1.mlp.up_proj.weight":
                print("half way", flush=True)
                time.sleep(60)
        target = graft.Checkpoint.open("base")
        target.content_hash
        graft.Checkpoint.open = lambda _: target
        graft.Checkpoint.blocks = stalling  # from here on it is read to be written
        graft.graft("base", "residual", Path("graft"))
        """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "half way\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "graft").exists()
    assert list(tmp_path.glob(".graft.partial-*/model.safetensors"))
    assert {file: file.read_bytes() for file in before} == before
    graft(tmp_path / "base", residual, tmp_path / "graft")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "graft", "instruct", "residual"]


MEASURE = """
    import resource, sys
    from pathlib import Path
    from fedgraft.weights.family import Family
    from fedgraft.weights.graft import graft
    from fedgraft.weights.residual import extract
    extract(Family.open("base", "instruct"), Path("residual"))
    graft("base", "residual", Path("graft"))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert "torch" not in sys.modules and "transformers" not in sys.modules
    """


def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for num_layers in (2, 40):
        folder = tmp_path / str(num_layers)
        folder.mkdir()
        tensors = random_tensors(num_layers=1)
        wide = np.zeros((1024, 1024), DTYPES["BF16"])
        tensors |= {f"model.layers.{i}.mlp.up_proj.weight": wide for i in range(num_layers)}
        save(folder / "base", tensors)
        shutil.copytree(folder / "base", folder / "instruct")
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MEASURE)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < peaks[0] + 15, f"megabytes at 4 and at 80 MB of weights: {peaks}"


def test_one_pass_over_a_family_equals_extracting_and_grafting(
    tmp_path: Path, residual: Path
) -> None:
    path = save(tmp_path / "target", TRAINED, record=child_of(tmp_path / "base"))
    family = Family.open(tmp_path / "base", tmp_path / "instruct")
    for scale in (0.0, 0.7, 1.0):
        two = graft(path, residual, tmp_path / f"two {scale}", scale=scale)
        one = graft(path, family, tmp_path / f"one {scale}", scale=scale)
        assert same(numbers(one), numbers(two))


def test_one_pass_refuses_another_base_after_reading_it(tmp_path: Path, residual: Path) -> None:
    family = Family.open(save(tmp_path / "other", TRAINED), residual.parent / "instruct")
    with pytest.raises(ResidualError, match="has no record of its ancestors"):
        graft(tmp_path / "base", family, tmp_path / "graft")
    assert not (tmp_path / "graft").exists()


@pytest.fixture
def second(tmp_path: Path, residual: Path) -> Path:
    """Another residual of the same base."""
    other = save(tmp_path / "instruct2", nudged(BASE, seed=3))
    return extract(Family.open(residual.parent / "base", other), tmp_path / "residual2").path


def test_several_residuals_are_added_each_with_its_scale(
    tmp_path: Path, residual: Path, second: Path
) -> None:
    out = graft(tmp_path / "base", [residual, second], tmp_path / "graft", scale=[0.5, 2.0])
    a, b = Residual.open(residual), Residual.open(second)
    for name, found in numbers(out).items():
        added = np.float32(0.5) * a.read(name) + np.float32(2.0) * b.read(name)
        expected = (BASE[name].astype(np.float32) + added).astype(BASE[name].dtype)
        assert found.tobytes() == expected.tobytes()
    record = Record.read(out)
    assert record
    assert record.residuals == (a.content_hash, b.content_hash)
    assert record.settings == {"scale": [0.5, 2.0]}
    with pytest.raises(ResidualError, match=r"found a graft .*, of this very residual; a residual"):
        graft(out, second, tmp_path / "again")


def test_several_residuals_that_do_not_go_together_are_refused(
    tmp_path: Path, residual: Path, second: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "graft"
    foreign = Family.open(save(tmp_path / "trained", TRAINED), tmp_path / "instruct2")
    other = extract(foreign, tmp_path / "foreign").path
    with pytest.raises(
        ResidualError, match=r"expected residuals of one base, found .* extract both"
    ):
        graft(base, [residual, other], out)
    with pytest.raises(
        ResidualError, match=f"expected different residuals, found {residual} twice"
    ):
        graft(base, [residual, residual], out)
    with pytest.raises(ResidualError, match="one for each of 2 residuals, found 3"):
        graft(base, [residual, second], out, scale=[1.0, 1.0, 1.0])
    with pytest.raises(ResidualError, match="expected at least one residual, found none"):
        graft(base, [], out)
    tokens = (*TOKENS[:16], TOKENS[17], TOKENS[16])
    reordered = Family.open(base, save(tmp_path / "reordered", nudged(BASE, seed=4), tokens=tokens))
    with pytest.raises(ResidualError, match="the same tokens in the same order, found others"):
        graft(base, [residual, reordered], out)


def test_a_changed_residual_is_refused_whole(tmp_path: Path, residual: Path) -> None:
    file = residual / "residual.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ResidualError, match=r"damaged or changed\. Extract it again"):
        graft(tmp_path / "base", residual, tmp_path / "graft")
    assert not (tmp_path / "graft").exists()


@pytest.mark.parametrize("system", ["Linux", "macOS"])
def test_what_is_written_is_read_back_on_demand(
    tmp_path: Path, residual: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    if system == "macOS":
        monkeypatch.delattr(os, "posix_fadvise")
    out = graft(tmp_path / "base", residual, tmp_path / "graft", verify=True)
    record = Record.read(out)
    assert record
    assert record.figures["content"] == Checkpoint.open(out).content_hash

    written = writer.write_tensors

    def faulty(folder: Path, *arguments: Any) -> writer.Written:
        content = written(folder, *arguments)
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"!")
        return content

    monkeypatch.setattr(graft_module, "write_tensors", faulty)
    with pytest.raises(ArtefactError, match="the disk or the memory is faulty"):
        graft(tmp_path / "base", residual, tmp_path / "faulty", verify=True)
    assert not (tmp_path / "faulty").exists()


@pytest.mark.parametrize(
    "target",
    [grafted_already, trained_from_instruct, lambda tmp_path: tmp_path / "instruct"],
    ids=["a graft", "what was trained from instruct", "the instruct model"],
)
def test_a_target_with_instructions_is_taken_where_that_is_asked_for(
    tmp_path: Path, residual: Path, target: Callable[[Path], Path]
) -> None:
    before = target(tmp_path)
    out = graft(before, residual, tmp_path / "again", any_parent=True, again=True)
    added, after = Residual.open(residual), numbers(out)
    for name, old in numbers(before).items():
        expected = old.astype(np.float32) + added.read(name).astype(np.float32)
        assert np.array_equal(after[name], expected.astype(old.dtype)), name
    known = Record.read(before)
    record = Record.read(out)
    assert record
    assert record.residuals == (*(known.residuals if known else ()), added.content_hash)


def test_asking_for_it_again_lets_no_stranger_in(tmp_path: Path, residual: Path) -> None:
    with pytest.raises(ResidualError, match="descends from another base"):
        graft(trained_from_another_base(tmp_path), residual, tmp_path / "out", again=True)
