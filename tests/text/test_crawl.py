"""Laws of the crawl, on pages that a server on loopback gives, through the real fundus."""

import json
import resource
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

fundus = pytest.importorskip(
    "fundus", reason="no fundus: pip install 'fedgraft[news]'", exc_type=ImportError
)

from fedgraft.errors import ArtefactError, CorpusError  # noqa: E402
from fedgraft.text.crawl import crawl, find_publishers  # noqa: E402

JANUARY: dict[str, Any] = {"since": date(2026, 1, 1), "until": date(2026, 1, 31)}
DAYS = {
    "harbour": "2026-01-05",
    "bridge": "2026-01-20",
    "market": "2026-01-31",
    "old": "2025-12-31",
}


def page(name: str, day: str | None) -> str:
    dated = (
        f'<meta property="article:published_time" content="{day}T10:00:00+00:00">' if day else ""
    )
    return (
        f'<html><head><meta property="og:title" content="News of the {name}">{dated}</head><body>'
        f"<nav>Menu</nav><article><p>The {name} was opened again this week.</p>"
        f"<p>Nobody had expected the {name} to be ready.</p></article></body></html>"
    )


@dataclass
class Site:
    """A publisher on loopback: its pages, and which were asked for when."""

    url: str = ""
    robots: str = "User-agent: *\nDisallow: /private/\n"
    pages: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, float]] = field(default_factory=list)

    def asked_for(self, start: str = "/news/") -> list[str]:
        return [path for path, _ in self.asked if path.startswith(start)]

    def content(self, path: str) -> str | None:
        if path == "/robots.txt":
            return self.robots
        if path == "/feed.xml":
            links = "".join(f"<item><link>{self.url}{name}</link></item>" for name in self.pages)
            return f'<?xml version="1.0"?><rss version="2.0"><channel>{links}</channel></rss>'
        return self.pages.get(path) or None


