"""Packing news: row space used, tokens a second beside the tokenizer's own, memory as text grows.

    .venv/bin/python benchmarks/packing.py                              # a minute
    .venv/bin/python benchmarks/packing.py --memory 10 100 1000         # megabytes of text; minutes

Every run is its own process. The news are repeated with changed words where more text is asked for.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedgraft.text.corpus import Document

NEWS = Path(os.environ.get("FEDGRAFT_DATA", "../shared/data")) / "news"
ROW_LENGTH = 4096
ROUNDS = 3
CHANGED = ("the", "and", "of", "to", "in", "for", "that", "with")
WAYS = (
    "the tokenizer alone",
    "fedgraft, packed to disk",
    "fedgraft, packed in memory",
    "concatenated and cut, 1,000 documents at a time",
)


def grown(num_bytes: int) -> "Iterator[Document]":
    """News again and again, the commonest words spelled otherwise in every round."""
    from fedgraft.text.corpus import Corpus, Document

    news = Corpus.load(NEWS).documents
    left = num_bytes
    for repeat in count():
        for document in news:
            text = document.text
            for word in CHANGED if repeat else ():
                text = text.replace(f" {word} ", f" {word[::-1]}{repeat} ")
            yield Document(id=f"{repeat}-{document.id}", text=text, source="news")
            left -= len(text.encode())
            if left <= 0:
                return


def measure(way: str) -> dict[str, Any]:
    """One run in this process: tokens a second, and the share of row space used."""
    from fedgraft.models import open_tokenizer
    from fedgraft.pocket.weights import folder
    from fedgraft.text.cache import pack_to_disk
    from fedgraft.text.corpus import Corpus
    from fedgraft.text.packing import pack

    tokenizer = open_tokenizer(folder / "base")
    documents = Corpus.load(NEWS).documents
    started = time.monotonic()
    if way == WAYS[0]:
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(
            [document.text for document in documents], add_special_tokens=False
        )
        seconds = time.monotonic() - started
        return {"tokens_per_second": sum(map(len, encoded)) / seconds}
    if way == WAYS[3]:
        num_tokens = num_cut = 0
        texts = iter(document.text for document in documents)
        while batch := list(islice(texts, 1000)):
            ids = tokenizer([text + tokenizer.eos_token for text in batch])["input_ids"]
            flat = list(chain.from_iterable(ids))
            rows = [
                flat[start : start + ROW_LENGTH]
                for start in range(0, len(flat) - ROW_LENGTH + 1, ROW_LENGTH)
            ]
            num_tokens += len(flat)
            num_cut += len(flat) - len(rows) * ROW_LENGTH
        seconds = time.monotonic() - started
        return {"tokens_per_second": num_tokens / seconds, "lost": num_cut / num_tokens}
    with tempfile.TemporaryDirectory() as place:
        if way == WAYS[1]:
            packed = pack_to_disk(tokenizer, documents, Path(place, "rows"), ROW_LENGTH)
        else:
            packed = pack(tokenizer, documents, ROW_LENGTH)
        seconds = time.monotonic() - started
        figures = {"tokens_per_second": packed.num_tokens / seconds, "fill": packed.fill}
        started = time.monotonic()
        for row in range(len(packed)):
            packed[row]
        figures["built_per_second"] = packed.num_tokens / (time.monotonic() - started)
        return figures


def memory(num_megabytes: int) -> dict[str, Any]:
    """Pack that much text to disk, and the peak of this process."""
    from fedgraft.models import open_tokenizer
    from fedgraft.pocket.weights import folder
    from fedgraft.text.cache import pack_to_disk

    tokenizer = open_tokenizer(folder / "base")
    before = peak_megabytes()
    with tempfile.TemporaryDirectory() as place:
        started = time.monotonic()
        rows = pack_to_disk(
            tokenizer, grown(num_megabytes * 10**6), Path(place, "rows"), ROW_LENGTH
        )
        seconds = time.monotonic() - started
        return {
            "megabytes_before": before,
            "megabytes": peak_megabytes(),
            "num_tokens": rows.num_tokens,
            "num_pieces": len(rows.texts[0].pieces),
            "fill": rows.fill,
            "seconds": seconds,
        }


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def alone(*arguments: str) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=int, nargs="+", help="megabytes of text")
    parser.add_argument("--measure", help="one run in this process (used by the script itself)")
    parser.add_argument("--measure-memory", type=int, help="likewise")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
    elif arguments.measure_memory:
        print(json.dumps(memory(arguments.measure_memory)))
    elif arguments.memory:
        print(f"{'text, MB':>8} {'tokens':>13} {'pieces':>9}  fill   seconds  peak MB (before)")
        for size in arguments.memory:
            found = alone("--measure-memory", str(size))
            print(
                f"{size:>8,} {found['num_tokens']:>13,} {found['num_pieces']:>9,} "
                f"{found['fill']:.2%} {found['seconds']:>8.1f} {found['megabytes']:>8,.0f} "
                f"({found['megabytes_before']:,.0f})",
                flush=True,
            )
    else:
        rounds = [{way: alone("--measure", way) for way in WAYS} for _ in range(ROUNDS)]
        own = sorted(r[WAYS[0]]["tokens_per_second"] for r in rounds)[ROUNDS // 2]
        for way in WAYS:
            speeds = sorted(r[way]["tokens_per_second"] for r in rounds)
            rest = {
                name: f"{value:,.4g}"
                for name, value in rounds[0][way].items()
                if name != "tokens_per_second"
            }
            print(
                f"{way:<50} {speeds[ROUNDS // 2]:>10,.0f} tokens/s ({speeds[0]:,.0f} to "
                f"{speeds[-1]:,.0f}), {speeds[ROUNDS // 2] / own:.2f} of the tokenizer's {rest}"
            )


if __name__ == "__main__":
    main()
