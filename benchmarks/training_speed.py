"""Tokens a second of fedgraft's training beside a bare loop of forward, backward and step.

    .venv/bin/python benchmarks/training_speed.py

The bare loop is the limit: the same model, rows, batch and optimizer, nothing else. Both run in
turn, with glibc's default and with freed memory kept (what fedgraft does), each in its own process.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 5
NUM_TOKENS = 60_000


def measure(what: str) -> float:
    """Tokens a second of one run in this process."""
    import torch

    from fedgraft.models import open_model, open_tokenizer
    from fedgraft.pocket.company import SEED, pages_of_year
    from fedgraft.pocket.entities import Company
    from fedgraft.pocket.weights import folder
    from fedgraft.text.packing import pack
    from fedgraft.training.settings import TrainingSettings
    from fedgraft.training.trainer import keep_freed_memory, train

    model = open_model(folder / "base")
    rows = pack(open_tokenizer(folder / "base"), pages_of_year(Company.found(SEED), 2, SEED), 256)
    settings = TrainingSettings(num_tokens=NUM_TOKENS, learning_rate=1e-4, checkpoint_every=10_000)
    if what == "fedgraft":
        with tempfile.TemporaryDirectory() as workdir:
            return train(model, rows, settings, Path(workdir), label="").tokens_per_second
    if what == "bare loop, freed memory kept":
        keep_freed_memory()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    rows_per_step = settings.batch_tokens // rows.row_length
    num_tokens, started = 0, time.monotonic()
    while num_tokens < NUM_TOKENS:
        places = torch.randint(len(rows), (rows_per_step,)).numpy()
        taken = rows.take(places)
        batch = {name: torch.from_numpy(getattr(taken, name)).long() for name in rows[0]}
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        num_tokens += taken.num_tokens
    return num_tokens / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", help="one run in this process (used by the script itself)")
    what = parser.parse_args().measure
    if what:
        print(measure(what))
        return
    ways = ("fedgraft", "bare loop, freed memory kept", "bare loop, glibc's default")
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way in ways:
            run = subprocess.run(
                [sys.executable, __file__, "--measure", way],
                capture_output=True,
                text=True,
                check=True,
            )
            speeds[way].append(float(run.stdout.split()[-1]))
    limit = speeds["bare loop, freed memory kept"]
    print(f"{'tokens a second':<30} {'median':>8} {'lowest':>8} {'highest':>8}  of the bare loop")
    for way, found in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(found, limit, strict=True))
        print(
            f"{way:<30} {statistics.median(found):8,.0f} {min(found):8,.0f} {max(found):8,.0f}"
            f"  {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
