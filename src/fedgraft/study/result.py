"""What a study found: the one file `result.json`, from which the report is drawn.

Key by key, as written:

    format             version of this layout
    name, question     of the study
    verdict            a few sentences in plain words
    claims             what was promised, the bar, what was measured, reached or not
    decisions          the gate's answer for each seed, with its reasons
    arms               for each arm: its scorecards, one a seed (one where seeds do not matter)
    summary            arm -> score -> mean and spread over the seeds
    scales             for each seed: the curve on the validation split and the scale chosen
    merging            name -> other ways to add the residual: words, scales by seed, test scores
    adapters           for each department and seed: before (graft) and after
    residual           facts about it: relative norm, exactness, parameters
    losses             training stage -> [step, nats per target]
    costs              stage by stage: seconds, tokens, FLOPs
    tuning             what instruction tuning again would cost, by the paper's formula
    tokens             tokens of continued pre-training in each arm
    settings           the study file as it was read
    inputs             role -> content hash
    versions           fedgraft and the libraries
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fedgraft.errors import ReportError
from fedgraft.evaluation.gate import Decision
from fedgraft.evaluation.scorecard import Scorecard
from fedgraft.study.cost import StageCost

FILE = "result.json"

ARMS = ("base", "instruct", "s1", "pretrained_base", "graft")
ARM_WORDS = {
    "base": "the base model as it came",
    "instruct": "the instruct model as it came",
    "s1": "instruct, pre-trained on the new text (S1)",
    "pretrained_base": "base, pre-trained on the new text",
    "graft": "base, pre-trained on the new text, plus the residual",
}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Summary(_Record):
    """A score over the seeds."""

    mean: float
    lowest: float
    highest: float
    stdev: float | None
    """Sample standard deviation over seeds; None with one seed."""
    num_seeds: int
    unit: Literal["share", "nats", "bits"]


class Claim(_Record):
    """Something promised, and whether it held."""

    text: str
    target: str
    measured: str
    reached: bool


class ArmResult(_Record):
    """One way to make a model, and how it scored."""

    arm: str
    words: str
    scorecards: tuple[Scorecard, ...]


class ScalePoint(_Record):
    """A graft at one scale, on the validation split."""

    scale: float
    scores: dict[str, float]


class ScaleCurve(_Record):
    """The search for the scale of one seed."""

    seed: int
    metric: str
    points: tuple[ScalePoint, ...]
    chosen: float


class MergingResult(_Record):
    """Another way to add the residual: its scale for each seed, and its test scores over seeds."""

    words: str
    scales: tuple[ScaleCurve, ...]
    summary: dict[str, Summary]


class AdapterResult(_Record):
    """A department's adapter over the graft, on the department's held-out documents."""

    department: str
    seed: int
    nats_per_token_before: float
    nats_per_token_after: float
    followed_before: float | None
    """Share of the department's dialogues followed by the graft; None where there are none."""
    followed_after: float | None


class Result(_Record):
    """See the head of this file."""

    format: Literal[1] = 1
    name: str
    question: str
    verdict: str
    claims: tuple[Claim, ...]
    decisions: tuple[Decision, ...]
    arms: tuple[ArmResult, ...]
    summary: dict[str, dict[str, Summary]]
    scales: tuple[ScaleCurve, ...]
    merging: dict[str, MergingResult] = {}
    adapters: tuple[AdapterResult, ...]
    residual: dict[str, Any]
    losses: dict[str, tuple[tuple[int, float], ...]]
    costs: tuple[StageCost, ...]
    tuning: dict[str, float]
    tokens: int
    settings: dict[str, Any]
    inputs: dict[str, str]
    versions: dict[str, str]

    @classmethod
    def load(cls, directory: Path) -> "Result":
        """Read the result of a study's directory.

        Raises ReportError where there is none, or one that this version cannot read.
        """
        file = directory / FILE
        try:
            return cls.model_validate_json(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ReportError(
                f"expected the result of a study at {file}, found nothing there; run "
                "`fedgraft study run FILE --out DIR` first and name its DIR"
            ) from error
        except ValidationError as error:
            raise ReportError(
                f"{file}: expected a result of format 1, found {error.error_count()} faults, the "
                f"first: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}; run the study "
                "again with this version (finished stages are kept)"
            ) from error

    def write(self, directory: Path) -> Path:
        file = directory / FILE
        partial = file.with_suffix(".partial")
        partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return partial.rename(file)
