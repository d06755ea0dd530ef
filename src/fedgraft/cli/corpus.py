"""`corpus`, `crawl`: verbs that make text ready to be learned from."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgraft.cli.arguments import MODEL, Out, Overwrite
from fedgraft.cli.console import finish, say, show_table
from fedgraft.cli.places import resolve

if TYPE_CHECKING:
    from fedgraft.text.cleaning import Count

NUM_BROKEN_SHOWN = 10

SOURCE = (
    "Files (.jsonl, .parquet, .txt, .md, .html; also .gz, .bz2, .xz, .zst), folders, "
    "or dataset:org/name[:config][@revision][#split]."
)


def corpus(
    data: Annotated[list[str], typer.Argument(metavar="DATA...", help=SOURCE)],
    out: Out,
    model: Annotated[
        str | None,
        typer.Option("--model", parser=resolve, metavar="MODEL", help=f"Counts tokens. {MODEL}"),
    ] = None,
    min_tokens: Annotated[
        int | None, typer.Option("--min-tokens", min=1, help="Drop shorter texts (paper: 156).")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Drop longer texts (paper: 6981).")
    ] = None,
    near_duplicates: Annotated[
        float,
        typer.Option(
            "--near-duplicates",
            min=0,
            max=0.99,
            help="Similarity above which a text is dropped; 0: off.",
        ),
    ] = 0.8,
    language: Annotated[
        list[str] | None,
        typer.Option("--language", help="Keep this one (repeatable), or `all`.", show_default="en"),
    ] = None,
    validation: Annotated[
        float, typer.Option("--validation", help="Share of texts held out to choose with.")
    ] = 0.1,
    test: Annotated[
        float, typer.Option("--test", help="Share of texts held out to judge with.")
    ] = 0.1,
    max_broken: Annotated[
        int, typer.Option("--max-broken", min=0, help="Broken lines or files to pass over.")
    ] = 0,
    field: Annotated[str, typer.Option("--field", help="Where the text of a row stands.")] = "text",
    overwrite: Overwrite = False,
) -> None:
    """Read text from anywhere, clean it, split it; every document is accounted for.

    Writes train.jsonl, validation.jsonl and test.jsonl. A document's split depends on
    its text alone: it stays where it is when more text comes.
    """
    from fedgraft.errors import CorpusError
    from fedgraft.text.cleaning import Cleaning
    from fedgraft.text.corpus import BROKEN, write_corpus

    if min_tokens and max_tokens and min_tokens > max_tokens:
        raise CorpusError(
            f"expected --min-tokens up to --max-tokens, found {min_tokens} and {max_tokens}; "
            "swap them"
        )
    languages = tuple(language or ("en",))
    written = write_corpus(
        data,
        out,
        Cleaning(
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            near_duplicates=near_duplicates or None,
            languages=None if "all" in languages else languages,
        ),
        count=_counter(model) if model else None,
        validation=validation,
        test=test,
        field=field,
        max_broken=max_broken,
        overwrite=overwrite,
    )
    tally = written.tally
    dropped = [(f"  {reason}", f"{number:,}") for reason, number in tally.dropped.items()]
    splits = [(f"  {part}", f"{number:,}") for part, number in written.num_documents.items()]
    show_table(
        ("", "documents"),
        [
            ("read", f"{tally.num_read:,}"),
            ("dropped", f"{sum(tally.dropped.values()):,}"),
            *dropped,
            ("kept", f"{tally.num_kept:,}"),
            *splits,
        ],
    )
    if written.broken:
        shown = written.broken[:NUM_BROKEN_SHOWN]
        say("broken", f"{len(written.broken):,} lines or files passed over")
        for fault in shown:
            say("", fault)
        if len(written.broken) > len(shown):
            say("", f"and {len(written.broken) - len(shown):,} more, all in {out / BROKEN}")
    tokens = [f"{part} {number:,}" for part, number in written.num_tokens.items()]
    finish(
        "corpus",
        out,
        facts=[
            f"{tally.num_changed:,} texts were normalised",
            *([f"tokens: {', '.join(tokens)}"] if tokens else []),
        ],
        steps=[
            f"fedgraft pretrain {model or 'MODEL'} --data {out / 'train.jsonl'} --tokens 10M "
            "--out runs/newer-base"
        ],
    )


def crawl(
    publishers: Annotated[
        list[str],
        typer.Argument(
            metavar="PUBLISHER...", help="Names in fundus, e.g. TheNewYorker, or a country: us."
        ),
    ],
    since: Annotated[datetime, typer.Option("--from", formats=["%Y-%m-%d"], help="The first day.")],
    until: Annotated[datetime, typer.Option("--to", formats=["%Y-%m-%d"], help="The last day.")],
    out: Annotated[Path, typer.Option("--out", help="A .jsonl file; what it holds is kept.")],
    max_articles: Annotated[
        int | None, typer.Option("--max-articles", min=1, help="Stop after that many new ones.")
    ] = None,
) -> None:
    """Fetch news by publisher and date, a line an article: title, date, url, publisher, text.

    Run it again to go on, or to add more: what the file holds is not fetched again.
    One page a second from each publisher, as its robots.txt allows.
    """
    from fedgraft.progress import progress
    from fedgraft.text.crawl import crawl, find_publishers

    chosen = find_publishers(*publishers)
    with progress("crawl", max_articles, "articles") as advance:
        done = crawl(
            chosen,
            out,
            since=since.date(),
            until=until.date(),
            max_articles=max_articles,
            written=advance,
        )
    if done.num_cut:
        say("mended", f"an unfinished last line of {done.num_cut:,} bytes was cut off {out}")
    if done.troubles:
        say("troubles", f"{len(done.troubles):,} pages or sources could not be read")
        for trouble in done.troubles[:NUM_BROKEN_SHOWN]:
            say("", trouble)
    finish(
        "news",
        out,
        facts=[
            f"{done.num_written:,} new articles; {done.num_known:,} known already, "
            f"{done.num_out_of_range:,} of other days, {done.num_incomplete:,} without title, date "
            "or text"
        ],
        steps=[f"fedgraft corpus {out} --out runs/text"],
    )


def _counter(model: str) -> "Count":
    """How many tokens texts have for a model; its special tokens do not count."""
    from fedgraft.models import open_tokenizer
    from fedgraft.weights.checkpoint import resolve as fetch

    tokenizer = open_tokenizer(fetch(model))

    def count(texts: list[str]) -> list[int]:
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [len(row) for row in ids]

    return count
