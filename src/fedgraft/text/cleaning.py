"""From what sources hold to what a model should read: each document kept, or dropped and counted.

    document -> normalise -> empty? -> exact duplicate? -> other language? -> too short, too long?
             -> near duplicate? -> kept

Documents stream through. What stays in memory is about 100 bytes for each text (exact duplicates),
and about 2.2 KB for each kept one where near duplicates are looked for: 3.3 GB for 1.5 million
documents. The first of several duplicates stays. Same documents, same settings: same result.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedgraft.errors import CorpusError
from fedgraft.text.sources import Document

PAPER_TOKENS = (156, 6981)
"""The shortest and the longest article that the paper trains on, in tokens."""

SPACES = [chr(n) for n in range(0x10000) if unicodedata.category(chr(n)) == "Zs" and n != 0x20]
CONTROLS = [
    chr(n) for n in range(0xA0) if unicodedata.category(chr(n)) == "Cc" and n not in (9, 10)
]
INVISIBLE = "\u00ad\u200b\u202a\u202b\u202c\u202d\u202e\u2060\ufeff"
"""Soft hyphens, spaces without width, and turns of direction: marks for a typesetter."""

LINE_ENDS = re.compile("\r\n?|[\x85\u2028\u2029]")
CLEAN = str.maketrans(dict.fromkeys(CONTROLS + list(INVISIBLE), "") | dict.fromkeys(SPACES, " "))
UNCLEAN = re.compile(f"[{re.escape(''.join(map(chr, CLEAN)))}\u2028\u2029]")
"""What most texts have none of, which is quicker to find than to replace."""

DOCUMENTS_PER_BATCH = 64
CHARACTERS_TO_TELL_A_LANGUAGE = 500
WORDS_PER_SHINGLE = 5
NUM_PERMUTATIONS = 128
SEED = 42

Count = Callable[[list[str]], Sequence[int]]
"""Texts -> how many tokens each has."""


class Cleaning(BaseModel):
    """What is kept of a text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    normalise: bool = True
    """NFC, line ends as \\n, odd spaces as spaces, no control characters and invisible marks."""
    min_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    near_duplicates: float | None = Field(default=0.8, gt=0, lt=1)
    """Drop a document that shares this much of its runs of five words with a kept one; None: off.

    The share is the Jaccard similarity, estimated by MinHash.
    """
    languages: tuple[str, ...] | None = ("en",)
    """ISO 639-1 codes of the languages to keep; None: all."""

    @model_validator(mode="after")
    def _in_order(self) -> "Cleaning":
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"expected min_tokens up to max_tokens, found {self.min_tokens} and "
                f"{self.max_tokens}; swap them"
            )
        return self

    @property
    def needs_tokens(self) -> bool:
        return self.min_tokens is not None or self.max_tokens is not None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why a document can be dropped under these settings, in the order of the checks."""
        checks = {
            "empty": True,
            "exact duplicate": True,
            "other language": self.languages is not None,
            "too short": self.min_tokens is not None,
            "too long": self.max_tokens is not None,
            "near duplicate": self.near_duplicates is not None,
        }
        return tuple(reason for reason, asked in checks.items() if asked)


@dataclass(kw_only=True, slots=True)
class Tally:
    """What became of the documents; `num_read` is `num_kept` and all of `dropped`."""

    num_read: int = 0
    num_changed: int = 0
    """How many texts normalisation changed."""
    num_kept: int = 0
    num_tokens: int | None = None
    """Tokens of the kept documents, where they were counted."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> documents, in the order of the checks."""


def clean(
    documents: Iterable[Document],
    settings: Cleaning,
    *,
    tally: Tally | None = None,
    count: Count | None = None,
) -> Iterator[Document]:
    """The documents worth reading, in their order, as they come; `tally` counts the others.

    Arguments:
        count: the model's tokenizer; needed for bounds on length. Where it is given, documents
            know their `num_tokens`.

    Raises CorpusError where a bound on length is set and nothing can count tokens, and for a
    language that cannot be told.
    """
    if settings.needs_tokens and count is None:
        raise CorpusError(
            "expected a tokenizer for the bounds min_tokens and max_tokens, found none; name the "
            "model that will read the text, or set no bounds"
        )
    tally = Tally() if tally is None else tally
    tally.dropped = dict.fromkeys(settings.reasons, 0) | tally.dropped
    if count:
        tally.num_tokens = tally.num_tokens or 0
    told = _language_teller(settings.languages) if settings.languages is not None else None
    near = _NearDuplicates(settings.near_duplicates) if settings.near_duplicates else None
    return _cleaned(documents, settings, tally, count, told, near)


