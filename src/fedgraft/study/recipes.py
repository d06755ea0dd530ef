"""The file of a study of lineages: models that are made from one another, and which are scored.

    base ──────────────── pretrain ──> newer ── graft ──> moved
      ├── tune ──> instruct ─── residual ─────────┘
      └── fresh ──> stranger

    models:
      base: pocket:base                                 a checkpoint as it comes, or
                                                        { checkpoint: ..., shape: {...} }
      newer: { from: base, pretrain: {...} }            reads on: the departments' text, or `texts`
      instruct: { from: base, tune: {...} }             learns the answers of dialogues
      moved: { from: newer, graft: { residual: [base, instruct] } }
      stranger: { from: base, fresh: {...} }            random weights of its build

A recipe does one thing. `newer@50000` is the checkpoint that `newer` left at one of its `budgets`.

A recipe is refused where arithmetic would be without meaning: the two sides of a residual are a
model and one made from it, a residual is added to what was made from its first side, and once.
Studies that ask what happens otherwise say so: `any_parent: true`, `again: true`.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from fedgraft.errors import EvaluationError
from fedgraft.evaluation.benchmarks import chosen
from fedgraft.evaluation.scorecard import FOLLOWED
from fedgraft.models import Precision
from fedgraft.study.cost import Prices
from fedgraft.study.selection import Source
from fedgraft.study.shape import Shape
from fedgraft.study.study import EvaluationPart, Form, Part, Replay, StudyFile, Texts
from fedgraft.training.settings import PretrainSettings
from fedgraft.weights.merging import PLAIN, Factors, Method

Name = Annotated[str, Field(pattern=r"^\w[\w. +-]*$")]
"""Of a model, a text, examples."""
Verb = Literal["pretrain", "tune", "graft", "fresh"]
VERBS: tuple[Verb, ...] = ("pretrain", "tune", "graft", "fresh")


class Came(Part):
    """A checkpoint as it comes."""

    checkpoint: str
    shape: Shape | None = None
    """Its sizes from config.json, for planning before it is fetched."""


class Reading(PretrainSettings):
    """A model reads on."""

    texts: dict[Name, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Of the study's `texts`, each with its share of the rows; the text of all departments, and
    the study's replay, where empty."""
    replay: float | None = Field(default=None, ge=0, lt=1)
    """Share of the study's old text; that of `replay` where None."""


class Lesson(PretrainSettings):
    """A model learns the answers of dialogues."""

    examples: tuple[Name, ...] = Field(min_length=1)
    """Of the study's `examples`."""
    max_examples: int | None = Field(default=None, gt=0)
    """At most so many of each, the first by hash, so that fewer are a part of more."""


class Addition(Part):
    """A residual is added."""

    residual: tuple[str, str]
    """Two models: second - first."""
    scale: float = 1.0
    method: Method = PLAIN
    factors: Factors = Factors()
    form: Form | None = None
    """The residual is stored in that form first; as it is where None."""
    any_parent: bool = False
    """The models need not be made from one another."""
    again: bool = False
    """The target may have instructions already."""

    @property
    def is_plain(self) -> bool:
        """Whether the whole residual is added once, as it is: what forecasts were learned from."""
        varied = self.factors != Factors() or self.method != PLAIN or self.form
        return not varied and self.scale == 1 and not self.again


class Sizes(Part):
    """Sizes of a model, as config.json names them; those left out are as they were."""

    hidden_size: int | None = Field(default=None, gt=0)
    intermediate_size: int | None = Field(default=None, gt=0)
    num_hidden_layers: int | None = Field(default=None, gt=0)
    num_attention_heads: int | None = Field(default=None, gt=0)
    num_key_value_heads: int | None = Field(default=None, gt=0)


