"""Useful tokens a second: fedgraft beside padding, TRL's packing, and a bare loop as the limit.

    .venv/bin/python benchmarks/training_speed.py                # embedded model, real news
    .venv/bin/python benchmarks/training_speed.py --hidden 512 --layers 8 --row-length 1024

Every way trains the same model in float32 on the same pieces of text, with AdamW and as many rows a
step; a token is useful that is not padding. The bare loop is forward, backward, clip and step on
fedgraft's rows, nothing else. The padded trainer is transformers' Trainer, a piece a row, each
batch padded to its longest. TRL's SFTTrainer runs in `runs/venvs/trl`, made on the first run; its
packing is the one that needs no FlashAttention (`wrapped`), so its documents do see each other.
Whole processes in turn; the time is that of the training call, without start-up.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("FEDGRAFT_DATA", HERE.parent.parent / "shared" / "data"))
TRL = ("torch==2.13.0", "trl==1.16.0")
ROWS_PER_STEP = 16
WAYS = ("fedgraft", "bare loop", "padded trainer", "TRL, packed")
TRAINER = {
    "learning_rate": 1e-4,
    "adam_beta2": 0.95,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch_fused",
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Write the model, fedgraft's rows, and the same pieces one by one."""
    import numpy as np
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from fedgraft.models import open_model, open_tokenizer
    from fedgraft.pocket.weights import folder as pocket

    tokenizer = open_tokenizer(pocket / "base")
    model = open_model(pocket / "base")
    if options.hidden:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=model.config.vocab_size,
            hidden_size=options.hidden,
            intermediate_size=4 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=2,
            max_position_embeddings=options.row_length,
            tie_word_embeddings=True,
        )
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = packed(folder / "model", options)
    arrays: dict[str, list[Any]] = {"input_ids": [], "position_ids": [], "labels": []}
    pieces = []
    for number in range(len(rows)):
        row = rows[number]
        for name, values in row.items():
            arrays[name].append(values)
        length = int(rows.lengths[number])
        starts = [0, *(np.flatnonzero(np.diff(row["position_ids"][:length]) != 1) + 1).tolist()]
        pieces += [
            row["input_ids"][a:b].tolist()
            for a, b in zip(starts, [*starts[1:], length], strict=True)
        ]
    np.savez(
        folder / "rows.npz", lengths=rows.lengths, **{n: np.stack(a) for n, a in arrays.items()}
    )
    (folder / "pieces.json").write_text(json.dumps(pieces))
    facts = {"pieces": len(pieces), "rows": len(rows), "fill": rows.fill}
    facts["padding saved"] = round(_padding(pieces), 2)
    facts |= {"parameters": model.num_parameters(), "tokens": rows.num_tokens}
    print(json.dumps(facts))


def _padding(pieces: list[list[int]]) -> float:
    """Space of padded batches, as a multiple of the tokens in them."""
    lengths = [len(pieces[place]) for place in shuffled(pieces)]
    batches = [lengths[n : n + ROWS_PER_STEP] for n in range(0, len(lengths), ROWS_PER_STEP)]
    return sum(max(batch) * len(batch) for batch in batches) / sum(lengths)


def shuffled(pieces: list[list[int]]) -> Any:
    import numpy as np

    return np.random.default_rng(0).permutation(len(pieces))


def measure(way: str, folder: Path, options: argparse.Namespace) -> float:
    """Useful tokens a second of one way, in this process."""
    return {
        "fedgraft": _fedgraft,
        "bare loop": _bare_loop,
        "padded trainer": _padded,
        "TRL, packed": _trl,
    }[way](folder, options)


def packed(model: Path, options: argparse.Namespace) -> Any:
    """The rows that all ways read."""
    from fedgraft.models import open_tokenizer
    from fedgraft.text.corpus import Corpus
    from fedgraft.text.packing import pack

    corpus = Corpus.load(DATA / "news" / "state_dept_press_2021_2022.jsonl")
    documents = corpus.documents[: options.documents]
    length = options.row_length
    return pack(open_tokenizer(model), documents, length, num_positions=length)


