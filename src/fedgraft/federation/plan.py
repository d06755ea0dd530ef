"""The plan of a federation: who takes part, how often, and how answers become the next adapter."""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedgraft.federation.aggregate import NEEDED, Rule
from fedgraft.federation.hierarchy import Mixing
from fedgraft.federation.message import Wire
from fedgraft.federation.optimiser import Optimiser
from fedgraft.federation.privacy import Privacy
from fedgraft.federation.update import BOTH, MOST_EXAMPLES, Factor, Size
from fedgraft.selection.coreset import Selection
from fedgraft.text.dialogues import Template
from fedgraft.training.settings import AdapterSettings, Lora

Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=200)]
ORGANISATION = "organisation"
"""The one group of a federation whose departments share an adapter."""


class Robust(BaseModel):
    """A rule that a few hostile clients cannot pull away; see `robust`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["trimmed_mean", "median", "krum", "clipping"]
    num_hostile: int = Field(default=1, ge=0)
    """Clients of a group that may be hostile: trimmed at either end, or left out by Krum."""


class Settings(BaseModel):
    """What all rounds have in common, whoever takes part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: Literal["department", "organisation"] = "department"
    """Who has an adapter in common: each department, or all of them."""
    num_rounds: int = Field(gt=0)
    training: AdapterSettings
    """Of one client in one round; its seed is derived from the plan's, the client and the round."""
    rule: Rule = "fedavg"
    optimiser: Optimiser = Optimiser()
    robust: Robust | None = None
    privacy: Privacy | None = None
    """Clip and noise what clients of a group add up to; see `privacy`."""
    mixing: Mixing | None = None
    """Let departments that are alike move towards each other after a round; see `hierarchy`."""
    sizes: dict[Name, Lora] = {}
    """Of clients whose adapters are of another size than that of `training` (flora, flexlora)."""
    selection: Selection | None = None
    """Which of their examples clients train on, see `selection.coreset`; all where None."""
    prompt: Template = "chat"
    """How dialogues become text: the model's own chat template, or Alpaca's prompt."""
    passes: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Times that a client reads its examples in a round, `training.num_tokens` at most."""
    proximal: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """FedProx (arXiv 1812.06127): clients minimise loss + proximal / 2 ||w - start||^2."""
    sampled: float = Field(default=1.0, gt=0, le=1)
    """Share of a department's clients that a round asks, one at least."""
    quorum: float = Field(default=0.5, gt=0, le=1)
    """Share of the asked of a group that must answer, or its last adapter stays."""
    timeout: float = Field(default=3600.0, gt=0)
    """Seconds that clients have to answer."""
    wire: Wire = "float32"
    """How numbers travel."""
    max_norm: float = Field(default=1e3, gt=0)
    """Euclidean norm that no tensor of an update may be above."""
    max_examples: int = Field(default=MOST_EXAMPLES, gt=0)
    """More examples than any client has: a claim is a weight, so one above it is refused."""
    row_length: int = Field(default=256, ge=16)
    window: int = Field(default=256, ge=16)
    """Tokens that held-out text is scored in."""
    seed: int = 0

    @field_validator("training")
    @classmethod
    def _seedless(cls, settings: AdapterSettings) -> AdapterSettings:
        if "seed" in settings.model_fields_set and settings.seed:
            raise ValueError("the seed comes from the plan's `seed`; take it out here")
        return settings


