"""`graft --scale auto`: the curve, the choice, and why."""

from pathlib import Path
from typing import TYPE_CHECKING

from fedgraft.cli.console import say, show_table
from fedgraft.errors import EvaluationError

if TYPE_CHECKING:
    from fedgraft.weights.residual import Difference, Residual


def choose(
    target: str,
    residual: "Residual | Difference",
    *,
    base: str | None,
    instruct: str | None,
    data: list[Path] | None,
    prompts: Path | None,
) -> float:
    """Choose a scale, print what was measured, and return it.

    Raises EvaluationError where the base or held-out text is not named.
    """
    if base is None or not data:
        lacking = " and ".join(["--base"] * (base is None) + ["--data"] * (not data))
        raise EvaluationError(
            f"expected --base (what the residual was taken from) and --data (held-out text of what "
            f"the target has read) for --scale auto, found no {lacking}; name them, or a scale"
        )
    from fedgraft.evaluation.closeness import PROMPTS, choose_scale, load_prompts
    from fedgraft.text.corpus import Corpus

    choice = choose_scale(
        target,
        residual,
        base,
        Corpus.load(*data).documents,
        instruct=instruct,
        prompts=load_prompts(prompts or PROMPTS),
    )
    show_table(
        ("scale", "KL, nats a token", "bits per byte", "kept"),
        (
            (
                f"{trial.scale:g}{' <' if trial == choice.chosen else ''}",
                f"{trial.divergence:.4f}",
                f"{trial.bits_per_byte:.4f}",
                f"{trial.kept:.0%}",
            )
            for trial in choice.trials
        ),
    )
    read = ", ".join(f"{name} {bits:.4f}" for name, bits in choice.bits_per_byte.items())
    say("", f"bits per byte without the graft: {read}")
    say("chosen", choice.why)
    return choice.scale
