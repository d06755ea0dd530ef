"""`pretrain`, `adapt`: verbs that train."""

from enum import StrEnum
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


class Reporter(StrEnum):
    """Where losses and learning rates go beside the terminal."""

    tensorboard = "tensorboard"
    wandb = "wandb"


class Schedule(StrEnum):
    """What the learning rate does after its warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class Precision(StrEnum):
    """What forward and backward passes are computed in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def pretrain(
    model: Model,
    data: Data,
    out: Out,
    tokens: Tokens,
    budget: Annotated[
        list[int] | None,
        typer.Option(
            "--budget",
            parser=count,
            metavar="N",
            help="Leave a checkpoint at so many tokens too, beside --out; repeatable.",
        ),
    ] = None,
    replay: Annotated[
        list[Path] | None,
        typer.Option("--replay", help="Old text to mix in, so that less is forgotten; repeatable."),
    ] = None,
    replay_share: Annotated[
        float, typer.Option("--replay-share", help="Share of the tokens that is old text.")
    ] = 0.1,
    learning_rate: LearningRate = 1e-5,
    schedule: Annotated[
        Schedule,
        typer.Option(help="After the warm-up: fall (cosine, linear), stay, or stay, then fall."),
    ] = Schedule.cosine,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises.")] = 0.05,
    lora_rank: Annotated[
        int | None,
        typer.Option("--lora-rank", help="Train low-rank factors and merge them.", min=1),
    ] = None,
    row_length: RowLength = 1024,
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", help="Row space of a step, in tokens.", min=1)
    ] = 4096,
    micro_batch_rows: Annotated[
        int | None, typer.Option("--micro-batch-rows", help="Rows at a time: less memory.", min=1)
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    precision: Annotated[
        Precision, typer.Option(help="Of the passes; weights stay in float32.")
    ] = Precision.auto,
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", help="Steps that a kill can cost at most.", min=1)
    ] = 200,
    shard: Annotated[
        bool, typer.Option("--shard", help="Share the model out among processes (FSDP).")
    ] = False,
    report_to: Annotated[
        list[Reporter] | None,
        typer.Option("--report-to", help="Losses and rates go there too; repeatable."),
    ] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Continue to pre-train a checkpoint on your text.

    All parameters are trained. Take the base, not the instruct model: the
    instructions come back with `fedgraft graft`. A run that was stopped goes on from
    its last checkpoint when the same command is run again.

    On several GPUs or machines the command is the same, started by a launcher:

        torchrun --nproc-per-node 8 -m fedgraft pretrain ... --shard
    """
    from fedgraft.training.pretrain import budget_path, continue_pretraining
    from fedgraft.training.settings import Lora, PretrainSettings

    budgets = tuple(sorted(set(budget or ())))
    settings = PretrainSettings(
        num_tokens=tokens,
        budgets=budgets,
        learning_rate=learning_rate,
        schedule=schedule.value,
        warmup=warmup,
        lora=Lora(rank=lora_rank, alpha=2 * lora_rank) if lora_rank else None,
        batch_tokens=batch_tokens,
        micro_batch_rows=micro_batch_rows,
        gradient_checkpointing=gradient_checkpointing,
        precision=precision.value,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    continue_pretraining(
        model,
        _pack(model, data, row_length, seed),
        out,
        settings,
        replay=_pack(model, replay, row_length, seed) if replay else None,
        replay_share=replay_share if replay else 0.0,
        overwrite=overwrite,
        sharded=shard,
        watchers=tuple(reporter.value for reporter in report_to or ()),
    )
    facts = [f"{tokens:,} tokens: {budget_path(out, tokens)}" for tokens in budgets]
    finish(
        "checkpoint", out, facts=facts, steps=[f"fedgraft graft {out} RESIDUAL --out runs/grafted"]
    )


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
    from fedgraft.training.adapter import train_adapter
    from fedgraft.training.settings import AdapterSettings

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
