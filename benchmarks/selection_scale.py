"""What a choice costs: seconds and memory of clients and server, from 1,000 to 1M examples.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/selection_scale.py
    .venv/bin/python benchmarks/selection_scale.py --examples 1000000
    .venv/bin/python benchmarks/selection_scale.py --clients 1000 --servers hdbscan
    .venv/bin/python benchmarks/selection_scale.py --dolly

Two tables in Markdown, and one of real text. The first has 200 clients and 1.5 % of n synthetic
points of 16 dimensions: 64 topics, each client a Dirichlet(0.5) mixture of them. Clients run one
after the other: `clusters` is all of them, and in a federation the time of the slowest would count.
`take` is the choice in the clients' clusters once the server has answered. The second is the server
alone, with 20 clusters from each client.

Each figure is from a fresh process. Memory is the most that the process held beyond what it held
when the points were made, as Linux counts it; the points are n * 64 bytes. sklearn is imported
before the clock starts, which counts processor seconds: other work on the machine changes little.

With `--dolly` the examples of Dolly belong to 200 clients (Dirichlet(0.5) over their
categories) and are read by the embedded model: all that a federation does before it trains, as the
paper has it and as `docs/selection.md` recommends. The paper does it anew in every round.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedgraft.federation.partition import Partition
from fedgraft.progress import silenced
from fedgraft.selection.clusters import Clustering, cluster
from fedgraft.selection.coreset import (
    Selection,
    Summary,
    choose,
    client_seed,
    grouped,
    take,
    tell,
)
from fedgraft.selection.features import features
from fedgraft.selection.privacy import CentroidPrivacy, centres
from fedgraft.selection.projection import Map, Points, project, shared_map
from fedgraft.text.tasks import load_dolly

DIMENSIONS, TOPICS, BUDGET = 16, 64, 0.015
SERVERS = ("hdbscan", "k_centre", "facility_location", "private")
LARGE, PAIRS = Clustering(min_cluster_size=5), Clustering(min_cluster_size=2)
OF_DOLLY = {"paper": Selection.paper(2), "aligned, 1.5 %": Selection(budget=BUDGET)}
PRIVACY = CentroidPrivacy(noise_multiplier=1.0, delta=1e-5, max_norm=1.0, num_cells=TOPICS)


def points_of(num_clients: int, num_examples: int) -> dict[str, Points]:
    """Client -> points, of equal numbers."""
    rng = np.random.default_rng(0)
    middles = rng.normal(size=(TOPICS, DIMENSIONS)).astype(np.float32)
    points = {}
    for client in range(num_clients):
        count = num_examples // num_clients + (client < num_examples % num_clients)
        topics = rng.choice(TOPICS, count, p=rng.dirichlet([0.5] * TOPICS))
        spread = 0.15 * rng.standard_normal((count, DIMENSIONS), np.float32)
        points[f"client-{client:05}"] = middles[topics] + spread
    return points


def selection_of(server: str) -> Selection:
    match server:
        case "private":
            return Selection(budget=BUDGET, privacy=PRIVACY)
        case "k_centre" | "facility_location":
            return Selection(budget=BUDGET, clustering=LARGE, server=server)
        case _:
            return Selection(budget=BUDGET, clustering=LARGE, server_clustering=PAIRS)


def measure(server: str, num_clients: int, num_examples: int | None) -> dict[str, float]:
    """Seconds and bytes of one choice, in this process; of the server alone where n is None."""
    cluster(np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32), Clustering())
    selection = selection_of(server)
    if num_examples is None:
        return served(selection, num_clients)
    points = points_of(num_clients, num_examples)
    spots = None
    if selection.privacy:
        rng = np.random.default_rng(1)
        anchors = np.concatenate(list(points_of(1, 2000).values()))
        spots = centres(rng.permutation(anchors), TOPICS, seed=0)
        tell(grouped(anchors, selection, centres=spots), anchors, selection, seed=0, centres=spots)
    before = forget_peak()
    started = time.process_time()
    clusters, summaries, slowest = {}, {}, 0.0
    for client, own in points.items():
        began = time.process_time()
        seed = client_seed(0, client)
        clusters[client] = grouped(own, selection, centres=spots)
        summaries[client] = tell(clusters[client], own, selection, seed=seed, centres=spots)
        slowest = max(slowest, time.process_time() - began)
    clustered = time.process_time()
    asked = choose(summaries, selection, seed=0)
    chosen = time.process_time()
    taken = sum(
        len(take(clusters[client], own, asked[client], selection, seed=client_seed(0, client)))
        for client, own in points.items()
    )
    return {
        "clusters": clustered - started,
        "slowest": slowest,
        "choose": chosen - clustered,
        "take": time.process_time() - chosen,
        "told": sum(int((summary.counts > 0).sum()) for summary in summaries.values()),
        "chosen": taken,
        "megabytes": (peak_kilobytes() - before) * 1024 / 1e6,
    }


def served(selection: Selection, num_clients: int) -> dict[str, float]:
    """`choose` alone, of 20 clusters a client."""
    rng = np.random.default_rng(0)
    middles = rng.normal(size=(TOPICS, DIMENSIONS))
    summaries = {}
    for client in range(num_clients):
        spread = 0.15 * rng.normal(size=(20, DIMENSIONS))
        counts = rng.integers(5, 40, 20)
        summaries[f"client-{client:05}"] = Summary(
            centroids=(middles[rng.choice(TOPICS, 20)] + spread).astype(np.float32),
            counts=counts,
            num_examples=int(counts.sum()),
        )
    before = forget_peak()
    started = time.process_time()
    asked = choose(summaries, selection, seed=0)
    return {
        "choose": time.process_time() - started,
        "told": 20 * num_clients,
        "chosen": sum(int(counts.sum()) for counts in asked.values()),
        "megabytes": (peak_kilobytes() - before) * 1024 / 1e6,
    }


def forget_peak() -> int:
    """Let the peak of memory count from here; what it is now, in kilobytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_kilobytes()