def _fedgraft(folder: Path, options: argparse.Namespace) -> float:
    from fedgraft.models import open_model
    from fedgraft.training.settings import TrainingSettings
    from fedgraft.training.trainer import train

    settings = TrainingSettings(
        num_tokens=options.tokens,
        learning_rate=1e-4,
        batch_tokens=ROWS_PER_STEP * options.row_length,
        precision="float32",
        checkpoint_every=100_000,
    )
    model, rows = open_model(folder / "model"), packed(folder / "model", options)
    with tempfile.TemporaryDirectory() as workdir:
        return train(model, rows, settings, Path(workdir), label="").tokens_per_second


def _bare_loop(folder: Path, options: argparse.Namespace) -> float:
    import numpy as np
    import torch

    from fedgraft.models import keep_freed_memory, open_model

    keep_freed_memory()
    model, rows = open_model(folder / "model").train(), dict(np.load(folder / "rows.npz"))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    generator, seen, started = np.random.default_rng(0), 0, time.monotonic()
    while seen < options.tokens:
        places = generator.integers(len(rows["lengths"]), size=ROWS_PER_STEP)
        batch = {
            name: torch.from_numpy(rows[name][places]).long()
            for name in ("input_ids", "position_ids", "labels")
        }
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += int(rows["lengths"][places].sum())
    return seen / (time.monotonic() - started)


def _padded(folder: Path, options: argparse.Namespace) -> float:
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    pieces = json.loads((folder / "pieces.json").read_text())
    order = shuffled(pieces)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    num_steps = max(1, round(options.tokens / sum(map(len, pieces)) * len(pieces) / ROWS_PER_STEP))
    chosen = [pieces[order[n % len(pieces)]] for n in range(num_steps * ROWS_PER_STEP)]
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32"),
            args=TrainingArguments(
                out,
                max_steps=num_steps,
                per_device_train_batch_size=ROWS_PER_STEP,
                train_sampling_strategy="sequential",
                **TRAINER,
            ),
            train_dataset=[{"input_ids": piece} for piece in chosen],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        started = time.monotonic()
        trainer.train()
        return sum(map(len, chosen)) / (time.monotonic() - started)


def _trl(folder: Path, options: argparse.Namespace) -> float:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    pieces = json.loads((folder / "pieces.json").read_text())
    num_steps = max(1, options.tokens // options.row_length // ROWS_PER_STEP)
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32"),
            args=SFTConfig(
                out,
                max_steps=num_steps,
                per_device_train_batch_size=ROWS_PER_STEP,
                packing=True,
                packing_strategy="wrapped",
                max_length=options.row_length,
                bf16=False,
                gradient_checkpointing=False,
                **TRAINER,
            ),
            train_dataset=Dataset.from_dict({"input_ids": pieces}),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        )
        started = time.monotonic()
        trainer.train()
        return num_steps * ROWS_PER_STEP * options.row_length / (time.monotonic() - started)


def trl_python() -> Path:
    """A Python with TRL, in a virtual environment of its own."""
    venv = HERE.parent / "runs" / "venvs" / "trl"
    python = venv / "bin" / "python"
    if not (venv / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        for package in TRL:
            subprocess.run([python, "-m", "pip", "install", "-q", package], check=True)
        (venv / "complete").touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=120_000, help="of one run")
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--hidden", type=int, help="a random Qwen2 of this width instead")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--measure", nargs=2, help="used by the script itself: way and folder")
    parser.add_argument("--prepare", help="used by the script itself: folder")
    options = parser.parse_args()
    if options.prepare:
        prepare(Path(options.prepare), options)
        return
    if options.measure:
        way, folder = options.measure
        print(measure(way, Path(folder), options))
        return
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, __file__, *sys.argv[1:]]
        facts = _run([*own, "--prepare", folder])
        print(facts, flush=True)
        speeds: dict[str, list[float]] = {way: [] for way in options.ways}
        for _ in range(options.rounds):
            for way in options.ways:
                python = str(trl_python()) if way.startswith("TRL") else sys.executable
                found = _run([python, *own[1:], "--measure", way, folder])
                speeds[way].append(float(found))
                print(f"{way}: {float(found):,.0f}", file=sys.stderr, flush=True)
    limit = speeds["bare loop"]
    print("| | useful tokens a second, median (lowest to highest) | of the bare loop |")
    print("|---|---:|---:|")
    for way, found in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(found, limit, strict=True))
        print(
            f"| {way} | {statistics.median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f}) "
            f"| {ratio:.2f} |"
        )


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[-6:])} failed:\n{done.stderr[-3000:]}")
    return done.stdout.split("\n")[-2]


if __name__ == "__main__":
    main()
