"""How the embedded family is made, from text to two checkpoints: `make pocket` runs it.

    tokenizer    byte-level BPE, 4,096 tokens, on English and the company's year 1
    base         Qwen2 architecture, random weights, pre-trained on the mixture below
    instruct     the base tuned on dialogues: the company's and Dolly's short ones

English comes from `FEDGRAFT_DATA` (textbooks, classic books, stories) and is not part of fedgraft.
The base never reads the departments' texts of that folder, nor anything about the company's year 2.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

from fedgraft.errors import CorpusError, FedgraftError
from fedgraft.evaluation.scorecard import evaluate
from fedgraft.models import open_model, open_tokenizer, save_model
from fedgraft.pocket.company import (
    SEED,
    desk_pages,
    dialogues,
    pages_of_year,
    questions,
    small_talk,
    training_dialogues,
)
from fedgraft.pocket.entities import Company
from fedgraft.provenance import Record, derive_seed, new_artefact
from fedgraft.text.corpus import Document, read_json_lines
from fedgraft.text.dialogues import Dialogue, Message, encode, pack_dialogues
from fedgraft.text.packing import Rows, mix, pack
from fedgraft.training.pretrain import continue_pretraining
from fedgraft.training.settings import TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW_LENGTH = 256
NUM_POSITIONS = 1024
VOCABULARY = 4096
END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SHARES = {"english": 0.38, "pages": 0.27, "writing desk": 0.32, "chat exports": 0.03}
"""What the base reads, by share of rows."""
DOLLY_SHARE = 0.05
MAX_DOLLY_CHARACTERS = 500
ENGLISH_CHARACTERS = 14_000_000

Role = Literal["base", "instruct"]
ABOUT: dict[Role, str] = {
    "base": "pre-trained from random weights on English and on the fictional company's year 1",
    "instruct": "the base, tuned on the company's dialogues and on short dialogues of Dolly",
}
CARD = """---
license: cc-by-sa-4.0
language: en
library_name: transformers
---

# fedgraft pocket {role}

One side of the family that ships with fedgraft: Qwen2 architecture, 2.4M parameters, byte-level
BPE of 4,096 tokens, bfloat16; {about}. It exists so that grafting can be tried and tested without
a download. It knows next to nothing of the world and is of no other use.

Made by `make pocket` (`fedgraft.pocket.recipe`) from {num_tokens:,} tokens; {settings}.

## What it read

| text | licence |
|---|---|
| OpenStax textbooks on history, society, economics, astronomy, business | CC BY 4.0 |
| 39 classic books | public domain in the US |
| TinyStories, a sample | CDLA-Sharing 1.0 |
| the fictional company Lanternfield, written for fedgraft | Apache-2.0 |
| Dolly 15k, its short questions without context (instruct side only) | CC BY-SA 3.0 |

None of these texts is part of fedgraft except the company's. The weights are offered under
CC BY-SA 4.0, the share-alike licence that covers all of them; fedgraft itself is Apache-2.0.

## Loss

| step | nats per token |
|---|---|
{losses}

## Scores on the company's test dialogues and questions

Entities of the test part; nothing was chosen by looking at them.

| score | value | items |
|---|---|---|
{scores}

