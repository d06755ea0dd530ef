"""News from publishers' own pages as documents, through fundus: by name and by date.

    publisher's feed or site map -> page -> title, date, text -> a line of a JSONL file

One file may be crawled into again and again: an article whose URL is in it is not fetched a second
time. A line is written whole or not at all; what a kill left of a last line is cut off.

Polite: at least a second between two pages of a publisher (more where a robots.txt asks for it), no
page that robots.txt keeps to itself, and a publisher whose robots.txt forbids training is refused.
fundus 0.5.7 itself overlooks the crawl delay and rules for `Fundus` by name (its parser knows no
delay, and it asks by its whole header), so both are read here.

A site map does not say when an article was published, so a page out of the range of dates is
fetched before it is known to be; it is counted and left out.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit
from urllib.robotparser import RobotFileParser

from fedgraft.errors import CorpusError
from fedgraft.provenance import told_if_unwritable
from fedgraft.text.sources import json_object

if TYPE_CHECKING:
    from fundus import Article
    from fundus.publishers.base_objects import Publisher

SECONDS_BETWEEN_PAGES = 1.0
NUM_NEAR = 3
BEGINNING = b'{"id": "http'
"""How each line begins: what a kill left of one is told from what somebody else wrote."""
AGENT = "Fundus"
"""What fundus calls itself to publishers, as a robots.txt would name it."""

FRACTION = re.compile(r"^(\s*crawl-delay\s*:\s*)(\d+)\.\d+", re.IGNORECASE | re.MULTILINE)
"""A delay that is no whole number; the parser of the standard library overlooks it."""


@dataclass(kw_only=True, slots=True)
class Crawled:
    """What became of the pages that were met."""

    num_known: int = 0
    """URLs that the file held already: not fetched."""
    num_written: int = 0
    num_out_of_range: int = 0
    """Articles from before or after the range of dates."""
    num_incomplete: int = 0
    """Pages without a title, a date or a text, or whose parser failed."""
    num_cut: int = 0
    """Bytes of an unfinished last line, left by a kill, that were cut off before the start."""
    troubles: list[str] = field(default_factory=list)
    """Pages and sources that could not be reached, in the words of fundus."""


def find_publishers(*names: str) -> list["Publisher"]:
    """Publishers by their name in fundus (`TheNewYorker`), or all of a country (`us`).

    Raises CorpusError for a name that fundus does not know, with those near it, and where fundus is
    not installed.
    """
    collection = _fundus().PublisherCollection
    groups = {name: list(group) for name, group in collection.get_subgroup_mapping().items()}
    single = {publisher.__name__: [publisher] for publisher in collection}
    known = groups | single
    lower = {name.lower(): name for name in known}
    found: dict[str, Publisher] = {}
    for name in names:
        if name.lower() not in lower:
            near = get_close_matches(name.lower(), lower, NUM_NEAR, cutoff=0.5)
            raise CorpusError(
                f"expected a publisher that fundus knows, or a country such as us, found {name!r}; "
                + (f"near are {', '.join(lower[n] for n in near)}" if near else "")
                + f"; it knows {len(single)} publishers of {', '.join(sorted(groups))}"
            )
        found |= {publisher.__name__: publisher for publisher in known[lower[name.lower()]]}
    return list(found.values())


def crawl(
    publishers: Sequence["Publisher"],
    out: Path,
    *,
    since: date,
    until: date,
    max_articles: int | None = None,
    seconds_between_pages: float = SECONDS_BETWEEN_PAGES,
    written: Callable[[int], None] | None = None,
) -> Crawled:
    """Add the publishers' articles from `since` to `until` (both included) to a JSONL file.

    Each line has id and url, title, date (ISO 8601), publisher and text. Run again after a stop, it
    goes on.

    Arguments:
        max_articles: stop after that many new ones.
        seconds_between_pages: the least, for each publisher; the longest that one of their
            robots.txt asks for counts.
        written: is called with 1 for each article that was written.

    Raises CorpusError for a range that ends before it starts, a file that is no .jsonl or holds
    something else (it stays as it is), and a publisher that forbids crawling or training;
    ArtefactError where `out` cannot be written.
    """
    fundus = _fundus()
    if until < since:
        raise CorpusError(
            f"expected a range of dates, found one from {since} to {until}; swap --from and --to"
        )
    if out.suffix.lower() != ".jsonl":
        raise CorpusError(
            f"expected a .jsonl file to add articles to, found {out}; choose another --out, such "
            f"as {out.with_name('news.jsonl')}"
        )
    if out.is_dir():
        raise CorpusError(
            f"{out}: expected a file to add articles to, found a directory; name one in it, such "
            f"as {out / 'news.jsonl'}"
        )
    result = Crawled()
    with told_if_unwritable(out, left="what was written before is whole"):
        out.parent.mkdir(parents=True, exist_ok=True)
        known, result.num_cut = _known(out)
        _mend(out, result.num_cut)
        _check_permission(publishers)
        delay = max(float(seconds_between_pages), *map(_delay_asked, publishers))
        crawler = fundus.Crawler(*publishers, delay=delay, threading=len(publishers) > 1)

        def is_skipped(url: str) -> bool:
            if _bare(url) in known:
                result.num_known += 1
                return True
            return any(_is_kept_from_us(url, publisher) for publisher in publishers)

        with out.open("ab", buffering=0) as file, _troubles_told(result.troubles):
            articles = crawler.crawl(
                only_complete=False,
                error_handling="catch",
                url_filter=is_skipped,
                skip_publishers_disallowing_training=True,
            )
            for article in articles:
                row = _row(article)
                if row is None:
                    result.num_incomplete += 1
                elif not since.isoformat() <= row["date"][:10] <= until.isoformat():
                    result.num_out_of_range += 1
                elif _bare(row["url"]) not in known:
                    known.add(_bare(row["url"]))
                    _append(file, json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    result.num_written += 1
                    if written:
                        written(1)
                if max_articles is not None and result.num_written >= max_articles:
                    articles.close()
                    break
    return result


def _fundus() -> Any:
    try:
        import fundus
    except ImportError as error:
        raise CorpusError(
            f"expected the library fundus, found: {error}; install it into an environment of its "
            "own: pip install 'fedgraft[news]'"
        ) from error
    return fundus


def _check_permission(publishers: Sequence["Publisher"]) -> None:
    """Raise CorpusError for a publisher whose robots.txt forbids reading or training."""
    for publisher in publishers:
        if publisher.robots.disallow_all():
            forbidden = "forbids reading any page"
        elif publisher.disallows_training:
            forbidden = "forbids training on its pages"
        else:
            continue
        raise CorpusError(
            f"expected publishers that allow it, found {publisher.__name__}, which {forbidden} "
            f"({publisher.domain}, robots.txt); leave it out, or ask the publisher"
        )


def _delay_asked(publisher: "Publisher") -> float:
    """The seconds between two pages that a publisher's robots.txt asks for, 0 where it does not."""
    from curl_cffi.requests.exceptions import RequestException
    from fundus.scraping.session import session_handler

    try:
        answer = session_handler.get_session().get_with_interrupt(
            publisher.robots.url, headers=publisher.request_header
        )
    except RequestException:  # no robots.txt; what else is wrong, the crawl itself will say
        return 0.0
    whole = FRACTION.sub(lambda found: f"{found[1]}{int(found[2]) + 1}", answer.text)
    robots = RobotFileParser()
    robots.parse(whole.splitlines())
    return float(robots.crawl_delay(AGENT) or 0)


