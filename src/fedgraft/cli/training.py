"""`pretrain`, `adapt`: verbs that train."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgraft.cli.arguments import Data, Model, Out, Overwrite, Tokens, count
from fedgraft.cli.console import finish, say

if TYPE_CHECKING:
    from fedgraft.text.packing import Rows

NUM_PASSES = 3
"""How often an adapter reads its text where no budget is given."""

LearningRate = Annotated[float, typer.Option("--learning-rate", help="The highest, after warm-up.")]
RowLength = Annotated[int, typer.Option("--row-length", help="Tokens per packed row.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same weights.")]


def pretrain(
    model: Model,
    data: Data,
    out: Out,
    tokens: Tokens,
    replay: Annotated[
        list[Path] | None,
        typer.Option("--replay", help="Old text to mix in, so that less is forgotten; repeatable."),
    ] = None,
    replay_share: Annotated[
        float, typer.Option("--replay-share", help="Share of the tokens that is old text.")
    ] = 0.1,
    learning_rate: LearningRate = 1e-5,
    row_length: RowLength = 1024,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Continue to pre-train a checkpoint on your text.

    All parameters are trained. Take the base, not the instruct model: the
    instructions come back with `fedgraft graft`. A run that was stopped goes on from
    its last checkpoint when the same command is run again.
    """
    from fedgraft.training.pretrain import continue_pretraining
    from fedgraft.training.trainer import TrainingSettings

    continue_pretraining(
        model,
        _pack(model, data, row_length, seed),
        out,
        TrainingSettings(num_tokens=tokens, learning_rate=learning_rate, seed=seed),
        replay=_pack(model, replay, row_length, seed) if replay else None,
        replay_share=replay_share if replay else 0.0,
        overwrite=overwrite,
    )
    finish("checkpoint", out, steps=[f"fedgraft graft {out} RESIDUAL --out runs/grafted"])


def adapt(
    model: Model,
    department: Annotated[str, typer.Option("--department", help="Whose text it is.")],
    data: Data,
    out: Out,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            parser=count,
            metavar="N",
            help="Budget, e.g. 500k.",
            show_default="3 passes",
        ),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="Rank of the adapter.")] = 8,
    learning_rate: LearningRate = 2e-4,
    row_length: RowLength = 1024,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train a LoRA adapter on one department's text.

    The model itself stays as it is. A run that was stopped goes on when the same
    command is run again.
    """
    from fedgraft.training.adapter import AdapterSettings, train_adapter

    rows = _pack(model, data, row_length, seed)
    settings = AdapterSettings(
        num_tokens=tokens or NUM_PASSES * rows.num_tokens,
        learning_rate=learning_rate,
        rank=rank,
        seed=seed,
    )
    train_adapter(model, rows, out, settings, department=department, overwrite=overwrite)
    finish("adapter", out, steps=[f"fedgraft chat {model} --adapter {out}"])


def _pack(model: str, paths: list[Path], row_length: int, seed: int) -> "Rows":
    """The text below some paths as rows for a model, with a line on what was read."""
    from fedgraft.models import open_tokenizer
    from fedgraft.text.corpus import Corpus
    from fedgraft.text.packing import pack
    from fedgraft.weights.checkpoint import read_config, resolve

    corpus = Corpus.load(*paths)
    rows = pack(
        open_tokenizer(resolve(model)),
        corpus.documents,
        row_length,
        seed=seed,
        num_positions=read_config(resolve(model)).get("max_position_embeddings"),
    )
    say(
        "text",
        f"{len(corpus.documents):,} documents, {rows.num_tokens:,} tokens in {len(rows):,} rows; "
        f"{corpus.num_duplicates:,} exact duplicates dropped",
    )
    return rows