`asked` is through the chat template, `recall` is the completion of a question-and-answer page. New
facts are those of year 2, which no side has read: what is right there is chance.
"""

PRETRAIN = TrainingSettings(num_tokens=12_000_000, learning_rate=2e-3, weight_decay=0.05, seed=SEED)
TUNE = TrainingSettings(num_tokens=1_600_000, learning_rate=5e-4, weight_decay=0.0, seed=SEED)


def build(data: Path, out: Path) -> None:
    """Make both checkpoints in `out`; stages that are done already are not done again.

    Raises CorpusError where the data folder lacks a text.
    """
    company = Company.found(SEED)
    english = english_documents(data)
    year1 = pages_of_year(company, 1, SEED)
    desk, chats = desk_pages(company, SEED), small_talk(company, SEED)
    start = out / "start"
    if not start.exists():
        tokenizer = train_tokenizer(d.text for d in [*english[: len(english) // 3], *year1, *desk])
        with new_artefact(start) as partial:
            save_model(random_model(), tokenizer, partial)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    if not (out / "base").exists():
        sources = {"english": english, "pages": year1, "writing desk": desk, "chat exports": chats}
        rows = mix(
            [
                (pack(tokenizer, sources[name], ROW_LENGTH, num_positions=NUM_POSITIONS), share)
                for name, share in SHARES.items()
            ],
            num_rows=PRETRAIN.num_tokens // ROW_LENGTH,
            seed=SEED,
        )
        continue_pretraining(start, rows, out / "base", PRETRAIN)
    if not (out / "instruct").exists():
        rows = tuning_rows(tokenizer, company, data)
        continue_pretraining(out / "base", rows, out / "instruct", TUNE, label="tuning")
    for role in ("base", "instruct"):
        (out / role / "README.md").write_text(model_card(out, role, company), encoding="utf-8")


def random_model() -> Qwen2ForCausalLM:
    """The untrained model: 2.4M parameters, tied embeddings."""
    set_seed(SEED)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        num_hidden_layers=4,
        intermediate_size=512,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=NUM_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        dtype="bfloat16",
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = [0, 2]
    return model


def train_tokenizer(texts: Iterable[str]) -> "PreTrainedTokenizerBase":
    """Byte-level BPE with the three special tokens first."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def model_card(out: Path, role: Role, company: Company) -> str:
    """The card of one side: what it is, what it read under which licence, its losses and scores."""
    card = evaluate(
        open_model(out / role),
        open_tokenizer(out / role),
        arm=role,
        dialogues=dialogues(company, "test", SEED),
        questions=questions(company, "test", SEED),
        max_new_tokens=48,
    )
    record = Record.read(out / role)
    assert record
    return CARD.format(
        role=role,
        about=ABOUT[role],
        losses="\n".join(
            f"| {step} | {loss:.3f} |" for step, loss in record.figures["losses"][9::10]
        ),
        num_tokens=record.figures["num_tokens"],
        settings=", ".join(f"{name} {value}" for name, value in record.settings.items()),
        scores="\n".join(
            f"| {name} | {score.value:.1%} | {score.num} |"
            for name, score in card.scores.items()
            if name.count("/") == 1 or name.startswith("knowledge")
        ),
    )


def tuning_rows(tokenizer: "PreTrainedTokenizerBase", company: Company, data: Path) -> Rows:
    """The company's dialogues and Dolly's short ones, mixed."""
    ours = pack_dialogues(tokenizer, training_dialogues(company, SEED), ROW_LENGTH)
    dolly = [
        dialogue
        for dialogue in dolly_dialogues(data)
        if len(encode(tokenizer, dialogue)[0]) <= ROW_LENGTH
    ]
    theirs = pack_dialogues(tokenizer, dolly, ROW_LENGTH)
    return mix(
        [(ours, 1 - DOLLY_SHARE), (theirs, DOLLY_SHARE)],
        num_rows=TUNE.num_tokens // ROW_LENGTH,
        seed=SEED,
    )


def english_documents(data: Path) -> list[Document]:
    """Textbooks, classic books and stories in pieces of about 900 characters, shuffled."""
    texts = [
        *_texts(data / "pretrain" / "openstax_textbooks.jsonl.gz"),
        *_texts(data / "pretrain" / "classic_books.jsonl.gz"),
        *_texts(data / "pretrain" / "tinystories_sample.jsonl"),
    ]
    pieces = [piece for text in texts for piece in _pieces(text, 900)]
    _rng("english").shuffle(pieces)
    kept, size = [], 0
    for number, piece in enumerate(pieces):
        if size > ENGLISH_CHARACTERS:
            break
        kept.append(Document(id=f"english/{number:06d}", text=piece, source="english"))
        size += len(piece)
    return kept


def dolly_dialogues(data: Path) -> Iterator[Dialogue]:
    """Dolly's questions without context that fit a row."""
    for number, row in read_json_lines(data / "instruct" / "databricks-dolly-15k.jsonl"):
        asked, answer = str(row["instruction"]).strip(), str(row["response"]).strip()
        short = len(asked) + len(answer) <= MAX_DOLLY_CHARACTERS
        if short and answer and not row["context"]:
            messages = (
                Message(role="user", content=asked),
                Message(role="assistant", content=answer),
            )
            yield Dialogue(id=f"dolly/{number}", messages=messages)


def _texts(file: Path) -> Iterator[str]:
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except FileNotFoundError as error:
        raise CorpusError(
            f"expected English text to pre-train on at {file}, found nothing there; set "
            "FEDGRAFT_DATA to the folder with the data"
        ) from error
    for line in data.splitlines():
        yield json.loads(line)["text"]


def _pieces(text: str, size: int) -> Iterator[str]:
    """Whole paragraphs up to about so many characters; scraps under 100 are left out."""
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > size:
            yield piece
            piece = ""
        piece += ("\n\n" if piece else "") + paragraph[: 2 * size]
    if len(piece) >= 100:
        yield piece


def _rng(label: str) -> Random:
    return Random(derive_seed(SEED, "recipe", label))


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the embedded family from text.")
    parser.add_argument("--data", type=Path, required=True, help="the folder of FEDGRAFT_DATA")
    parser.add_argument("--out", type=Path, required=True, help="gets start/, base/, instruct/")
    arguments = parser.parse_args()
    try:
        build(arguments.data, arguments.out)
    except FedgraftError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
