"""Speed and memory of sources + cleaning, from 10 MB to 1 GB of text.

    python benchmarks/cleaning.py                          # real news, then 10, 100, 1000 MB
    python benchmarks/cleaning.py --megabytes 10 100

Real text (FEDGRAFT_DATA, default ../shared/data) is repeated with every third word changed, so that
no document is a duplicate of another; each size is read, cleaned and counted in a process of its
own, with near duplicates looked for and without. The language is told for the real text only: that
holds no memory, and the changed words mislead it.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedgraft.text.cleaning import Cleaning, Tally, clean
from fedgraft.text.sources import documents

DATA = Path(os.environ.get("FEDGRAFT_DATA", "../shared/data"))


def write_text(file: Path, megabytes: int) -> None:
    """Real news, repeated until there is enough, a third of the words new each time."""
    texts = [document.text.split(" ") for document in documents(DATA / "news")]
    rng = random.Random(0)
    size = 0
    with file.open("w", encoding="utf-8") as opened:
        while size < megabytes * 1_000_000:
            for words in texts:
                words[::3] = [f"{rng.getrandbits(24):x}" for _ in words[::3]]
                text = " ".join(words)
                opened.write(json.dumps({"text": text}) + "\n")
                size += len(text)
                if size >= megabytes * 1_000_000:
                    break


def measure(*paths: str, near_duplicates: float | None, language: str) -> None:
    """Clean in this process and print what it took."""
    tally = Tally()
    start = time.process_time()
    settings = Cleaning(
        near_duplicates=near_duplicates, languages=None if language == "all" else (language,)
    )
    for _ in clean(documents(*paths), settings, tally=tally):
        pass
    seconds = time.process_time() - start
    status = Path("/proc/self/status").read_text()  # ru_maxrss would hold the parent's peak too
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    dropped = {reason: number for reason, number in tally.dropped.items() if number}
    print(
        f"{tally.num_read:>8,} documents, {tally.num_read / seconds:>6,.0f} a second of one core, "
        f"peak {peak:>6,.0f} MB, near duplicates {near_duplicates or 'off'}, dropped {dropped}"
    )


def in_own_process(*paths: Path, language: str) -> None:
    for near in ("0", "0.8"):
        names = [str(path) for path in paths]
        subprocess.run([sys.executable, __file__, "--measure", near, language, *names], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        near, language, *paths = asked.measure
        measure(*paths, near_duplicates=float(near) or None, language=language)
        return
    print("real news and departments", flush=True)
    in_own_process(DATA / "news", DATA / "dept", language="en")
    for megabytes in asked.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "text.jsonl"
            write_text(file, megabytes)
            print(f"{megabytes} MB", flush=True)
            in_own_process(file, language="all")


if __name__ == "__main__":
    main()
