"""The settings of a question: what a client is to do, checked on both sides of the exchange."""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedgraft.errors import FederationError
from fedgraft.federation.message import Scalar, Wire
from fedgraft.federation.update import Factor, Size
from fedgraft.selection.coreset import Selection
from fedgraft.text.dialogues import Template
from fedgraft.training.settings import AdapterSettings

Scored = Literal["graft", "global", "department", "client", ""]
"""What the adapter of a question is to its client, see `history`; empty where none is scored."""
TRAINING, SELECTION = "training.", "selection"


class Task(BaseModel):
    """What every question says; `training` is for those that train."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(pattern=r"^\w[\w.-]*$", max_length=240)
    """Which run it belongs to: what a client keeps for it lies in a folder of that name."""
    model: str
    """Content hash of the grafted model."""
    tokenizer: str
    """Hash of its tokenizer, see `Workplace.tokenizer_hash`."""
    seed: int
    """Of the federation."""
    row_length: int
    window: int
    rank: int
    alpha: float
    wire: Wire = "float32"
    scored: Scored = ""
    trained: Literal["AB", "B"] = "AB"
    """The factors that training moves."""
    sent: Literal["AB", "A", "B"] = "AB"
    """The factors of the answer."""
    own: bool = False
    """Train nothing: send factors that were kept."""
    proximal: float = 0.0
    training: AdapterSettings | None = None
    prompt: Template = "chat"
    passes: float | None = None
    """Times that the examples are read, `training.num_tokens` at most; that many where None."""
    selection: Selection | None = None
    """How examples are chosen; all of them where None."""
    encoder: str = ""
    """Content hash of the selection's encoder; empty where the model itself encodes."""
    num_exchanges: int = Field(default=1, ge=1)
    """Times that centroids are asked for in all, which their noise is chosen for."""
    choice: int = 0
    """The round of the choice that `taken` is about."""
    taken: str = Field(default="", pattern=r"^\d{0,9}( \d{1,9})*$")
    """How many examples of each of the client's clusters to train on: `2 0 1`."""

    @property
    def counts(self) -> list[int]:
        """`taken`, read."""
        return [int(count) for count in self.taken.split()]

    @property
    def size(self) -> Size:
        return Size(self.rank, self.alpha)

    @property
    def factors_trained(self) -> tuple[Factor, ...]:
        return letters(self.trained)

    @property
    def factors_sent(self) -> tuple[Factor, ...]:
        return letters(self.sent)

    def settings(self) -> dict[str, Scalar]:
        """As a question carries it: flat, and nothing that is None."""
        flat = self.model_dump(exclude={"training", "selection"}, exclude_none=True)
        if self.training:
            own = self.training.model_dump(exclude_none=True, exclude={"seed"})
            flat |= {f"{TRAINING}{name}": value for name, value in own.items()}
        if self.selection:
            flat[SELECTION] = self.selection.model_dump_json(exclude_none=True)
        return flat

    @classmethod
    def of(cls, settings: Mapping[str, Scalar]) -> "Task":
        """Read a question's settings. Raises FederationError for others than `settings` gives."""
        own = {k.removeprefix(TRAINING): v for k, v in settings.items() if k.startswith(TRAINING)}
        rest: dict[str, object] = {k: v for k, v in settings.items() if not k.startswith(TRAINING)}
        try:
            if (written := rest.pop(SELECTION, None)) is not None:
                rest[SELECTION] = Selection.model_validate_json(str(written))
            return cls.model_validate({**rest, "training": own or None})
        except ValidationError as error:
            fault = error.errors()[0]
            raise FederationError(
                f"expected the settings of a question, found {'.'.join(map(str, fault['loc']))}: "
                f"{fault['msg']}; use one version of fedgraft everywhere"
            ) from error


def letters(named: str) -> tuple[Factor, ...]:
    """`AB` -> both factors."""
    return tuple(factor for factor in ("A", "B") if factor in named)