class Plan(Settings):
    """A federation: its settings, and who takes part."""

    name: str
    departments: dict[Name, tuple[Name, ...]] = Field(min_length=1)
    """Department -> its clients. Nobody else is asked."""

    @model_validator(mode="after")
    def _consistent(self) -> "Plan":
        empty = [department for department, names in self.departments.items() if not names]
        if empty:
            raise ValueError(f"departments.{empty[0]}: expected a client at least, found none")
        twice = [name for name, n in Counter(self.clients).items() if n > 1]
        if twice:
            raise ValueError(f"departments: {twice[0]} is named twice; a client has one department")
        if unknown := sorted(self.sizes.keys() - set(self.clients)):
            raise ValueError(f"sizes: {unknown[0]} is no client of a department")
        if len(set(self.all_sizes)) > 1 and self.rule not in ("flora", "flexlora"):
            raise ValueError(
                f"sizes: {self.rule} needs adapters of one size; take flora or flexlora, or leave "
                "sizes out"
            )
        if self.optimiser.name != "fedavg" and self.rule in ("flora", "flexlora"):
            raise ValueError(
                f"optimiser: {self.optimiser.name} steps from the last factors, which {self.rule} "
                "does not keep; take fedavg, ffa, fedsa or fedex"
            )
        own_rule = self.robust and self.robust.name in ("trimmed_mean", "median")
        if self.robust and own_rule and self.rule != "fedavg":
            raise ValueError(
                f"robust: {self.robust.name} is a rule of its own for A and B; leave `rule` as "
                "fedavg"
            )
        self._check_robust()
        self._check_privacy()
        self._check_mixing()
        return self

    def _check_robust(self) -> None:
        """Refuse what could never move an adapter: a group too small for the rule."""
        if self.robust is None or self.robust.name not in ("krum", "trimmed_mean"):
            return
        needed = 2 * self.robust.num_hostile + (3 if self.robust.name == "krum" else 1)
        for group, names in self.groups.items():
            if len(names) < needed:
                raise ValueError(
                    f"robust: {self.robust.name} needs {needed} answers to tell "
                    f"{self.robust.num_hostile} hostile ones, and {group} has {len(names)} "
                    "clients; lower num_hostile, or take clipping"
                )

    def _check_privacy(self) -> None:
        if self.privacy is None:
            return
        if self.rule not in ("fedavg", "ffa"):
            raise ValueError(
                f"privacy: {self.rule} has no bound on what one client changes; take fedavg or ffa"
            )
        if self.robust:
            raise ValueError(
                f"privacy: clips each client's change itself and needs their plain sum; leave "
                f"{self.robust.name} of robust out"
            )
        if self.privacy.delta >= 1 / len(self.clients):
            raise ValueError(
                f"privacy.delta: expected less than 1 / {len(self.clients)} clients, found "
                f"{self.privacy.delta:g}; so large a chance allows to publish a client; take 1e-5"
            )

    def _check_mixing(self) -> None:
        if self.mixing is None:
            return
        if self.share != "department" or len(self.departments) < 2:
            raise ValueError(
                "mixing: expected at least two departments with an adapter each, found one adapter "
                "for all; leave share as department, or mixing out"
            )
        if self.rule not in ("fedavg", "ffa"):
            raise ValueError(
                f"mixing: factors of {self.rule} mean nothing to another department; take fedavg "
                "or ffa"
            )
        if (self.mixing.num_clusters or 1) >= len(self.departments):
            raise ValueError(
                f"mixing.num_clusters: expected fewer than the {len(self.departments)} "
                f"departments, found {self.mixing.num_clusters}; with one each nothing is mixed"
            )

    @property
    def clients(self) -> tuple[str, ...]:
        """All clients, department by department."""
        return tuple(name for names in self.departments.values() for name in names)

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Group -> the clients that have an adapter in common."""
        return self.departments if self.share == "department" else {ORGANISATION: self.clients}

    @property
    def sent(self) -> tuple[Factor, ...]:
        """The factors that clients send."""
        return NEEDED.get(self.rule, BOTH)

    @property
    def all_sizes(self) -> tuple[Size, ...]:
        """The sizes of adapters, that of `training` first; each once."""
        return tuple(dict.fromkeys(self.size_of(name) for name in ("", *self.clients)))

    def size_of(self, client: str) -> Size:
        lora = self.sizes.get(client, self.training)
        return Size(lora.rank, lora.alpha)

    def department_of(self, client: str) -> str:
        return next(d for d, names in self.departments.items() if client in names)
