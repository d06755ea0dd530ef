"""`evaluate`, `chat`: verbs that ask a model."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedgraft.cli.arguments import Adapter, Model
from fedgraft.cli.console import finish, say, show_table
from fedgraft.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedgraft.evaluation.harness import BenchmarkSettings
    from fedgraft.evaluation.scorecard import Scorecard
    from fedgraft.text.corpus import Document


def evaluate(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="[DEPARTMENT=]PATH",
            help="Held-out text for perplexity, by department; repeat for more.",
        ),
    ] = None,
    dialogues: Annotated[
        Path | None,
        typer.Option("--dialogues", help="JSONL of prompts with constraints, checked by program."),
    ] = None,
    questions: Annotated[
        Path | None, typer.Option("--questions", help="JSONL of knowledge questions.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer to a dialogue, in tokens.")
    ] = 64,
    suite: Annotated[
        Literal["paper"] | None,
        typer.Option("--suite", help="paper: its nine benchmarks, by lm-evaluation-harness."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="This one of the suite; repeat for more."),
    ] = None,
    benchmark_data: Annotated[
        Path | None,
        typer.Option(help="A folder with the benchmarks' files; else they come from the hub."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=2, help="First questions of each benchmark, and of each subject."),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask through the model's chat template.")
    ] = False,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="If the context is too short: fewer shots, shorter answers."),
    ] = False,
    precision: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="Of the weights while benchmarks are asked."),
    ] = "float32",
    backend: Annotated[
        Literal["transformers", "vllm"], typer.Option(help="What answers the benchmarks.")
    ] = "transformers",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Questions at once; else it is found.")
    ] = None,
    kept: Annotated[Path, typer.Option(help="Finished benchmarks; they are not run again.")] = Path(
        "runs/benchmarks"
    ),
    adapter: Adapter = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A JSON file for the scorecard.")
    ] = None,
) -> None:
    """Score a model on held-out text, instructions, facts and benchmarks.

    Instructions are checked by program, strict and loose as in IFEval. A score
    that cannot be computed is shown as missing, never as zero.
    """
    from fedgraft.evaluation.harness import BenchmarkSettings
    from fedgraft.evaluation.knowledge import load_questions
    from fedgraft.evaluation.scorecard import evaluate as score
    from fedgraft.evaluation.scorecard import together
    from fedgraft.models import open_tokenizer
    from fedgraft.provenance import told_if_unwritable
    from fedgraft.text.dialogues import load_dialogues
    from fedgraft.weights.checkpoint import resolve

    of_benchmarks = {
        "--benchmark-data": benchmark_data,
        "--limit": limit,
        "--chat-template": chat_template,
        "--fit": fit,
        "--precision": precision != "float32",
        "--backend": backend != "transformers",
        "--batch-size": batch_size,
    }
    told = [option for option, value in of_benchmarks.items() if value]
    if told and not (suite or task):
        raise typer.BadParameter(
            f"{told[0]} is for benchmarks, found none; name --suite paper or --task NAME too"
        )
    if not (suite or task or data or dialogues or questions):
        raise EvaluationError(
            "expected something to score the model on, found nothing; name at least one of --data, "
            "--dialogues, --questions, --suite"
        )
    if out:
        _check_file(out)
    documents = _by_department(data or [])
    asked = load_dialogues(dialogues) if dialogues else ()
    facts = load_questions(questions) if questions else ()
    path = resolve(model)
    cards = []
    if suite or task:
        settings = BenchmarkSettings(
            data=benchmark_data,
            limit=limit,
            chat_template=chat_template,
            fit=fit,
            precision=precision,
            backend=backend,
            batch_size=batch_size,
        )
        cards.append(_benchmarks(path, adapter, model, task or [], settings, kept))
    if documents or asked or facts:
        card = score(
            _open(path, adapter),
            open_tokenizer(path),
            arm=model,
            documents=documents,
            dialogues=asked,
            questions=facts,
            max_new_tokens=max_new_tokens,
        )
        cards.append(card)
    scorecard = together(*cards)
    rows = (
        (name, f"{score.value:.4g} ± {score.stderr:.2g}", score.unit, f"{score.num:,}")
        for name, score in scorecard.scores.items()
        if not (name.startswith("benchmark/") and name.count("/") > 2)  # one subject of many
    )
    show_table(("score", "value ± std. error", "unit", "over"), rows)
    for name, how in scorecard.benchmarks.items():
        if how.shortcomings:
            say("", f"{name}: {how.shortcomings}")
    if out:
        with told_if_unwritable(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(scorecard.model_dump_json(indent=2) + "\n", encoding="utf-8")
        finish("scorecard", out)


def _check_file(out: Path) -> None:
    """Ask before long work whether a file may be written there."""
    from fedgraft.provenance import check_directory

    if out.is_dir():
        raise EvaluationError(
            f"{out}: expected a file for the scorecard, found a directory; name one in it, such as "
            f"{out / 'scorecard.json'}"
        )
    check_directory(out.parent)


def _benchmarks(
    path: Path,
    adapter: Path | None,
    arm: str,
    tasks: list[str],
    settings: "BenchmarkSettings",
    kept: Path,
) -> "Scorecard":
    from fedgraft.evaluation.benchmarks import chosen
    from fedgraft.evaluation.harness import run_benchmarks
    from fedgraft.weights.adapted import Adapted
    from fedgraft.weights.checkpoint import Checkpoint

    if adapter and settings.backend == "vllm":
        raise EvaluationError(
            "expected a checkpoint alone for --backend vllm, found --adapter too; leave out one of "
            "them"
        )
    return run_benchmarks(
        Adapted(path, adapter) if adapter else Checkpoint.open(path),
        arm=arm,
        benchmarks=chosen(tasks),
        settings=settings,
        kept=kept,
        open_network=lambda precision: _open(path, adapter, precision),
        say=lambda text: say("", text),
    )


def _by_department(data: list[str]) -> "dict[str, tuple[Document, ...]]":
    """`hr=a.jsonl`, `hr=b/` -> the documents of hr; a path without a name counts as `text`."""
    from fedgraft.text.corpus import Corpus

    paths: dict[str, list[str]] = {}
    for entry in data:
        department, named, path = entry.partition("=")
        paths.setdefault(department if named else "text", []).append(path if named else entry)
    return {name: Corpus.load(*where).documents for name, where in paths.items()}


def chat(
    model: Model,
    adapter: Adapter = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    prompt: Annotated[
        Literal["chat", "alpaca"],
        typer.Option("--prompt", help="Form of dialogues: the model's template, or Alpaca's."),
    ] = "chat",
) -> None:
    """Talk to a model in the terminal.

    /new starts afresh, Ctrl-D ends. Where input is a pipe, each line is a question.
    """
    from fedgraft.evaluation.answers import answer
    from fedgraft.models import open_tokenizer
    from fedgraft.text.dialogues import Message, prompt_ids, with_template
    from fedgraft.weights.checkpoint import resolve

    path = resolve(model)
    tokenizer = with_template(open_tokenizer(path), prompt)
    network = _open(path, adapter)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrow keys and history in input()
        typer.secho(f"{model}: ask something; /new starts afresh, Ctrl-D ends", dim=True)
    turns: list[Message] = []
    while True:
        try:
            asked = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if asked == "/new":
            turns = []
        elif asked:
            turns.append(Message(role="user", content=asked))
            ids = prompt_ids(tokenizer, turns)
            said = answer(network, tokenizer, [ids], max_new_tokens=max_new_tokens)[0]
            turns.append(Message(role="assistant", content=said))
            typer.echo(said)


def _open(
    model: Path,
    adapter: Path | None,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> "PreTrainedModel":
    import torch

    dtype: torch.dtype = getattr(torch, precision)
    if adapter is None:
        from fedgraft.models import open_model

        return open_model(model, dtype=dtype)
    from fedgraft.training.adapter import open_adapted

    return open_adapted(model, adapter).to(dtype)
