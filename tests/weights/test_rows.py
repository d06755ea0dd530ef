"""Rows of an embedding meet by token string: reordered, new, kept and padding rows."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.weights.checkpoints import Tensors, nudged, random_tensors, save
from tokenizers import Tokenizer, models

from fedgraft.errors import CheckpointError, ResidualError
from fedgraft.provenance import Record
from fedgraft.weights.checkpoint import Checkpoint
from fedgraft.weights.family import Family
from fedgraft.weights.graft import graft
from fedgraft.weights.merging import Method
from fedgraft.weights.residual import extract

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = tuple(f"t{i}" for i in range(20))


def arranged(tensors: Tensors, rows: list[int]) -> Tensors:
    """The same weights with other rows; -1 is a new random one."""
    new = np.random.default_rng(9).normal(0, 0.02, (len(rows), 8)).astype(ml_dtypes.bfloat16)
    moved = {
        name: np.array(
            [tensors[name][row] if row >= 0 else new[n] for n, row in enumerate(rows)],
            dtype=tensors[name].dtype,
        )
        for name in (EMBEDDING, OUTPUT)
    }
    return tensors | moved


def by_token(path: Path, name: str = EMBEDDING) -> dict[str, bytes]:
    """Each token's row, whatever its id."""
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    rows = Checkpoint.open(path).read(name)
    return {token: rows[i].tobytes() for token, i in ids.items()}


def descendant(base: Path) -> Record:
    return Record.make("checkpoint", ancestors=(Checkpoint.open(base).content_hash,))


@given(before=st.permutations(range(20)), after=st.permutations(range(20)), one_pass=st.booleans())
def test_the_order_of_ids_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, before: list[int], after: list[int], one_pass: bool
) -> None:
    folder = tmp_path_factory.mktemp("orders")
    base, target = random_tensors(), nudged(random_tensors(), seed=2)
    instruct = nudged(base)
    straight = Family.open(
        save(folder / "base", base, tokens=TOKENS),
        save(folder / "instruct", instruct, tokens=TOKENS),
    )
    save(folder / "target", target, tokens=TOKENS, record=descendant(folder / "base"))
    expected = graft(folder / "target", straight, folder / "expected", scale=0.7)

    mixed = Family.open(
        save(folder / "base2", arranged(base, before), tokens=tuple(TOKENS[i] for i in before)),
        save(
            folder / "instruct2", arranged(instruct, after), tokens=tuple(TOKENS[i] for i in after)
        ),
    )
    record = descendant(folder / "base2")
    save(folder / "target2", target, tokens=TOKENS, record=record)
    residual = mixed if one_pass else extract(mixed, folder / "residual")
    found = graft(folder / "target2", residual, folder / "found", scale=0.7)
    for name in (EMBEDDING, OUTPUT):
        assert by_token(found, name) == by_token(expected, name)
    assert (found / "tokenizer.json").read_bytes() == (
        folder / "instruct2" / "tokenizer.json"
    ).read_bytes()


@pytest.fixture
def grown(tmp_path: Path) -> Family:
    """The instruct side has a token that has no row in its base, whose 18 rows all have tokens."""
    base = random_tensors(rows=18)
    instruct = arranged(nudged(base), [*range(17), -1, 17, -1])
    tokens = (*TOKENS[:17], "<|new|>", TOKENS[17])
    return Family.open(
        save(tmp_path / "base", base, tokens=TOKENS[:18]),
        save(tmp_path / "instruct", instruct, tokens=tokens),
    )


def test_a_token_of_the_instruct_side_alone_is_carried_whole_and_the_target_grows(
    tmp_path: Path, grown: Family
) -> None:
    residual = extract(grown, tmp_path / "residual")
    assert residual.whole_rows.tolist() == [17, 19]
    out = graft(tmp_path / "base", residual, tmp_path / "graft")
    instruct = Checkpoint.open(tmp_path / "instruct")
    assert Checkpoint.open(out).content_hash == instruct.content_hash
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 20
    half = graft(tmp_path / "base", residual, tmp_path / "half", scale=0.5)
    assert by_token(half)["<|new|>"] == by_token(tmp_path / "instruct")["<|new|>"]
    assert by_token(half)["t3"] not in (by_token(tmp_path / "instruct")["t3"], by_token(out)["t3"])


