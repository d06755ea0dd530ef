"""Features of texts: fedgraft beside one example at a time, as FedHDS's released code reads them.

    .venv/bin/python benchmarks/feature_extraction.py                 # the embedded model on Dolly
    .venv/bin/python benchmarks/feature_extraction.py --texts company
    .venv/bin/python benchmarks/feature_extraction.py --shape 0.5b --examples 32 --rounds 3
    .venv/bin/python benchmarks/feature_extraction.py --shape 0.5b --dtype bfloat16 --device cuda
    .venv/bin/python benchmarks/feature_extraction.py --memory 1000 10000 100000

One model in one process; the ways take turns, so that what else the machine does meets all of them,
and processor time is told beside the clock's.
As released: a pass an example with a mask of ones, the cache and all logits, each layer's last
token fetched by itself, 64-bit numbers. Without logits: the same through the model's body, which
shows what the output layer alone costs. A shape is a random model of that size; its examples are
as long as the texts at four letters a token. The arithmetic that each way cannot avoid stands
beside the seconds: two operations a weight and token, padding included, attention left out.

Memory: so many examples of three tokens through a small model into a file, each number of them in
its own process, and the peak of that process.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft.evaluation.batches import by_length
from fedgraft.models import open_model, open_tokenizer
from fedgraft.pocket.company import write_company
from fedgraft.pocket.weights import folder
from fedgraft.progress import silenced
from fedgraft.selection.features import BATCH_TOKENS, BATCH_TOKENS_GPU, Encoding, features
from fedgraft.testing import tiny_model
from fedgraft.text.dialogues import Dialogue, encode, load_dialogues
from fedgraft.text.tasks import load_dolly

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DOLLY = Path(os.environ.get("FEDGRAFT_DATA", "../shared/data")) / (
    "instruct/databricks-dolly-15k.jsonl"
)
LETTERS_PER_TOKEN = 4
LONGEST = 1024
"""Tokens; longer examples are left out, as in the paper."""
RUN = 16
PAPER = {"Dolly": (60, 10, 200), "Natural Instructions": (40, 36, 738)}
"""Rounds, clients a round, clients."""


def company() -> list[Dialogue]:
    with tempfile.TemporaryDirectory() as place:
        write_company(Path(place, "company"))
        return list(load_dialogues(Path(place, "company/dialogues/train.jsonl")))


def embedded(texts: Sequence[Dialogue]) -> tuple["PreTrainedModel", list[list[int]]]:
    tokenizer = open_tokenizer(folder / "instruct")
    ids = [encode(tokenizer, dialogue)[0] for dialogue in texts]
    return open_model(folder / "instruct"), ids


def of_shape(
    name: str, dtype: torch.dtype, texts: Sequence[Dialogue]
) -> tuple["PreTrainedModel", list[list[int]]]:
    from synthetic import SHAPES
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPES[name].config)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    draw = np.random.default_rng(0)
    ids = []
    for dialogue in texts:
        num_letters = sum(len(message.content) for message in dialogue.messages)
        length = max(1, num_letters // LETTERS_PER_TOKEN)
        ids.append(draw.integers(config.vocab_size, size=length).tolist())
    return model.eval(), ids


def evenly(everything: Sequence[list[int]], count: int) -> list[list[int]]:
    """Some of all examples, short and long ones in their shares, in runs of like length.

    So that a batch of few of them is padded as little as one of all of them.
    """
    ordered = sorted(everything, key=len)
    num_runs = max(1, count // RUN)
    middles = [len(ordered) * (2 * run + 1) // (2 * num_runs) for run in range(num_runs)]
    return [ids for middle in middles for ids in ordered[middle - RUN // 2 : middle + RUN // 2]]


def one_at_a_time(
    model: "PreTrainedModel", examples: Sequence[Sequence[int]], *, logits: bool
) -> NDArray[np.float32]:
    read = model if logits else model.base_model
    found = []
    with torch.inference_mode():
        for example in examples:
            ids = torch.tensor([example], device=model.device)
            output = read(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
            )
            states = [state[0, -1].float().cpu().numpy() for state in output.hidden_states]
            found.append(np.array(states, np.float64))
    return np.array(found, np.float32)


def memory(count: int) -> str:
    """Features of so many examples into a file: a line of the table."""
    model = tiny_model(num_layers=8, hidden_size=128)
    examples = np.random.default_rng(0).integers(5, 300, (count, 3), np.int32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    with tempfile.TemporaryDirectory() as place, silenced():
        found = features(model, examples, Encoding(), file=Path(place, "features.npy"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        return f"| {count:,} | {found.nbytes / 1e6:,.0f} | {before:,.0f} | {peak:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", help="of benchmarks/synthetic.py; the embedded model without")
    parser.add_argument("--texts", default="dolly", choices=["dolly", "company"])
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-tokens", type=int, help="what suits the device without")
    parser.add_argument("--memory", type=int, nargs="+", metavar="EXAMPLES")
    options = parser.parse_args()
    if options.memory:
        if len(options.memory) == 1:
            print(memory(options.memory[0]))
            return
        print("| examples | features, MB | peak before, MB | peak, MB |\n|---:|---:|---:|---:|")
        for count in options.memory:
            own = [sys.executable, __file__, "--memory", str(count)]
            subprocess.run(own, check=True)
        return
    dtype = getattr(torch, options.dtype)
    texts = load_dolly(DOLLY) if options.texts == "dolly" else company()
    model, everything = of_shape(options.shape, dtype, texts) if options.shape else embedded(texts)
    model = model.to(options.device, dtype)
    everything = [ids for ids in everything if len(ids) <= LONGEST]
    examples = evenly(everything, options.examples)
    lengths = [len(ids) for ids in examples]

    embedding = model.get_input_embeddings().weight.numel()
    output = model.get_output_embeddings().weight
    weights = sum(parameter.numel() for parameter in model.base_model.parameters()) - embedding
    budget = options.batch_tokens or (
        BATCH_TOKENS_GPU if options.device.startswith("cuda") else BATCH_TOKENS
    )

    def padded(lengths: Sequence[int]) -> int:
        batches = by_length(lengths, budget)
        return sum(len(b) * max(lengths[place] for place in b) for b in batches)

    own, whole = sum(lengths), [len(ids) for ids in everything]
    Way = Callable[[], NDArray[np.float32]]
    ways: dict[str, tuple[Way, float]] = {
        "as released": (
            lambda: one_at_a_time(model, examples, logits=True),
            2.0 * own * (weights + output.numel()),
        ),
        "as released, without logits": (
            lambda: one_at_a_time(model, examples, logits=False),
            2.0 * own * weights,
        ),
        "fedgraft": (
            lambda: features(model, examples, Encoding(), batch_tokens=budget),
            2.0 * padded(lengths) * weights,
        ),
    }
    print(
        f"{len(examples)} examples, {own:,} tokens (median {statistics.median(lengths):.0f} an "
        f"example), {options.dtype} on {options.device}, {torch.get_num_threads()} threads; "
        f"{weights:,} weights in the blocks, {output.numel():,} in the output layer; padding "
        f"{padded(lengths) / own - 1:.1%} (of all {len(whole):,}: "
        f"{padded(whole) / sum(whole) - 1:.1%})"
    )
    clocks = {"seconds": time.monotonic, "processor seconds": time.process_time}
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    values = {}
    with silenced():
        for way, (run, _) in ways.items():  # the first pass of each is not counted
            values[way] = run()
        for _ in range(options.rounds):
            for way, (run, _) in ways.items():
                started = {name: clock() for name, clock in clocks.items()}
                run()
                taken[way].append({name: clock() - started[name] for name, clock in clocks.items()})
    first, ours = values["as released"], values["fedgraft"]
    print(
        f"largest difference {np.abs(ours - first).max() / np.abs(first).max():.1e} of the largest"
    )

    def ratios(way: str, clock: str) -> list[float]:
        pairs = zip(taken["as released"], taken[way], strict=True)
        return [theirs[clock] / ours[clock] for theirs, ours in pairs]

    def spread(found: Sequence[float]) -> str:
        return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"

    print("| | seconds, median (lowest to highest) | times as fast | in processor time | TFLOP |")
    print("|---|---:|---:|---:|---:|")
    for way in ways:
        print(
            f"| {way} | {spread([found['seconds'] for found in taken[way]])} "
            f"| {spread(ratios(way, 'seconds'))} | {spread(ratios(way, 'processor seconds'))} "
            f"| {ways[way][1] / 1e12:.3g} |"
        )
    speed = statistics.median(ratios("fedgraft", "seconds"))
    for task, (num_rounds, active, clients) in PAPER.items():
        again = num_rounds * active / clients
        print(
            f"over a run as in the paper on {task} ({num_rounds} rounds, {active} of {clients} "
            f"clients): {again:.1f} passes over the data as released, one here: {again * speed:.1f}"
        )


if __name__ == "__main__":
    main()
