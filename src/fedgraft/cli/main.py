"""`fedgraft`: the verbs, and the one place where an error becomes a message and an exit code.

Nothing heavy is imported here; each verb imports what it needs when it runs.
"""

import os
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fedgraft.cli import (
    compression,
    corpus,
    evaluation,
    federate,
    graft,
    selection,
    studies,
    training,
    weights,
)
from fedgraft.errors import FedgraftError

ORDER = (
    *("quickstart", "family", "residual", "graft", "crawl", "corpus", "pretrain", "adapt"),
    *("select", "federate", "evaluate", "study", "report", "chat"),
)
"""The verbs as a newcomer meets them."""

INTERRUPTED = 130
"""The exit code of a process that Ctrl-C ended: 128 + SIGINT."""


class Verbs(TyperGroup):
    """The group of all verbs: known errors end in one message, Ctrl-C in a word on how to go on."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]  # noqa: ARG002
        return list(ORDER)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except FedgraftError as error:
            typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
            typer.echo(error, err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo(
                "\nstopped. What was finished is kept, nothing is half-written; "
                "run the same command again to go on.",
                err=True,
            )
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
family = typer.Typer(no_args_is_help=True, help="check: prove that two checkpoints are one family.")
residual = typer.Typer(
    no_args_is_help=True, help="extract, verify, compress, inspect: what instruct - base is."
)
study = typer.Typer(
    no_args_is_help=True,
    help="plan, run, tables: answer a question with arms, seeds and a report.",
)


def _show_version(asked: bool) -> None:
    if asked:
        from fedgraft.provenance import version

        typer.echo(f"fedgraft {version()}")
        raise typer.Exit


@app.callback(
    epilog="Start with  [bold cyan]fedgraft quickstart[/]  - no download, no data, no GPU needed."
)
def prepare(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Keep pre-training a base, graft its instructions back on, prove it.

    residual = instruct - base
    grafted  = further_pretrained(base) + scale * residual
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # tensors are worked on side by side; threads of numpy's own would only wait for each other
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def example(command: str) -> str:
    """The last line of a verb's help: a command to copy."""
    return f"Example:  [bold cyan]{command}[/]"


federation = typer.Typer(
    cls=federate.Federate,
    no_args_is_help=True,
    help="PLAN --out DIR: departments train adapters together, their text stays with them.",
    epilog=example("fedgraft federate handbooks.yaml --out runs/together"),
)

app.command(epilog=example("fedgraft quickstart --out runs/quickstart"))(studies.quickstart)
app.add_typer(family, name="family")
app.add_typer(residual, name="residual")
app.command(
    epilog=example("fedgraft graft runs/newer-base runs/residual --out runs/grafted --scale 1.0")
)(graft.graft)
app.command(
    epilog=example(
        "fedgraft crawl TheNewYorker --from 2026-01-01 --to 2026-01-31 --out runs/news.jsonl"
    )
)(corpus.crawl)
app.command(epilog=example("fedgraft corpus handbook/ news.jsonl.gz --out runs/text"))(
    corpus.corpus
)
app.command(
    epilog=example(
        "fedgraft pretrain Qwen/Qwen2-0.5B --data handbook/ --tokens 10M --out runs/newer-base"
    )
)(training.pretrain)
app.command(
    epilog=example(
        "fedgraft adapt runs/grafted --department hr --data hr.jsonl --out runs/adapter-hr"
    )
)(training.adapt)
app.command(
    epilog=example(
        "fedgraft select dialogues.jsonl --model runs/grafted --budget 0.01 --out runs/coreset"
    )
)(selection.select)
app.add_typer(federation, name="federate")
app.command(
    epilog=example("fedgraft evaluate runs/grafted --data hr=hr.jsonl --dialogues asked.jsonl")
)(evaluation.evaluate)
app.add_typer(study, name="study")
app.command(epilog=example("fedgraft report runs/quickstart"))(studies.report)
app.command(epilog=example("fedgraft chat pocket:instruct"))(evaluation.chat)

family.command(epilog=example("fedgraft family check Qwen/Qwen2-0.5B Qwen/Qwen2-0.5B-Instruct"))(
    weights.check
)
residual.command(
    epilog=example("fedgraft residual extract pocket:base pocket:instruct --out runs/residual")
)(weights.extract)
residual.command(
    epilog=example("fedgraft residual verify runs/residual pocket:base pocket:instruct")
)(weights.verify)
residual.command(
    epilog=example(
        "fedgraft residual inspect runs/residual pocket:base --newer-base runs/newer-base "
        "--out runs/inspection"
    )
)(weights.inspect)
residual.command(
    epilog=example("fedgraft residual compress runs/residual --form packed --out runs/small")
)(compression.compress)
federation.command(epilog=example("fedgraft federate run handbooks.yaml --out runs/together"))(
    federate.run
)
federation.command(
    epilog=example("fedgraft federate serve hr-1.yaml --socket /run/fedgraft/hr-1.sock")
)(federate.serve)
study.command(
    epilog=example("fedgraft study plan studies/llama3_8b.yaml --hardware h100 --processes 8")
)(studies.plan)
study.command(epilog=example("fedgraft study run studies/pocket.yaml --out runs/pocket"))(
    studies.run
)
study.command(
    epilog=example(
        "fedgraft study tables --column L3b+100M+3Lr=runs/grafted.json --out runs/tables"
    )
)(studies.tables)


def main() -> None:
    """The console script."""
    app(prog_name="fedgraft")


if __name__ == "__main__":
    main()
