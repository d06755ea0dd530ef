"""`quickstart`, `study run`, `report`: a question, answered by arms and shown on a page."""

from pathlib import Path
from typing import Annotated

import typer

from fedgraft.cli.arguments import Out
from fedgraft.cli.console import finish
from fedgraft.cli.places import places_of


def quickstart(out: Out = Path("runs/quickstart")) -> None:
    """The whole story on embedded models, in minutes on two CPU cores.

    Two small real models ship with fedgraft, and a fictional company with text of
    two years. The base and the instruct model continue to pre-train on year 2; the
    residual is grafted on; every arm answers the same held-out questions; the report
    says in words what came out.
    """
    from fedgraft.pocket.weights import folder

    _run(folder.with_name("quickstart.yaml"), out)


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A study file (YAML).")],
    out: Out,
) -> None:
    """Run a study; stages that are finished are not run again.

    Paths in the file may start with pocket: (the embedded checkpoints), company:
    (the fictional company, written to OUT/company) or data: (the folder that
    FEDGRAFT_DATA names).
    """
    _run(file, out)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of a study.")],
) -> None:
    """Write the report of a study: one HTML file, no links.

    The same result gives the same page.
    """
    from fedgraft.report.page import write_report

    finish("report", write_report(folder), steps=["open it in a browser; it needs no network"])


def _run(file: Path, out: Path) -> None:
    from fedgraft.report.page import write_report
    from fedgraft.study import arms, forgetting
    from fedgraft.study.study import Study

    study = Study.load(file, places_of(file, out))
    run_study = forgetting.run if study.curve else arms.run
    result = run_study(study, out, say=lambda line: typer.echo(line, err=True))
    page = write_report(out)
    typer.echo(f"\n{result.verdict}\n")
    model = out / f"seed-{study.seeds[0]}" / "graft" / "model"
    chat = [] if study.curve else [f"fedgraft chat {model}"]
    finish("report", page, steps=["open it in a browser", *chat])
