"""`select`: from a file of examples to those that deserve training, with reasons."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedgraft.cli.arguments import MODEL, Out, Overwrite
from fedgraft.cli.console import finish, say
from fedgraft.cli.places import resolve


def select(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="JSONL of dialogues, instructions or documents."),
    ],
    model: Annotated[
        str,
        typer.Option("--model", parser=resolve, metavar="MODEL", help=f"Compares them. {MODEL}"),
    ],
    out: Out,
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="Share to choose; one of each cluster without it."),
    ] = None,
    client: Annotated[
        str | None,
        typer.Option("--client", metavar="FIELD", help="Field that says whose a line is."),
    ] = None,
    method: Annotated[
        Literal["federated", "local", "points", "random"] | None,
        typer.Option(
            "--method",
            help="federated: what clients have in common counts once; local: each by itself.",
            show_default="federated with --client, else local",
        ),
    ] = None,
    projection: Annotated[
        Literal["random", "anchors", "nystroem", "tsne", "pca", "kernel_pca", "umap"],
        typer.Option("--projection", help="The first three put all clients into one space."),
    ] = "random",
    dimensions: Annotated[int, typer.Option("--dimensions", min=1, help="Of that space.")] = 64,
    pooling: Annotated[
        Literal["mean", "last"],
        typer.Option("--pooling", help="Of an example's tokens: their mean, or the last one."),
    ] = "mean",
    min_cluster: Annotated[
        int, typer.Option("--min-cluster", min=2, help="Examples of a cluster at least.")
    ] = 2,
    noise: Annotated[
        Literal["drop", "singletons"],
        typer.Option("--noise", help="What lies in no cluster: left out, or a cluster by itself."),
    ] = "drop",
    server: Annotated[
        Literal["hdbscan", "k_centre", "facility_location"],
        typer.Option("--server", help="How centroids of clients are compared."),
    ] = "hdbscan",
    quality: Annotated[
        float,
        typer.Option("--quality", help="Share of each cluster, the worst answers, passed over."),
    ] = 0.0,
    prompt: Annotated[
        Literal["chat", "alpaca"],
        typer.Option("--prompt", help="Form of dialogues: the model's template, or Alpaca's."),
    ] = "chat",
    window: Annotated[
        int, typer.Option("--window", min=16, help="Longest dialogue, in tokens.")
    ] = 1024,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Choose the examples that deserve training, and say why.

    Hidden states of the model put examples that are alike close to each other; of
    each cluster some are chosen. OUT gets the lines as they stand (coreset.jsonl),
    the reason for each (reasons.jsonl), and a map of all of them (map.html).
    """
    from fedgraft.provenance import check_free
    from fedgraft.report.coreset import CORESET, num_clusters, write_coreset
    from fedgraft.selection.clusters import Clustering
    from fedgraft.selection.coreset import Selection
    from fedgraft.selection.features import Encoding
    from fedgraft.selection.projection import Projection
    from fedgraft.selection.select import select as select_lines

    method = method or ("federated" if client else "local")
    asked: dict[str, object] = {"method": method, "budget": budget}
    if method != "random":
        asked |= {
            "encoding": Encoding(pooling=pooling),
            "projection": Projection(name=projection, num_dimensions=dimensions),
            "clustering": Clustering(min_cluster_size=min_cluster, min_samples=1, noise=noise),
        }
    if method in ("federated", "local"):
        asked["quality"] = quality
    if method in ("federated", "points"):
        asked["server"] = server
    if method == "federated" and server == "hdbscan":
        asked["server_clustering"] = Clustering(min_cluster_size=2, min_samples=1, noise=noise)
    check_free(out, overwrite=overwrite)
    selected = select_lines(
        file,
        model,
        Selection.model_validate(asked),
        client_field=client,
        prompt=prompt,
        window=window,
        seed=seed,
    )
    page = write_coreset(selected, out, overwrite=overwrite)
    say("chosen", f"{len(selected.lines):,} of {len(selected.clients):,} examples", bold=True)
    say("", f"from {num_clusters(selected):,} clusters")
    if selected.too_long:
        say("left out", f"{len(selected.too_long):,} longer than {window:,} tokens", fg="yellow")
    finish("coreset", out / CORESET, facts=[f"map: {page}"], steps=[f"open {page} in a browser"])