def _cleaned(
    documents: Iterable[Document],
    settings: Cleaning,
    tally: Tally,
    count: Count | None,
    told: Callable[[str], str] | None,
    near: "_NearDuplicates | None",
) -> Iterator[Document]:
    seen: set[bytes] = set()

    def reason_before_counting(document: Document) -> str | None:
        if not document.text.strip():
            return "empty"
        mark = bytes.fromhex(document.hash[:32])
        if mark in seen:
            return "exact duplicate"
        seen.add(mark)
        if told and told(document.text) not in (settings.languages or ()):
            return "other language"
        return None

    def reason_by_length(document: Document) -> str | None:
        length = document.num_tokens or 0
        if settings.min_tokens is not None and length < settings.min_tokens:
            return "too short"
        if settings.max_tokens is not None and length > settings.max_tokens:
            return "too long"
        return None

    def kept(batch: Iterable[Document], why: Callable[[Document], str | None]) -> list[Document]:
        stay = []
        for document in batch:
            if reason := why(document):
                tally.dropped[reason] += 1
            else:
                stay.append(document)
        return stay

    def normalised(document: Document) -> Document:
        tally.num_read += 1
        text = normalise(document.text) if settings.normalise else document.text
        if text == document.text:
            return document
        tally.num_changed += 1
        return replace(document, text=text)

    stream = iter(documents)
    while batch := tuple(islice(stream, DOCUMENTS_PER_BATCH)):
        stay = kept(map(normalised, batch), reason_before_counting)
        if count and stay:
            lengths = count([document.text for document in stay])
            stay = [
                replace(document, num_tokens=length)
                for document, length in zip(stay, lengths, strict=True)
            ]
            stay = kept(stay, reason_by_length)
        if near:
            stay = kept(stay, near.reason)
        for document in stay:
            tally.num_kept += 1
            if tally.num_tokens is not None:
                tally.num_tokens += document.num_tokens or 0
            yield document


def normalise(text: str) -> str:
    """The same text with one way to write each character; normalising twice changes nothing."""
    if UNCLEAN.search(text):
        text = LINE_ENDS.sub("\n", text).translate(CLEAN)
    return unicodedata.normalize("NFC", text).strip()


def shingles(text: str) -> list[str]:
    """The runs of five words in a text, without case and punctuation; a shorter text is one run.

    A text without any word is its own run, or all such texts would be taken for the same.
    """
    words = re.findall(r"\w+", text.lower()) or [text]
    last = max(1, len(words) - WORDS_PER_SHINGLE + 1)
    return [" ".join(words[start : start + WORDS_PER_SHINGLE]) for start in range(last)]


class _NearDuplicates:
    """The sketches of the kept documents, in an index that finds the similar ones."""

    def __init__(self, threshold: float) -> None:
        from rensa import RMinHash, RMinHashDeduplicator

        self._new = RMinHash
        bands = next(b for b in (16, 32, 64) if _half_found(b) <= threshold - 0.05 or b == 64)
        self._index = RMinHashDeduplicator(threshold, NUM_PERMUTATIONS, True, bands)

    def reason(self, document: Document) -> str | None:
        """Why a document goes; one that stays is remembered."""
        sketch = self._new(NUM_PERMUTATIONS, SEED)
        sketch.update(shingles(document.text))
        return None if self._index.add(document.hash[:16], sketch) else "near duplicate"


def _half_found(bands: int) -> float:
    """The similarity at which half of the pairs become candidates: (1/bands)^(1/rows of a band)."""
    return float((1 / bands) ** (bands / NUM_PERMUTATIONS))


def _language_teller(languages: tuple[str, ...]) -> Callable[[str], str]:
    """What tells the language of a text by its first letters.

    Raises CorpusError for a language that it does not know.
    """
    import py3langid

    known = {str(name) for name, _ in py3langid.rank("text")}
    if unknown := [name for name in languages if name not in known]:
        raise CorpusError(
            f"expected languages by their code, one of {', '.join(sorted(known))}, found "
            f"{', '.join(map(repr, unknown))}; choose from these, or set no language"
        )

    def told(text: str) -> str:
        found: tuple[Any, Any] = py3langid.classify(text[:CHARACTERS_TO_TELL_A_LANGUAGE])
        return str(found[0])

    return told