class Recipe(Part):
    """How a model is made from another one: by one thing that is done to it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True
    )

    parent: str = Field(alias="from")
    pretrain: Reading | None = None
    tune: Lesson | None = None
    graft: Addition | None = None
    fresh: Sizes | None = None
    once: bool = False
    """Made with the first seed alone, for all seeds."""

    @model_validator(mode="after")
    def _does_one_thing(self) -> "Recipe":
        done = [verb for verb in VERBS if getattr(self, verb) is not None]
        if len(done) != 1:
            raise ValueError(
                f"expected one of {', '.join(VERBS)}, found {' and '.join(done) or 'none'}; "
                "a recipe does one thing, make a model for each"
            )
        return self

    @field_validator("pretrain", "tune")
    @classmethod
    def _seedless(cls, settings: PretrainSettings | None) -> PretrainSettings | None:
        if settings and "seed" in settings.model_fields_set:
            raise ValueError("the seed comes from `seeds`; take it out here")
        return settings

    @property
    def verb(self) -> Verb:
        return next(verb for verb in VERBS if getattr(self, verb) is not None)

    @property
    def training(self) -> Reading | Lesson | None:
        """How it trains; None where nothing is trained."""
        return self.pretrain or self.tune

    @property
    def made_of(self) -> tuple[str, ...]:
        """The models that it needs."""
        return (self.parent, *(self.graft.residual if self.graft else ()))


class Examples(Source):
    """Dialogues that models are tuned on; those that are longer than a row are passed over."""

    scored: int = Field(default=0, ge=0)
    """So many, the first by hash, are never tuned on: their answers are scored, and those of the
    first as many that may be tuned on."""


class Asked(Part):
    """What every arm is asked."""

    test: str
    groups: tuple[str, ...] | None = Field(default=None, min_length=1)
    """The groups that count; all where None."""


class Benchmarks(Part):
    """The paper's benchmarks, through lm-evaluation-harness; see `evaluation.harness`."""

    data: str | None = None
    """A folder with their files; None for the hub."""
    names: tuple[str, ...] = ()
    """Of the paper's suite; all where empty."""
    limit: int | None = Field(default=None, ge=2)
    """First questions of each, of MMLU and MMLU-Pro of each subject; all where None."""
    chat_template: bool = False
    """Of every arm alike: questions as turns of a chat, with the template of the tokenizer that
    stands beside each model."""
    fit: bool = False
    """Where a model's context is too short: fewer shots, shorter answers, cut questions; told."""
    precision: Precision = "float32"
    backend: Literal["transformers", "vllm"] = "transformers"
    batch_size: int | None = Field(default=None, gt=0)
    """Found by itself where None."""

    @field_validator("names")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        try:
            chosen(names)
        except EvaluationError as error:
            raise ValueError(str(error)) from error
        return names


class Arm(Part):
    """A model that is scored."""

    words: str
    """What it is, for the report."""
    line: Name | None = None
    """Of the plot over `axis`; its place there is `at`."""
    at: float | None = None

    @model_validator(mode="after")
    def _has_a_place(self) -> "Arm":
        if (self.line is None) != (self.at is None):
            raise ValueError("line and at: expected both or neither, found one; add the other")
        return self


def _in_words(value: Any) -> Any:
    return {"words": value} if isinstance(value, str) else value


def _as_it_comes(value: Any) -> Any:
    """A name is a checkpoint as it comes; a mapping is told apart by its keys, so that the faults
    of one kind are told alone."""
    if isinstance(value, str):
        return Came(checkpoint=value)
    if isinstance(value, Mapping):
        kind = Came if "checkpoint" in value else Recipe
        return kind.model_validate(value)
    return value