def _is_kept_from_us(url: str, publisher: "Publisher") -> bool:
    """Whether a publisher's robots.txt forbids a page of its own to us by name."""
    own = urlsplit(publisher.domain).netloc == urlsplit(url).netloc
    return own and not publisher.robots.can_fetch(AGENT, url)


def _row(article: "Article") -> dict[str, str] | None:
    """An article as a line of the file; None where title, date or text is missing."""
    title, published = article.title, article.publishing_date
    text = article.plaintext if article.body else None
    if article.exception or not isinstance(title, str) or not text:
        return None
    if published is None or isinstance(published, Exception):
        return None
    url = article.html.responded_url
    return {
        "id": url,
        "title": title,
        "date": published.isoformat(),
        "url": url,
        "publisher": article.publisher,
        "text": text,
    }


def _bare(url: str) -> str:
    """A URL without its query and fragment: what fundus takes for the same article."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))


def _append(file: IO[bytes], line: bytes) -> None:
    """Write a line in one call; a full disk may take a part of it, which the next run cuts off."""
    while line:
        line = line[file.write(line) :]


def _known(out: Path) -> tuple[set[str], int]:
    """The URLs of the articles that a file holds, and the bytes of an unfinished last line.

    Raises CorpusError for a line that is no article, whole or unfinished; nothing is written.
    """
    known: set[str] = set()
    if not out.exists():
        return known, 0
    with out.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json_object(line, out, number)
            except CorpusError:
                if line.endswith(b"\n") or line[: len(BEGINNING)] != BEGINNING[: len(line)]:
                    raise
                return known, len(line)
            if not isinstance(row.get("url"), str):
                raise CorpusError(
                    f"{out}, line {number}: expected an article with its url, found the fields "
                    f"{', '.join(map(repr, row)) or 'none'}; choose another --out"
                )
            known.add(_bare(str(row["url"])))
    return known, 0


def _mend(out: Path, num_cut: int) -> None:
    """Cut so many bytes of an unfinished last line off, or give a whole one its end."""
    if not out.exists():
        return
    with out.open("r+b") as file:
        size = file.truncate(file.seek(0, os.SEEK_END) - num_cut)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")


@contextmanager
def _troubles_told(troubles: list[str]) -> Iterator[None]:
    """Collect what fundus logs of pages and sources that it could not read."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            troubles.append(record.getMessage())

    from fundus import logging as of_fundus

    collector = Collector(level=logging.WARNING)
    loggers = list(of_fundus.loggers.values())
    for logger in loggers:
        logger.addHandler(collector)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(collector)
