"""`evaluate`, `chat`: verbs that ask a model."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgraft.cli.arguments import Adapter, Model
from fedgraft.cli.console import finish, show_table
from fedgraft.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    adapter: Adapter = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A JSON file for the scorecard.")
    ] = None,
) -> None:
    """Score a model on held-out text, instructions and facts.

    Instructions are checked by program, strict and loose as in IFEval. A score
    that cannot be computed is shown as missing, never as zero.
    """
    from fedgraft.evaluation.knowledge import load_questions
    from fedgraft.evaluation.scorecard import evaluate as score
    from fedgraft.models import open_tokenizer
    from fedgraft.text.dialogues import load_dialogues
    from fedgraft.weights.checkpoint import resolve

    if not (data or dialogues or questions):
        raise EvaluationError(
            "expected something to score the model on, found nothing; name at least one of --data, "
            "--dialogues, --questions"
        )
    path = resolve(model)
    scorecard = score(
        _open(path, adapter),
        open_tokenizer(path),
        arm=model,
        documents=_by_department(data or []),
        dialogues=load_dialogues(dialogues) if dialogues else (),
        questions=load_questions(questions) if questions else (),
    )
    rows = (
        (name, f"{score.value:.4g} ± {score.stderr:.2g}", score.unit, f"{score.num:,}")
        for name, score in scorecard.scores.items()
    )
    show_table(("score", "value ± standard error", "unit", "over"), rows)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(scorecard.model_dump_json(indent=2) + "\n", encoding="utf-8")
        finish("scorecard", out)


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
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
) -> None:
    """Talk to a model in the terminal.

    /new starts afresh, Ctrl-D ends. Where input is a pipe, each line is a question.
    """
    from fedgraft.evaluation.answers import answer
    from fedgraft.models import open_tokenizer
    from fedgraft.text.dialogues import Message, prompt_ids
    from fedgraft.weights.checkpoint import resolve

    path = resolve(model)
    network, tokenizer = _open(path, adapter), open_tokenizer(path)
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
            prompt = prompt_ids(tokenizer, turns)
            said = answer(network, tokenizer, [prompt], max_new_tokens=max_new_tokens)[0]
            turns.append(Message(role="assistant", content=said))
            typer.echo(said)


def _open(model: Path, adapter: Path | None) -> "PreTrainedModel":
    if adapter is None:
        from fedgraft.models import open_model

        return open_model(model)
    from fedgraft.training.adapter import open_adapted

    return open_adapted(model, adapter)
