"""`pretrain`, `adapt`: verbs that train."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgraft.cli.arguments import Data, Model, Out, Overwrite, Tokens, count
from fedgraft.cli.console import finish, say
from fedgraft.progress import is_first

if TYPE_CHECKING:
    from fedgraft.text.rows import Rows
    from fedgraft.text.sources import Document

NUM_PASSES = 3
"""How often an adapter reads its text where no budget is given."""

LearningRate = Annotated[float, typer.Option("--learning-rate", help="The highest, after warm-up.")]
REPLAY_SHARE = 0.1
ROW_LENGTH = 4096
RowLength = Annotated[
    int | None,
    typer.Option(
        "--row-length",
        help="Tokens per packed row.",
        show_default="4096, or as many as the model has positions",
    ),
]
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
        float | None,
        typer.Option(
            "--replay-share", help="Share of the tokens that is old text.", show_default="0.1"
        ),
    ] = None,
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
    row_length: RowLength = None,
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
    from fedgraft.provenance import check_free
    from fedgraft.training.pretrain import budget_path, continue_pretraining
    from fedgraft.training.settings import Lora, PretrainSettings

    budgets = tuple(sorted(set(budget or ())))
    with _checked():
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
    if replay_share is None:
        replay_share = REPLAY_SHARE if replay else 0.0
    elif not replay:
        raise typer.BadParameter("expected --replay, the old text, beside --replay-share")
    check_free(out, overwrite=overwrite)
    old = _packed(model, replay, out, row_length, seed, "replay") if replay else nullcontext()
    with _packed(model, data, out, row_length, seed) as rows, old as replayed:
        continue_pretraining(
            model,
            rows,
            out,
            settings,
            replay=replayed,
            replay_share=replay_share,
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
    row_length: RowLength = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train a LoRA adapter on one department's text.

    The model itself stays as it is. A run that was stopped goes on when the same
    command is run again.
    """
    from fedgraft.provenance import check_free
    from fedgraft.training.adapter import train_adapter
    from fedgraft.training.settings import AdapterSettings

    check_free(out, overwrite=overwrite)
    with _checked():
        settings = AdapterSettings(
            num_tokens=tokens or 1, learning_rate=learning_rate, rank=rank, seed=seed
        )
    with _packed(model, data, out, row_length, seed) as rows:
        if tokens is None:  # then it is known now
            settings = settings.model_copy(update={"num_tokens": NUM_PASSES * rows.num_tokens})
        train_adapter(model, rows, out, settings, department=department, overwrite=overwrite)
    finish("adapter", out, steps=[f"fedgraft chat {model} --adapter {out}"])


@contextmanager
def _checked() -> Iterator[None]:
    """Make one message of options that are out of range, or do not go together."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        from fedgraft.study.study import faults_of

        raise typer.BadParameter("; ".join(faults_of(error))) from None


@contextmanager
def _packed(
    model: str,
    paths: list[Path],
    out: Path,
    row_length: int | None,
    seed: int,
    role: str = "text",
) -> Iterator["Rows"]:
    """The text below some paths as rows for a model, kept on disk beside `out` until it is done.

    A corpus that `fedgraft corpus` wrote is read where it is for training, not where it is held
    out.
    """
    from fedgraft.models import open_tokenizer
    from fedgraft.text.cache import packed
    from fedgraft.training.processes import first_goes_first
    from fedgraft.weights.checkpoint import read_config, resolve

    folder = out.absolute().with_name(f".{out.name}.{role}")
    text = _Text([_training_part(path) for path in paths])
    num_positions = read_config(resolve(model)).get("max_position_embeddings")
    with first_goes_first():
        rows, line = packed(
            open_tokenizer(resolve(model)),
            text,
            folder,
            row_length or min(ROW_LENGTH, num_positions or ROW_LENGTH),
            seed=seed,
            num_positions=num_positions,
        )
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in text.tally.dropped.items() if n)
    say(role, f"{text.tally.num_kept:,} documents{f'; dropped: {dropped}' if dropped else ''}")
    say("", line)
    yield rows
    if is_first():
        shutil.rmtree(folder, ignore_errors=True)


def _training_part(path: Path) -> Path:
    from fedgraft.provenance import Record

    record = Record.read(path) if path.is_dir() else None
    return path / "train.jsonl" if record and record.kind == "corpus" else path


class _Text:
    """Documents that can be read again; what the last reading dropped is in `tally`."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __iter__(self) -> "Iterator[Document]":
        from fedgraft.text.cleaning import Cleaning, Tally, clean
        from fedgraft.text.sources import documents

        self.tally = Tally()
        as_it_is = Cleaning(near_duplicates=None, languages=None)
        yield from clean(documents(*self._paths), as_it_is, tally=self.tally)