def test_a_target_that_has_the_new_token_itself_moves_towards_the_instruct_side(
    tmp_path: Path, grown: Family
) -> None:
    base = random_tensors(rows=18)
    own = arranged(nudged(base, seed=2), [*range(18), -1])
    record = descendant(tmp_path / "base")
    target = save(tmp_path / "target", own, tokens=(*TOKENS[:18], "<|new|>"), record=record)
    residual = extract(grown, tmp_path / "residual")
    new = Checkpoint.open(tmp_path / "instruct").read(EMBEDDING)[17].astype(np.float32)
    old = own[EMBEDDING][18].astype(np.float32)
    for scale in (0.0, 0.5, 1.0):
        out = graft(target, residual, tmp_path / f"at {scale}", scale=scale)
        expected = (old + np.float32(scale) * (new - old)).astype(ml_dtypes.bfloat16)
        assert by_token(out)["<|new|>"] == expected.tobytes()


def test_tokens_of_the_target_alone_are_kept_behind_and_named(tmp_path: Path) -> None:
    base = random_tensors()
    parents = Family.open(
        save(tmp_path / "base", base, tokens=TOKENS[:18]),
        save(tmp_path / "instruct", nudged(base), tokens=TOKENS[:18]),
    )
    residual = extract(parents, tmp_path / "residual")
    own = arranged(nudged(base, seed=2), [-1, *range(18), -1, -1])
    tokens = ("<|ours|>", *TOKENS[:18], "<|also|>")
    record = descendant(tmp_path / "base")
    target = save(tmp_path / "target", own, tokens=tokens, record=record)
    out = graft(target, residual, tmp_path / "graft", scale=0.0)
    assert by_token(out) == by_token(target)
    file = json.loads((out / "tokenizer.json").read_text())
    assert [(t["content"], t["id"]) for t in file["added_tokens"]] == [
        ("<|ours|>", 18),
        ("<|also|>", 19),
    ]
    assert Checkpoint.open(out).tensors[EMBEDDING].shape == (21, 8)
    whole = by_token(graft(target, residual, tmp_path / "whole"))  # their ids are padding in it
    assert all(whole[token] == by_token(target)[token] for token in ("<|ours|>", "<|also|>"))
    assert whole["t3"] != by_token(target)["t3"]


def test_the_tokenizers_library_gives_kept_tokens_the_ids_of_their_rows(tmp_path: Path) -> None:
    base = random_tensors()
    folders = [
        save(tmp_path / "base", base, tokens=TOKENS[:18]),
        save(tmp_path / "instruct", nudged(base), tokens=TOKENS[:18]),
    ]
    real = Tokenizer(models.WordLevel({t: i for i, t in enumerate(TOKENS[:18])}, unk_token="t0"))
    for folder in folders:
        real.save(str(folder / "tokenizer.json"))
    residual = extract(Family.open(*folders), tmp_path / "residual")
    target = save(tmp_path / "target", base, record=descendant(tmp_path / "base"))
    real.add_special_tokens(["<|ours|>"])
    real.save(str(target / "tokenizer.json"))
    out = graft(target, residual, tmp_path / "graft")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.token_to_id("<|ours|>") == 18
    assert tokenizer.encode("t3<|ours|>").ids == [3, 18]


def test_a_kept_token_without_a_tokenizer_json_to_name_it_in_is_refused(tmp_path: Path) -> None:
    base = random_tensors()
    folders = [
        save(tmp_path / "base", base, tokens=TOKENS[:18]),
        save(tmp_path / "instruct", nudged(base), tokens=TOKENS[:18]),
    ]
    for folder in folders:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(TOKENS[:18])}))
    record = descendant(tmp_path / "base")
    target = save(tmp_path / "target", base, tokens=TOKENS[:19], record=record)
    with pytest.raises(CheckpointError, match=f"expected a tokenizer.json, .* only {target} has"):
        graft(target, Family.open(*folders), tmp_path / "graft")
    assert not (tmp_path / "graft").exists()


def test_whole_rows_are_added_plainly_and_alone(tmp_path: Path, grown: Family) -> None:
    with pytest.raises(ResidualError, match="found 2 rows that only the instruct side has"):
        graft(tmp_path / "base", grown, tmp_path / "graft", method=Method(name="ties", density=0.5))