def peak_kilobytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


def in_fresh_process(server: str, num_clients: int, num_examples: int | None) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--one", server, "--clients", str(num_clients)]
    if num_examples:
        command += ["--examples", str(num_examples)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def by_examples(servers: list[str], num_clients: int, sizes: list[int]) -> None:
    print(f"\n{num_clients} clients, {100 * BUDGET:g} % chosen\n", flush=True)
    print("| server | examples | clusters s | slowest client s | told of | choose s", end=" | ")
    print("take s | chosen | MB | time grows by the power |")
    print("|---|" + "---:|" * 9)
    for server in servers:
        last: tuple[int, float] | None = None
        for size in sizes:
            found = in_fresh_process(server, num_clients, size)
            total = found["clusters"] + found["choose"] + found["take"]
            power = math.log(total / last[1]) / math.log(size / last[0]) if last else None
            last = (size, total)
            print(
                f"| {server} | {size:,} | {found['clusters']:.2f} | {found['slowest']:.3f} | "
                f"{found['told']:,} | {found['choose']:.2f} | {found['take']:.2f} | "
                f"{found['chosen']:,} | {found['megabytes']:.0f} | "
                f"{'' if power is None else f'{power:.2f}'} |",
                flush=True,
            )


def by_clients(servers: list[str], counts: list[int]) -> None:
    print("\nThe server alone, 20 clusters a client\n", flush=True)
    print("| server | clients | told of | choose s | chosen | MB | time grows by the power |")
    print("|---|" + "---:|" * 6)
    for server in servers:
        last: tuple[int, float] | None = None
        for count in counts:
            found = in_fresh_process(server, count, None)
            seconds = found["choose"]
            power = math.log(seconds / last[1]) / math.log(count / last[0]) if last else None
            last = (count, seconds)
            print(
                f"| {server} | {count:,} | {found['told']:,} | {seconds:.2f} | "
                f"{found['chosen']:,} | {found['megabytes']:.0f} | "
                f"{'' if power is None else f'{power:.2f}'} |",
                flush=True,
            )


def of_dolly() -> None:
    from feature_extraction import DOLLY, LONGEST, embedded

    dialogues = load_dolly(DOLLY)
    model, ids = embedded(dialogues)
    kept = [place for place, own in enumerate(ids) if len(own) <= LONGEST]
    print(f"{len(kept):,} of {len(ids):,} examples of at most {LONGEST:,} tokens\n")
    ids, labels = [ids[place] for place in kept], [dialogues[place].group for place in kept]
    partition = Partition(name="dirichlet", field="category", alpha=0.5, num_clients=200, minimum=2)
    clients = partition.clients({"category": labels})
    print("| choice | features s | maps and clusters s | slowest client s | told of | choose s |")
    print("|---|" + "---:|" * 5)
    for name, selection in OF_DOLLY.items():
        began = time.process_time()
        with silenced():
            found = features(model, ids, selection.encoding)
        read = time.process_time()
        shared: Map = {}
        if selection.projection.aligned:
            _, num_layers, hidden = found.shape
            shared = shared_map(selection.projection, num_layers=num_layers, hidden=hidden, seed=0)
        summaries, slowest = {}, 0.0
        for client, places in clients.items():
            client_began = time.process_time()
            seed = client_seed(0, client)
            points = project(found[places], selection.projection, shared=shared, seed=seed)
            summaries[client] = tell(grouped(points, selection), points, selection, seed=seed)
            slowest = max(slowest, time.process_time() - client_began)
        clustered = time.process_time()
        chosen = sum(int(counts.sum()) for counts in choose(summaries, selection, seed=0).values())
        done = time.process_time()
        told = sum(int((summary.counts > 0).sum()) for summary in summaries.values())
        print(
            f"| {name}: {chosen:,} examples | {read - began:.0f} | {clustered - read:.1f} | "
            f"{slowest:.2f} | {told:,} | {done - clustered:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--servers", nargs="*", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--examples", type=int, help="the first table, of so many")
    parser.add_argument("--clients", type=int, help="the second table, of so many")
    parser.add_argument("--dolly", action="store_true", help="the table of real text")
    given = parser.parse_args()
    open_servers = [server for server in given.servers if server != "private"]
    if given.one:
        print(json.dumps(measure(given.one, given.clients, given.examples)))
    elif given.dolly:
        of_dolly()
    elif given.examples:
        by_examples(given.servers, given.clients or 200, [given.examples])
    elif given.clients:
        by_clients(open_servers, [given.clients])
    else:
        by_examples(given.servers, 200, [1_000, 10_000, 100_000, 1_000_000])
        by_clients(open_servers, [10, 100, 1_000])


if __name__ == "__main__":
    main()
