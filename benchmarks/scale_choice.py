"""Does `graft --scale auto`, which sees no label, choose as well as labels do?

    python benchmarks/scale_choice.py --out runs/scale_choice

For three seeds the pocket base reads year 2 of the company, as in `studies/pocket.yaml`. A scale is
chosen with the prompts that ship with fedgraft and held-out pages; then every scale that was tried
is scored on the validation dialogues, which are labelled. Prints a table in Markdown; about eight
minutes on two cores.
"""

import argparse
from pathlib import Path

from fedgraft.cli.places import places_of
from fedgraft.evaluation.closeness import ScaleChoice, choose_scale
from fedgraft.evaluation.scorecard import FOLLOWED, RIGHT_AND_FOLLOWED, evaluate
from fedgraft.models import open_model, open_tokenizer
from fedgraft.pocket.recipe import NUM_POSITIONS
from fedgraft.provenance import derive_seed
from fedgraft.study.material import Material
from fedgraft.study.study import Study
from fedgraft.text.packing import pack
from fedgraft.training.pretrain import continue_pretraining
from fedgraft.weights.family import Family
from fedgraft.weights.live import Live, applied
from fedgraft.weights.residual import Residual, extract

STUDY = Path(__file__).parents[1] / "studies" / "pocket.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/scale_choice"))
    out: Path = parser.parse_args().out
    study = Study.load(STUDY, places_of(STUDY, out))
    material = Material.load(study)
    family = Family.open(study.family.base, study.family.instruct)
    residual = extract(family, out / "residual", overwrite=True)
    print(
        "| seed | scale | KL, nats a token | bits per byte | kept | followed | right and followed |"
    )
    print("|---|---|---|---|---|---|---|")
    gaps, said = [], []
    for seed in study.seeds:
        newer = newer_base(study, material, seed, out / f"seed-{seed}")
        choice = choose_scale(
            newer,
            residual,
            study.family.base,
            [document for split in material.splits.values() for document in split.validation],
            window=study.evaluation.window,
            max_new_tokens=study.evaluation.max_new_tokens,
        )
        followed = labelled(study, material, residual, newer, choice)
        for trial in choice.trials:
            star = " (chosen)" if trial.scale == choice.scale else ""
            marks, right = followed[trial.scale]
            print(
                f"| {seed} | {trial.scale:g}{star} | {trial.divergence:.4f} "
                f"| {trial.bits_per_byte:.4f} | {trial.kept:.0%} | {marks:.1%} | {right:.1%} |",
                flush=True,
            )
        best = max(followed, key=lambda scale: followed[scale])
        gaps.append(followed[best][0] - followed[choice.scale][0])
        said.append(
            f"Seed {seed}: {choice.why}. Labels would choose {best:g} with {followed[best][0]:.1%} "
            f"followed, {100 * gaps[-1]:.1f} points more than at {choice.scale:g}."
        )
    print("", *said, sep="\n")
    print(f"Largest gap: {100 * max(gaps):.1f} points of prompts followed")


def newer_base(study: Study, material: Material, seed: int, folder: Path) -> Path:
    """The base after year 2, trained as the study trains it; not again where it is there."""
    if not folder.exists():
        tokenizer = open_tokenizer(study.family.instruct)
        pages = [document for split in material.splits.values() for document in split.train]
        assert study.replay
        continue_pretraining(
            study.family.base,
            pack(tokenizer, pages, study.row_length, seed=seed, num_positions=NUM_POSITIONS),
            folder,
            study.pretrain.model_copy(update={"seed": derive_seed(seed, "pretrain")}),
            replay=pack(
                tokenizer,
                material.replay,
                study.row_length,
                seed=seed,
                num_positions=NUM_POSITIONS,
            ),
            replay_share=study.replay.share,
            label=f"seed {seed}",
        )
    return folder


def labelled(
    study: Study, material: Material, residual: Residual, newer: Path, choice: ScaleChoice
) -> dict[float, tuple[float, float]]:
    """Scale -> shares of the validation dialogues followed, and followed and right."""
    model, tokenizer = open_model(newer), open_tokenizer(study.family.instruct)
    found = {}
    for scale in (trial.scale for trial in choice.trials):
        with applied(Live(model, newer), residual, scale):
            scores = evaluate(
                model,
                tokenizer,
                arm=f"scale {scale:g}",
                dialogues=material.validation_dialogues,
                max_new_tokens=study.evaluation.max_new_tokens,
            ).scores
        found[scale] = (scores[FOLLOWED].value, scores[RIGHT_AND_FOLLOWED].value)
    return found


if __name__ == "__main__":
    main()