@pytest.fixture
def site() -> Iterator[Site]:
    served = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append((self.path, time.monotonic()))
            content = served.content(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write((content or "nothing here").encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    served.pages = {f"/news/{name}.html": page(name, day) for name, day in DAYS.items()}
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def publisher(site: Site, name: str = "The Loopback Herald") -> Any:
    from fundus.parser import BaseParser, ParserProxy, attribute
    from fundus.parser.utility import extract_article_body_with_selector, generic_date_parsing
    from fundus.publishers.base_objects import Publisher, PublisherGroup
    from lxml.cssselect import CSSSelector  # type: ignore[import-untyped]

    class Parser(ParserProxy):  # type: ignore[misc]
        class V1(BaseParser):  # type: ignore[misc]
            @attribute  # type: ignore[untyped-decorator]
            def body(self) -> Any:
                return extract_article_body_with_selector(
                    self.precomputed.doc, paragraph_selector=CSSSelector("article > p")
                )

            @attribute  # type: ignore[untyped-decorator]
            def title(self) -> Any:
                return self.precomputed.meta.get("og:title")

            @attribute  # type: ignore[untyped-decorator]
            def publishing_date(self) -> Any:
                return generic_date_parsing(self.precomputed.meta.get("article:published_time"))

    class Local(metaclass=PublisherGroup):  # type: ignore[metaclass]
        default_language = "en"
        LoopbackHerald = Publisher(
            name=name,
            domain=site.url,
            parser=Parser,
            sources=[fundus.RSSFeed(f"{site.url}/feed.xml")],
        )

    return Local.LoopbackHerald


def fetch(site: Site, out: Path, **settings: Any) -> Any:
    settings = {**JANUARY, "seconds_between_pages": 0.0, **settings}
    return crawl([publisher(site)], out, **settings)


def lines(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_an_article_has_its_title_date_url_publisher_and_main_text(
    site: Site, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "news.jsonl"
    done = fetch(site, out)
    url = f"{site.url}/news/harbour.html"
    assert lines(out)[0] == {
        "id": url,
        "title": "News of the harbour",
        "date": "2026-01-05T10:00:00+00:00",
        "url": url,
        "publisher": "The Loopback Herald",
        "text": "The harbour was opened again this week.\n\n"
        "Nobody had expected the harbour to be ready.",
    }
    assert done.num_written == 3


def test_both_ends_of_the_range_of_dates_belong_to_it(site: Site, tmp_path: Path) -> None:
    done = fetch(site, tmp_path / "a.jsonl", since=date(2026, 1, 20), until=date(2026, 1, 31))
    assert {row["date"][:10] for row in lines(tmp_path / "a.jsonl")} == {"2026-01-20", "2026-01-31"}
    assert done.num_out_of_range == 2


def test_a_second_crawl_fetches_and_writes_only_what_is_new(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    assert fetch(site, out, max_articles=2).num_written == 2
    before, first = out.read_bytes(), [row["url"].removeprefix(site.url) for row in lines(out)]
    site.asked.clear()
    done = fetch(site, out)
    assert done.num_written == 1
    assert done.num_known == 2
    assert not set(first) & set(site.asked_for())
    assert out.read_bytes().startswith(before)
    assert len({row["url"] for row in lines(out)}) == 3


def test_stopped_and_resumed_equals_never_stopped(site: Site, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    fetch(site, whole)
    for _ in range(3):
        fetch(site, parts, max_articles=1)
    assert parts.read_bytes() == whole.read_bytes()


def test_a_last_line_that_a_kill_cut_is_removed_and_fetched_again(
    site: Site, tmp_path: Path
) -> None:
    out = tmp_path / "a.jsonl"
    fetch(site, out)
    whole = out.read_bytes()
    out.write_bytes(whole[:-40])
    done = fetch(site, out)
    assert done.num_cut == len(whole.splitlines()[-1]) + 1 - 40
    assert out.read_bytes() == whole


def test_a_whole_last_line_without_its_end_is_kept(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    fetch(site, out)
    whole = out.read_bytes()
    out.write_bytes(whole[:-1])
    assert fetch(site, out).num_written == 0
    assert out.read_bytes() == whole


def test_pages_that_robots_keeps_to_itself_are_not_asked_for(site: Site, tmp_path: Path) -> None:
    site.pages["/private/secret.html"] = page("vault", "2026-01-10")
    fetch(site, tmp_path / "a.jsonl")
    assert site.asked_for("/private/") == []
    assert len(site.asked_for()) == 4


def test_pages_that_robots_keeps_from_us_by_name_are_not_asked_for(
    site: Site, tmp_path: Path
) -> None:
    site.robots = "User-agent: *\nAllow: /\n\nUser-agent: Fundus\nDisallow: /news/bridge.html\n"
    fetch(site, tmp_path / "a.jsonl")
    assert len(site.asked_for()) == 3
    assert "/news/bridge.html" not in site.asked_for()


@pytest.mark.parametrize("asked", ["1", "0.3"])
def test_the_delay_that_robots_asks_for_is_kept(site: Site, tmp_path: Path, asked: str) -> None:
    site.robots = f"User-agent: *\nCrawl-delay: {asked}\n"
    fetch(site, tmp_path / "a.jsonl", max_articles=2)
    times = [moment for path, moment in site.asked if path.startswith("/news/")]
    assert min(b - a for a, b in pairwise(times)) > 0.9


def test_our_own_delay_is_kept_where_robots_says_nothing(site: Site, tmp_path: Path) -> None:
    fetch(site, tmp_path / "a.jsonl", seconds_between_pages=0.3)
    times = [moment for path, moment in site.asked if path.startswith("/news/")]
    assert min(b - a for a, b in pairwise(times)) > 0.25


@pytest.mark.parametrize(
    ("robots", "why"),
    [
        ("User-agent: *\nDisallow: /\n", None),
        ("# no machine learning or model training\nUser-agent: *\n", "forbids training"),
    ],
)
def test_a_publisher_that_does_not_want_it_is_left_alone(
    site: Site, tmp_path: Path, robots: str, why: str | None
) -> None:
    site.robots = robots
    if why:
        with pytest.raises(CorpusError, match=rf"LoopbackHerald, which {why}"):
            fetch(site, tmp_path / "a.jsonl")
    else:
        assert fetch(site, tmp_path / "a.jsonl").num_written == 0
    assert site.asked_for() == []


def test_pages_without_a_date_and_pages_that_are_missing_are_counted(
    site: Site, tmp_path: Path
) -> None:
    site.pages["/news/undated.html"] = page("fair", None)
    site.pages["/news/gone.html"] = ""
    done = fetch(site, tmp_path / "a.jsonl")
    assert (done.num_written, done.num_incomplete) == (3, 1)
    assert len(done.troubles) == 1
    assert "/news/gone.html" in done.troubles[0]


def test_two_publishers_are_crawled_side_by_side(site: Site, tmp_path: Path) -> None:
    two = [publisher(site), publisher(site, "The Second Herald")]
    done = crawl(two, tmp_path / "a.jsonl", **JANUARY, seconds_between_pages=0.0)
    assert done.num_written == 3
    assert len({row["url"] for row in lines(tmp_path / "a.jsonl")}) == 3


def test_an_unknown_publisher_is_refused_with_those_near_it() -> None:
    with pytest.raises(CorpusError, match=r"found 'TheNewYorke'; near are TheNewYorker"):
        find_publishers("TheNewYorke")


def test_a_publisher_is_found_by_name_and_a_country_by_its_letters() -> None:
    assert [p.__name__ for p in find_publishers("thenewyorker")] == ["TheNewYorker"]
    assert set(find_publishers("us")) > set(find_publishers("TheNewYorker"))


def test_a_range_that_ends_before_it_starts_is_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="swap --from and --to"):
        fetch(site, tmp_path / "a.jsonl", since=date(2026, 2, 1))


def test_a_file_of_something_else_is_not_written_into(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text('{"text": "mine"}\n')
    with pytest.raises(CorpusError, match=r"line 1: expected an article with its url"):
        fetch(site, out)
    assert out.read_text() == '{"text": "mine"}\n'


OURS = '{"id": "http://a/1", "url": "http://a/1", "text": "one"}\n'


def test_a_folder_in_the_place_of_the_file_is_told(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(CorpusError, match=r"a\.jsonl: expected a file to add .* found a directory"):
        fetch(site, tmp_path / "a.jsonl")
    assert site.asked == []


@pytest.mark.parametrize("name", ["notes.csv", "old.jsonl.gz", "news"])
def test_a_file_of_another_kind_is_refused_before_it_is_touched(
    site: Site, tmp_path: Path, name: str
) -> None:
    out = tmp_path / name
    out.write_text(OURS + "a last record")
    with pytest.raises(CorpusError, match=rf"expected a \.jsonl file to add .*{name}; .*--out"):
        fetch(site, out)
    assert out.read_text() == OURS + "a last record"
    assert site.asked == []


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"text": "mine"}\n{"text": "and this', 1),
        ('{"text": "all on one line', 1),
        (OURS + "a last record", 2),
        (OURS + '{"text": "whole"}', 2),
    ],
)
def test_a_last_line_of_something_else_is_refused_not_cut_off(
    site: Site, tmp_path: Path, content: str, line: int
) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text(content)
    with pytest.raises(CorpusError, match=rf"a\.jsonl, line {line}: expected "):
        fetch(site, out)
    assert out.read_text() == content


def test_a_kill_within_the_first_line_leaves_nothing_to_keep(site: Site, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    fetch(site, whole)
    for left in (1, 40):
        out.write_bytes(whole.read_bytes()[:left])
        assert fetch(site, out).num_cut == left
        assert out.read_bytes() == whole.read_bytes()


@pytest.fixture
def full_disk() -> Iterator[int]:
    """No file of this process may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    yield 500
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_told_and_the_next_run_mends_the_line(
    site: Site, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    fetch(site, whole)
    request.getfixturevalue("full_disk")
    with pytest.raises(ArtefactError, match=r"what was written before is whole"):
        fetch(site, out)
    assert out.stat().st_size == 500
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert fetch(site, out).num_cut > 0
    assert out.read_bytes() == whole.read_bytes()