class LineageStudy(StudyFile):
    """Everything that a study of lineages needs; read from YAML."""

    noun = "study of lineages"
    brief = True

    models: dict[Name, Annotated[Came | Recipe, BeforeValidator(_as_it_comes)]] = Field(
        min_length=1
    )
    shape: Shape | None = None
    """Sizes of the models as they come that say nothing of their own, for planning before they are
    fetched."""
    tokenizer: Name | None = None
    """The model, as it comes, whose tokenizer and chat template all models are trained and asked
    with; where None, the last side of the first residual, or the first model."""
    departments: dict[str, Texts] = Field(default_factory=dict)
    """New text; held-out documents of each are scored."""
    texts: dict[Name, Texts] = Field(default_factory=dict)
    """Other text that models may read."""
    replay: Replay | None = None
    examples: dict[Name, Examples] = Field(default_factory=dict)
    dialogues: Asked | None = None
    questions: Asked | None = None
    benchmarks: Benchmarks | None = None
    arms: dict[str, Annotated[Arm, BeforeValidator(_in_words)]] = Field(min_length=1)
    against: str | None = None
    """The arm that the others are compared with."""
    score: str = FOLLOWED
    """What the verdict speaks of, where it was taken."""
    axis: str = ""
    """What `at` of the arms counts."""
    row_length: int = Field(default=256, ge=16)
    seeds: tuple[int, ...] = Field(default=(1,), min_length=1)
    evaluation: EvaluationPart = EvaluationPart()
    prices: Prices | None = None
    """Of the device that runs it, for money and energy in plan and report."""

    @property
    def kind(self) -> Literal["lineage"]:
        return "lineage"

    @model_validator(mode="after")
    def _consistent(self) -> "LineageStudy":
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds are given twice in {list(self.seeds)}")
        for find in (self._unknown, self._circles, self._amiss):  # each needs the one before
            if faults := list(find()):
                raise ValueError("\n    ".join(faults))
        return self

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The models that are made, in an order in which they can be."""
        made: dict[str, Recipe] = {}
        waiting = {name: one for name, one in self.models.items() if isinstance(one, Recipe)}
        while waiting:
            ready = [
                name
                for name, one in waiting.items()
                if not {model_of(ref) for ref in one.made_of} & waiting.keys()
            ]
            if not ready:
                break
            made |= {name: waiting.pop(name) for name in ready}
        return made

    @property
    def checkpoints(self) -> dict[str, str]:
        """The models that come as they are."""
        came = {name: one for name, one in self.models.items() if isinstance(one, Came)}
        return {name: one.checkpoint for name, one in came.items()}

    def shape_of(self, name: str) -> Shape | None:
        """What the file says of the sizes of a model as it comes."""
        came = self.models[name]
        return (came.shape if isinstance(came, Came) else None) or self.shape

    @property
    def speaker(self) -> str:
        """The model as it comes whose tokenizer all are trained and asked with."""
        if self.tokenizer:
            return self.tokenizer
        sides = [one.graft.residual[1] for one in self.recipes.values() if one.graft]
        return self.root(model_of(sides[0])) if sides else next(iter(self.checkpoints))

    def root(self, name: str) -> str:
        """The model as it comes that a model goes back to."""
        while isinstance(recipe := self.models[name], Recipe):
            name = model_of(recipe.parent)
        return name

    def ancestors(self, ref: str) -> Iterator[str]:
        """What a model was trained from, and grafted onto, itself first; random weights have none.

        A checkpoint that was left on the way is no ancestor of what came after it.
        """
        yield ref
        recipe = self.models[model_of(ref)]
        if isinstance(recipe, Recipe) and not recipe.fresh:
            yield from self.ancestors(recipe.parent)

    def has_instructions(self, ref: str) -> bool:
        """Whether a model was tuned or grafted, or is the instruct side of a residual, or comes
        from one that was."""
        grafts = [one.graft for one in self.recipes.values() if one.graft]
        instruct = {model_of(one.residual[1]) for one in grafts}
        lineage = [model_of(one) for one in self.ancestors(ref)]
        known = [self.recipes[name] for name in lineage if name in self.recipes]
        return not instruct.isdisjoint(lineage) or any(one.tune or one.graft for one in known)

    def is_seeded(self, ref: str) -> bool:
        """Whether each seed makes another one."""
        recipe = self.models[model_of(ref)]
        if not isinstance(recipe, Recipe) or recipe.once:
            return False
        return not recipe.graft or any(map(self.is_seeded, recipe.made_of))

    def is_passing(self, name: str) -> bool:
        """Whether a model is a graft that no other is made of: it goes once it is scored."""
        recipe = self.models.get(name)
        used = {model_of(ref) for one in self.recipes.values() for ref in one.made_of}
        return isinstance(recipe, Recipe) and recipe.graft is not None and name not in used

    def wanted(self, examples: str) -> int:
        """How many of some examples are tuned on at most, in any recipe."""
        own = self.examples[examples].max_examples or sys.maxsize
        lessons = [one.tune for one in self.recipes.values() if one.tune]
        asked = [one.max_examples or sys.maxsize for one in lessons if examples in one.examples]
        return min(own, max(asked, default=sys.maxsize))

    @property
    def _every_recipe(self) -> dict[str, Recipe]:
        return {name: one for name, one in self.models.items() if isinstance(one, Recipe)}

    def _unknown(self) -> Iterator[str]:
        """Names that stand for nothing."""
        places = {f"models.{name}": one.made_of for name, one in self._every_recipe.items()}
        places["arms"] = tuple(self.arms)
        for where, refs in places.items():
            for ref in refs:
                name, at, budget = ref.partition("@")
                recipe = self.models.get(name)
                settings = recipe.training if isinstance(recipe, Recipe) else None
                budgets = [str(one) for one in settings.budgets] if settings else []
                if recipe is None:
                    yield f"{where}: {name} is no model; known are {', '.join(self.models)}"
                elif at and budget not in budgets:
                    yield (
                        f"{where}: {name} leaves no checkpoint at {budget or 'nothing'}; its "
                        f"budgets are {', '.join(budgets) or 'none'}"
                    )
        for name, one in self._every_recipe.items():
            for key, used, known in (
                ("texts", one.pretrain.texts if one.pretrain else (), self.texts),
                ("examples", one.tune.examples if one.tune else (), self.examples),
            ):
                if missing := [item for item in used if item not in known]:
                    yield (
                        f"models.{name}: {missing[0]} is none of the study's `{key}` "
                        f"({', '.join(known) or 'there are none'}); name one"
                    )
        if not self.checkpoints:
            yield "models: expected a checkpoint as it comes among them, found none; name one"
        if self.tokenizer and self.tokenizer not in self.checkpoints:
            yield f"tokenizer: {self.tokenizer} is no model as it comes; name one"
        if self.against and self.against not in self.arms:
            yield f"against: {self.against} is none of the arms; score it, or name another"

    def _circles(self) -> Iterator[str]:
        stuck = [name for name in self._every_recipe if name not in self.recipes]
        if stuck:
            yield f"models: {', '.join(stuck)} are made of each other, in a circle; break it"

    def _amiss(self) -> Iterator[str]:
        """What is without meaning, or never used."""
        needed = {model_of(ref) for arm in self.arms for ref in self._whole_line(arm)}
        for name, one in self._every_recipe.items():
            if name not in needed:
                yield f"models.{name}: nothing that is scored is made of it; take it out"
            if one.pretrain and not (one.pretrain.texts or self.departments):
                yield f"models.{name}: there is no text to read; add `departments` or `texts`"
            if one.pretrain and one.pretrain.replay and not self.replay:
                yield f"models.{name}: there is no old text; add `replay`, or take it out here"
            if one.pretrain and one.pretrain.texts and one.pretrain.replay is not None:
                yield f"models.{name}: replay is for the departments' text; name it in `texts`"
            if one.once and any(map(self.is_seeded, one.made_of)):
                yield f"models.{name}: made once, but of a model that each seed makes anew"
            if one.graft:
                yield from (f"models.{name}: {fault}" for fault in self._unsound(one))
        scored = self.departments or self.dialogues or self.questions or self.benchmarks
        if not scored and not any(one.scored for one in self.examples.values()):
            yield "nothing is scored; add departments, dialogues, questions or benchmarks"
        if any(arm.at is not None for arm in self.arms.values()) and not self.axis:
            yield "axis: arms have a place on it; say what it counts"

    def _whole_line(self, ref: str) -> Iterator[str]:
        """A model and everything that it is made of."""
        yield ref
        recipe = self.models[model_of(ref)]
        for part in recipe.made_of if isinstance(recipe, Recipe) else ():
            yield from self._whole_line(part)

    def _unsound(self, recipe: Recipe) -> Iterator[str]:
        """Why a residual cannot be taken, or added to a model."""
        added = recipe.graft
        assert added
        first, second = added.residual
        if first == second:
            yield f"the residual of {first} with itself is nothing; name two models"
            return
        as_they_come = {first, second} <= self.checkpoints.keys()
        if not added.any_parent:
            remedy = "correct it, or ask for it with `any_parent: true`"
            if not as_they_come and first not in self.ancestors(second):
                yield f"{second} was not made from {first}, so they are no family; {remedy}"
            if first not in self.ancestors(recipe.parent):
                yield f"{recipe.parent} was not made from {first}, the residual's base; {remedy}"
        line = list(self.ancestors(recipe.parent))
        grafted = [ref for ref in line if self._is_graft(ref)]
        if not added.again and (second in line or grafted):
            having = second if second in line else grafted[0]
            yield (
                f"{recipe.parent} has the instructions of {having} already; graft onto what came "
                "before, or ask for it with `again: true`"
            )

    def _is_graft(self, ref: str) -> bool:
        recipe = self.models[model_of(ref)]
        return isinstance(recipe, Recipe) and recipe.graft is not None


def model_of(ref: str) -> str:
    """The model that `newer@50000` is a checkpoint of."""
    return ref.partition("@")[0]


def budget_of(ref: str) -> int | None:
    """The budget of a checkpoint on the way; None for where the model ends."""
    budget = ref.partition("@")[2]
    return int(budget) if budget else None


def settings_of(part: Reading | Lesson) -> PretrainSettings:
    """How a recipe trains, without what it trains on."""
    own = part.model_dump(include=set(PretrainSettings.model_fields))
    return PretrainSettings.model_validate(own)


def in_words(recipe: Recipe) -> str:
    """What is done: `reads 400,000 tokens at rate 0.0004`."""
    settings = recipe.training
    if settings:
        words = f"{settings.num_tokens:,} tokens at rate {settings.learning_rate:g}"
        if settings.lora:
            words += f", LoRA of rank {settings.lora.rank}"
        if recipe.pretrain:
            named = ", ".join(f"{name} {share:g}" for name, share in recipe.pretrain.texts.items())
            return f"reads {words}" + (f" of {named}" if named else "")
        assert recipe.tune
        limit = f" (at most {recipe.tune.max_examples:,})" if recipe.tune.max_examples else ""
        return f"tuned on {' and '.join(recipe.tune.examples)}{limit}: {words}"
    if recipe.graft:
        return f"plus {_added_in_words(recipe.graft)}"
    assert recipe.fresh
    sizes = [f"{key} {size}" for key, size in recipe.fresh.model_dump(exclude_none=True).items()]
    return "random weights of its build" + "".join(f", {size}" for size in sizes)


def _added_in_words(added: Addition) -> str:
    first, second = added.residual
    return ", ".join([f"{added.scale:g} x ({second} - {first})", *_variations(added)])


def _variations(added: Addition) -> Iterable[str]:
    """What is not as it is by default."""
    method = added.method.model_dump(exclude_defaults=True)
    if method:
        yield " ".join([method.pop("name", "plain"), *(f"{k} {v:g}" for k, v in method.items())])
    if added.form:
        yield added.form.words
    yield from (f"{kind} x {factor:g}" for kind, factor in added.factors.kinds.items())
    for span in added.factors.layers:
        yield f"layers {span.first} to {span.last} x {span.factor:g}"
