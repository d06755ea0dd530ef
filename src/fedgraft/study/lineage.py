"""A study of lineages: models are made from one another by recipes, and the arms among them scored.

    for each seed, for each arm, whatever it is made of first:

        pretrain  a model reads on            tune   it learns the answers of dialogues
        graft     a residual is added         fresh  random weights of its build

A model that no seed changes is made, and scored, once. A graft that nothing else is made of is
scored and goes. Before a plain graft is asked anything, its residual is inspected beside what
became of the target; what that promised stands in the result beside what came of it.

The file: `study.recipes`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedgraft.errors import StudyError
from fedgraft.evaluation.benchmarks import PAPER_ROWS, chosen
from fedgraft.evaluation.knowledge import load_questions
from fedgraft.evaluation.scorecard import FOLLOWED, RESPONSE_NATS, RIGHT_AND_FOLLOWED, Scorecard
from fedgraft.models import fresh_model, open_model, open_tokenizer, save_model
from fedgraft.provenance import Record, derive_seed, hash_files, hash_json, new_artefact
from fedgraft.study.comparison import compare, summarise, told_of
from fedgraft.study.cost import graft_flops
from fedgraft.study.estimate import estimate
from fedgraft.study.material import (
    asked,
    at_equal_distances,
    first_by_hash,
    hash_documents,
    load_texts,
    split_texts,
)
from fedgraft.study.recipes import (
    Addition,
    Benchmarks,
    Examples,
    LineageStudy,
    Recipe,
    budget_of,
    in_words,
    model_of,
    settings_of,
)
from fedgraft.study.result import (
    NEW_FACTS,
    OLD_FACTS,
    ArmResult,
    Comparison,
    Forecast,
    Lineages,
    Made,
    Summary,
)
from fedgraft.study.run import Stages, versions
from fedgraft.study.selection import load_source
from fedgraft.study.stage import Say, model_hash, run_stage
from fedgraft.text.corpus import Document
from fedgraft.text.dialogues import Dialogue, encode, load_dialogues, pack_dialogues
from fedgraft.text.packing import Rows, mix, pack
from fedgraft.training.pretrain import budget_path
from fedgraft.weights.checkpoint import Checkpoint
from fedgraft.weights.family import Family, anatomy_of
from fedgraft.weights.graft import graft
from fedgraft.weights.inspection import KEPT, Inspection, inspect
from fedgraft.weights.residual import Residual, extract

INSPECTION = "inspection.json"
WORDS = {
    FOLLOWED: "prompts followed in full",
    RIGHT_AND_FOLLOWED: "prompts answered right and as instructed",
    NEW_FACTS: "new facts known, asked in chat",
    OLD_FACTS: "old facts known, asked in chat",
}
"""Of scores, for the verdict; others are named as they are."""
TUNED_ON = ", tuned on"
"""Behind the name of examples: those that models were tuned on, not those held out."""


def run(
    study: LineageStudy, out: Path, *, say: Say = lambda _: None, num_processes: int = 1
) -> Lineages:
    """Make every model and score every arm for every seed, and write `result.json` into `out`.

    Finished stages are kept: after an interruption, or with more seeds, the same call goes on.

    Raises StudyError for models whose tokens have other ids, for examples of which none is left,
    and as stages do.
    """
    _Lineages(study, out, say, num_processes).everything()
    return Lineages.load(out)


def parted(
    dialogues: Iterable[Dialogue], num_scored: int, fits: Callable[[Dialogue], bool], limit: int
) -> tuple[list[Dialogue], list[Dialogue], int]:
    """Dialogues to be scored, and at most `limit` to be tuned on; no prompt stands in both.

    Both in an order by the hash of their prompt, which depends on nothing else; of one prompt one
    is scored. Those that do not fit are passed over, and counted last.
    """
    prompts: dict[str, list[Dialogue]] = {}
    for dialogue in dialogues:
        told = dialogue.answered()
        prompt = hash_json([message.model_dump() for message in told.messages[:-1]])
        prompts.setdefault(prompt, []).append(told)
    scored: list[Dialogue] = []
    others: list[Dialogue] = []
    num_left_out = 0
    for prompt in sorted(prompts):
        if len(others) >= limit:
            break
        fitting = [dialogue for dialogue in prompts[prompt] if fits(dialogue)]
        num_left_out += len(prompts[prompt]) - len(fitting)
        if len(scored) < num_scored:
            scored += fitting[:1]
        else:
            others += fitting
    return scored, others[:limit], num_left_out


class _Lineages(Stages):
    """One run of a study of lineages."""

    def __init__(self, study: LineageStudy, out: Path, say: Say, num_processes: int) -> None:
        super().__init__(out, say, num_processes)
        self.study = study
        self.opened = {name: Checkpoint.open(path) for name, path in study.checkpoints.items()}
        speaker = self.opened[study.speaker]
        self.tokenizer = open_tokenizer(speaker.path)
        self._check_tokens()
        self.hashes = {one.path: model_hash(one, speaker) for one in self.opened.values()}
        self._load_texts()
        self.num_left_out: dict[str, int] = {}
        self.examples = {name: self._examples(name, one) for name, one in study.examples.items()}
        self.made: dict[tuple[str, int | None], Path] = {}
        self.residuals: dict[tuple[str, str, int | None], Residual] = {}
        self.forms: dict[Path, Residual] = {}
        self.inspected: dict[Path, Inspection] = {}

    def everything(self) -> None:
        study = self.study
        estimates = estimate(self.study, self.out, say=self.say, num_processes=self.num_processes)
        cards: dict[str, list[Scorecard]] = {arm: [] for arm in study.arms}
        inspections: dict[tuple[str, int | None], Inspection] = {}
        for seed in study.seeds:
            for arm in study.arms:
                own = seed if study.is_seeded(arm) else None
                if own is None and cards[arm]:
                    continue
                found = self._inspect(arm, seed)
                if found:
                    inspections[arm, own] = found
                cards[arm].append(self._score(arm, seed))
        summary = summarise(card for found in cards.values() for card in found)
        pairs = [(arm, study.against) for arm in cards if study.against and arm != study.against]
        comparisons = compare(cards, pairs, score=study.score)
        lines = _lines(study)
        forecasts = tuple(self._forecasts(inspections, cards))
        Lineages(
            name=study.name,
            question=study.question,
            verdict=verdict(study, summary, comparisons, lines, forecasts),
            seeds=study.seeds,
            models={name: self._made(name) for name in study.models},
            arms=tuple(
                ArmResult(arm=arm, words=study.arms[arm].words, scorecards=tuple(found))
                for arm, found in cards.items()
            ),
            summary=summary,
            score=study.score,
            against=study.against,
            comparisons=comparisons,
            axis=study.axis,
            lines=lines,
            forecasts=forecasts,
            num_left_out=self.num_left_out,
            residual=self._residual_facts(),
            losses=self.losses,
            learning_rates=self.learning_rates,
            estimates=estimates,
            costs=tuple(self.costs),
            prices=study.prices,
            settings=study.as_written,
            inputs=self._inputs(),
            versions=versions(),
        ).write(self.out)

    def _load_texts(self) -> None:
        """What is read, and what is asked; nothing that is scored is read."""
        study = self.study
        self.splits = {n: split_texts("department", n, t) for n, t in study.departments.items()}
        held_out = {d.hash for s in self.splits.values() for d in (*s.validation, *s.test)}

        def others(documents: Iterable[Document]) -> tuple[Document, ...]:
            return tuple(document for document in documents if document.hash not in held_out)

        self.texts = {name: others(load_texts(t).documents) for name, t in study.texts.items()}
        self.replay = others(load_texts(study.replay).documents) if study.replay else ()
        self.new = tuple(document for split in self.splits.values() for document in split.train)
        limit = study.evaluation.max_documents
        self.held_out = {n: first_by_hash(split.test, limit) for n, split in self.splits.items()}
        self.dialogues: Sequence[Dialogue] = ()
        if study.dialogues:
            rows = asked(load_dialogues, study.dialogues.test, study.dialogues.groups)
            self.dialogues = at_equal_distances(rows, study.evaluation.max_dialogues)
        self.questions = (
            asked(load_questions, study.questions.test, study.questions.groups)
            if study.questions
            else ()
        )

    def _examples(self, name: str, source: Examples) -> tuple[list[Dialogue], list[Dialogue]]:
        """Those that are scored, and those that may be tuned on, as many as any recipe asks for."""
        row = self.study.row_length

        def fits(dialogue: Dialogue) -> bool:
            return len(encode(self.tokenizer, dialogue)[0]) <= row

        scored, others, left_out = parted(
            load_source(source), source.scored, fits, self.study.wanted(name)
        )
        self.num_left_out[name] = left_out
        if left_out:
            self.say(
                f"{name}: {left_out:,} dialogues are longer than a row of {row} tokens and are "
                f"left out; {len(scored) + len(others):,} are taken"
            )
        if not others:
            raise StudyError(
                f"examples.{name}: expected dialogues to tune on that fit a row of {row} tokens, "
                f"found {len(scored)}, of which {source.scored} are to be scored; choose longer "
                "rows, or score fewer"
            )
        return scored, others

    def _check_tokens(self) -> None:
        """Refuse models in which a token has another id: what is packed once, all of them read."""
        speaker = self.study.speaker
        ids = anatomy_of(self.opened[speaker]).vocabulary.ids
        for name, checkpoint in self.opened.items():
            for token, own in anatomy_of(checkpoint).vocabulary.ids.items():
                if ids.get(token, own) != own:
                    raise StudyError(
                        f"models.{name}: expected the ids of {speaker}, with whose tokenizer all "
                        f"models are asked, found {token!r} with id {own} instead of {ids[token]}; "
                        "compare models of one tokenizer in a study"
                    )

    def _place(self, name: str, seed: int) -> Path:
        """Of a model's stage, below the output."""
        return Path(f"seed-{seed}", name) if self.study.is_seeded(name) else Path("models", name)

    def _title(self, name: str, seed: int, words: str) -> str:
        return f"seed {seed}: {words} {name}" if self.study.is_seeded(name) else f"{words} {name}"

    def _stage(self, name: str, seed: int) -> str:
        """A model's name among costs and losses."""
        return f"{name}, seed {seed}" if self.study.is_seeded(name) else name

    def _own(self, ref: str, seed: int) -> int | None:
        return seed if self.study.is_seeded(ref) else None

    def _model(self, ref: str, seed: int) -> Path:
        """Where a model stands, after it was made."""
        name, budget = model_of(ref), budget_of(ref)
        if name in self.opened:
            return self.opened[name].path
        key = name, self._own(name, seed)
        if key not in self.made:
            self.made[key] = self._make(name, seed)
        return budget_path(self.made[key], budget) if budget else self.made[key]

    def _make(self, name: str, seed: int) -> Path:
        recipe = self.study.models[name]
        assert isinstance(recipe, Recipe)
        if not self.study.is_seeded(name):
            seed = self.study.seeds[0]
        if recipe.graft:
            return self._graft(name, recipe, seed)
        if recipe.fresh:
            return self._fresh(name, recipe, seed)
        return self._read(name, recipe, seed) if recipe.pretrain else self._tune(name, recipe, seed)

    def _read(self, name: str, recipe: Recipe, seed: int) -> Path:
        reading = recipe.pretrain
        assert reading
        study, settings = self.study, settings_of(reading)
        if reading.texts:
            texts = {text: self.texts[text] for text in reading.texts}
            return self.train(
                self._model(recipe.parent, seed),
                lambda: self._mixed(texts, reading.texts, settings.num_tokens, seed),
                settings,
                self._place(name, seed),
                text=hash_json([hash_documents(*texts.values()), reading.texts]),
                row_length=study.row_length,
                seed=seed,
                stage=self._stage(name, seed),
                title=self._title(name, seed, "pre-train"),
            )
        share = reading.replay
        if share is None:
            share = study.replay.share if study.replay else 0.0
        old = self.replay if share else ()
        return self.train(
            self._model(recipe.parent, seed),
            lambda: self._packed(self.new, seed),
            settings,
            self._place(name, seed),
            text=hash_documents(self.new, old),
            row_length=study.row_length,
            seed=seed,
            replay=(lambda: self._packed(old, seed)) if old else None,
            replay_share=share,
            stage=self._stage(name, seed),
            title=self._title(name, seed, "pre-train"),
        )

    def _tune(self, name: str, recipe: Recipe, seed: int) -> Path:
        lesson = recipe.tune
        assert lesson
        chosen = [
            dialogue
            for source in lesson.examples
            for dialogue in self.examples[source][1][: lesson.max_examples]
        ]
        return self.train(
            self._model(recipe.parent, seed),
            lambda: pack_dialogues(self.tokenizer, chosen, self.study.row_length, seed=seed),
            settings_of(lesson),
            self._place(name, seed),
            text=hash_json([dialogue.model_dump() for dialogue in chosen]),
            row_length=self.study.row_length,
            seed=seed,
            stage=self._stage(name, seed),
            title=self._title(name, seed, "tune"),
            tokenizer=self.tokenizer,
        )

    def _fresh(self, name: str, recipe: Recipe, seed: int) -> Path:
        assert recipe.fresh
        like = self._model(recipe.parent, seed)
        sizes = recipe.fresh.model_dump(exclude_none=True)
        settings = {**sizes, "seed": derive_seed(seed, "fresh", name)}

        def make(folder: Path) -> None:
            model = fresh_model(like, sizes, seed=settings["seed"])
            with new_artefact(folder / "model") as partial:
                save_model(model, open_tokenizer(like), partial)
                Record.make("checkpoint", settings=settings).write(partial)

        place = self._place(name, seed)
        record = run_stage(
            self.out / place,
            title=self._title(name, seed, "random weights for"),
            inputs={"like": self.hash_of(like)},
            settings=settings,
            make=make,
            say=self.say,
        )
        self.cost(self._stage(name, seed), record)
        return self.out / place / "model"

    def _graft(self, name: str, recipe: Recipe, seed: int) -> Path:
        target, residual = self._parts(recipe, seed)
        place = self._place(name, seed)

        def make(folder: Path) -> dict[str, Any]:
            _add(recipe, target, residual, folder / "model")
            return {"flops": graft_flops(_num_parameters(residual))}

        record = run_stage(
            self.out / place,
            title=self._title(name, seed, "graft"),
            inputs={"model": self.hash_of(target), "residual": residual.content_hash},
            settings=_added(recipe),
            make=make,
            say=self.say,
        )
        self.cost(self._stage(name, seed), record)
        return self.out / place / "model"

    def _parts(self, recipe: Recipe, seed: int) -> tuple[Path, Residual]:
        """The target of a graft, and the residual in the form that is added."""
        assert recipe.graft
        return self._model(recipe.parent, seed), self._residual(recipe.graft, seed)

    def _residual(self, added: Addition, seed: int, *, in_form: bool = True) -> Residual:
        first, second = added.residual
        own = seed if any(map(self.study.is_seeded, added.residual)) else None
        place = Path(
            "residuals" if own is None else f"seed-{seed}/residuals", f"{second}, less {first}"
        )
        key = first, second, own
        if key not in self.residuals:
            self.residuals[key] = self._extract(added, seed, place, own)
        whole = self.residuals[key]
        if added.form is None or not in_form:
            return whole
        small = place.with_name(f"{place.name}, {added.form.words}")
        if small not in self.forms:
            self.forms[small] = self.compress(whole, added.form, small)
        return self.forms[small]

    def _extract(self, added: Addition, seed: int, place: Path, own: int | None) -> Residual:
        base, instruct = (self._model(ref, seed) for ref in added.residual)

        def make(folder: Path) -> None:
            extract(Family.open(base, instruct), folder / "residual")

        words = f"{added.residual[1]} - {added.residual[0]}"
        record = run_stage(
            self.out / place,
            title=("" if own is None else f"seed {own}: ") + f"extract {words}",
            inputs={"base": self.hash_of(base), "instruct": self.hash_of(instruct)},
            settings={},
            make=make,
            say=self.say,
        )
        self.cost(place.as_posix(), record)
        return Residual.open(self.out / place / "residual")

    def _inspect(self, arm: str, seed: int) -> Inspection | None:
        """What a graft's residual is like beside what became of its target, before it is asked.

        None for what is no plain graft, and for a target that has instructions already: nothing
        was learned of these.
        """
        recipe = self.study.models[model_of(arm)]
        if not isinstance(recipe, Recipe) or not recipe.graft:
            return None
        added = recipe.graft
        if not added.is_plain or self.study.has_instructions(recipe.parent):
            return None
        residual = self._residual(added, seed, in_form=False)
        base, target = self._model(added.residual[0], seed), self._model(recipe.parent, seed)

        def make(folder: Path) -> None:
            found = inspect(residual, base, newer_base=target)
            (folder / INSPECTION).write_text(found.model_dump_json(indent=1), encoding="utf-8")

        own = self._own(model_of(arm), seed)
        name = f"{added.residual[1]}, less {added.residual[0]}, on {recipe.parent}"
        place = Path("inspections" if own is None else f"seed-{seed}/inspections", name)
        if place not in (known := self.inspected):
            record = run_stage(
                self.out / place,
                title=("" if own is None else f"seed {own}: ") + f"inspect {name}",
                inputs={"residual": residual.content_hash, "target": self.hash_of(target)},
                settings={},
                make=make,
                say=self.say,
            )
            self.cost(place.as_posix(), record)
            known[place] = Inspection.model_validate_json(
                (self.out / place / INSPECTION).read_bytes()
            )
        return known[place]

    def _score(self, arm: str, seed: int) -> Scorecard:
        study, own = self.study, self._own(arm, seed)
        recipe = study.models[model_of(arm)]
        settings: dict[str, Any] = study.evaluation.model_dump()
        if study.benchmarks:
            settings["benchmarks"] = _asked_of(study.benchmarks)
        scored: Path | Callable[[Path], Path]
        if isinstance(recipe, Recipe) and study.is_passing(arm):
            target, residual = self._parts(recipe, seed)
            inputs = {"model": self.hash_of(target), "residual": residual.content_hash}
            settings |= _added(recipe)
            scored = partial(_add_in, recipe, target, residual)
        else:
            scored = self._model(arm, seed)
            inputs = {"model": self.hash_of(scored)}
        card = self.evaluate(
            arm,
            own,
            scored,
            Path("scores", arm + ("" if own is None else f"-seed-{own}")),
            inputs=inputs,
            settings=settings,
            tokenizer=self.tokenizer,
            window=study.evaluation.window,
            max_new_tokens=study.evaluation.max_new_tokens,
            documents=self.held_out,
            dialogues=self.dialogues,
            questions=self.questions,
            responses=self._responses(),
            benchmarks=partial(self._benchmarks, arm, own) if study.benchmarks else None,
            title=f"score {arm}" + ("" if own is None else f", seed {own}"),
        )
        # the mean over held-out and tuned-on answers together says nothing
        kept = {name: score for name, score in card.scores.items() if name != RESPONSE_NATS}
        return card.model_copy(update={"scores": kept})

    def _benchmarks(self, arm: str, seed: int | None, model: Path) -> Scorecard:
        """The paper's benchmarks; each is kept when it is finished, also of a graft that goes."""
        from fedgraft.evaluation.harness import BenchmarkSettings, run_benchmarks

        part = self.study.benchmarks
        assert part
        asked = part.model_dump(exclude={"names", "data"})
        return run_benchmarks(
            Checkpoint.open(model),
            arm=arm,
            seed=seed,
            benchmarks=chosen(part.names),
            settings=BenchmarkSettings(data=Path(part.data) if part.data else None, **asked),
            kept=self.out / "benchmarks",
            open_network=lambda precision: open_model(model, dtype=getattr(torch, precision)),
            say=lambda line: self.say(f"    {line}"),
        )

    def _responses(self) -> list[Dialogue]:
        """Examples whose answers are scored, each with a group that says whether it was held out;
        of those tuned on as many as are held out, the first."""
        return [
            dialogue.model_copy(update={"group": name + suffix, "department": None})
            for name, (scored, others) in self.examples.items()
            for suffix, ours in (("", scored), (TUNED_ON, others[: len(scored)]))
            for dialogue in ours
        ]

    def _packed(self, documents: Sequence[Document], seed: int) -> Rows:
        config = self.opened[self.study.speaker].config
        return pack(
            self.tokenizer,
            documents,
            self.study.row_length,
            seed=seed,
            num_positions=config.get("max_position_embeddings"),
        )

    def _mixed(
        self,
        texts: Mapping[str, Sequence[Document]],
        shares: Mapping[str, float],
        num_tokens: int,
        seed: int,
    ) -> Rows:
        """Rows of several texts by their shares, as many as the budget needs."""
        parts = [(self._packed(texts[text], seed), share) for text, share in shares.items()]
        if len(parts) == 1:
            return parts[0][0]
        num_rows = max(len(parts), -(-num_tokens // self.study.row_length))
        return mix(parts, num_rows=num_rows, seed=derive_seed(seed, "mix"))

    def _forecasts(
        self,
        inspections: Mapping[tuple[str, int | None], Inspection],
        cards: Mapping[str, Sequence[Scorecard]],
    ) -> Iterator[Forecast]:
        study = self.study
        for (arm, seed), found in inspections.items():
            recipe = study.models[model_of(arm)]
            assert isinstance(recipe, Recipe)
            assert recipe.graft
            first, second = recipe.graft.residual
            mine, instruct = (_card(cards, one, seed) for one in (arm, second))
            before = instruct.value(study.score) if instruct else None
            after = mine.value(study.score) if mine else None
            yield Forecast(
                arm=arm,
                seed=seed,
                residual=f"{second} - {first}",
                target=recipe.parent,
                relative_norm=found.whole.relative_norm or 0.0,
                effective_rank=found.whole.effective_rank,
                residual_strength=found.whole.strength,
                strength=found.forecast.strength,
                outcome=found.forecast.outcome,
                kept=after / before if before and after is not None else None,
            )

    def _made(self, name: str) -> Made:
        recipe = self.study.models[name]
        if not isinstance(recipe, Recipe):
            return Made(made_of=(), words="as it comes")
        tokens = recipe.training.num_tokens if recipe.training else 0
        return Made(
            made_of=recipe.made_of,
            words=in_words(recipe),
            num_tokens=tokens,
            pretrained=recipe.pretrain is not None,
        )

    def _residual_facts(self) -> dict[str, Any]:
        """Relative norm of each residual, with the first seed."""
        facts: dict[str, Any] = {}
        for (first, second, _), residual in self.residuals.items():
            facts.setdefault(f"{second} - {first}, relative norm", residual.relative_norm)
        return facts

    def _inputs(self) -> dict[str, str]:
        texts = {name: hash_documents(found) for name, found in self.texts.items()}
        scored = [one.model_dump() for one in (*self.dialogues, *self.questions)]
        return {
            **{name: one.content_hash for name, one in self.opened.items()},
            "new text": hash_documents(self.new, self.replay),
            **{f"text {name}": content for name, content in texts.items()},
            **{
                f"examples {name}": hash_json([d.model_dump() for d in others])
                for name, (_, others) in self.examples.items()
            },
            "test material": hash_json([hash_documents(*self.held_out.values()), scored]),
        }


def _add(recipe: Recipe, target: Path, residual: Residual, out: Path) -> Path:
    added = recipe.graft
    assert added
    return graft(
        target,
        residual,
        out,
        scale=added.scale,
        method=added.method,
        factors=added.factors,
        any_parent=added.any_parent,
        again=added.again,
    )


def _add_in(recipe: Recipe, target: Path, residual: Residual, folder: Path) -> Path:
    return _add(recipe, target, residual, folder / "graft")


def _asked_of(part: Benchmarks) -> dict[str, Any]:
    """What decides on the scores of benchmarks: their files by content, never by place."""
    files = (
        sorted(file for file in Path(part.data).rglob("*") if file.is_file()) if part.data else ()
    )
    content = hash_files(list(files)) if files else "hub"
    return {**part.model_dump(exclude={"data", "batch_size"}), "data": content}


def _added(recipe: Recipe) -> dict[str, Any]:
    """The settings of a graft; its residual is an input."""
    assert recipe.graft
    return recipe.graft.model_dump(mode="json", exclude={"residual"})


def _num_parameters(residual: Residual) -> int:
    return int(residual.record.figures["num_elements"])


def _card(cards: Mapping[str, Sequence[Scorecard]], arm: str, seed: int | None) -> Scorecard | None:
    """An arm's card with a seed, or the one that it has for all seeds."""
    found = cards.get(arm, ())
    return next((card for card in found if card.seed in (seed, None)), None)


def _lines(study: LineageStudy) -> dict[str, tuple[tuple[float, str], ...]]:
    lines: dict[str, list[tuple[float, str]]] = {}
    for name, arm in study.arms.items():
        if arm.line is not None and arm.at is not None:
            lines.setdefault(arm.line, []).append((arm.at, name))
    return {line: tuple(sorted(points)) for line, points in lines.items()}


def verdict(
    study: LineageStudy,
    summary: Mapping[str, Mapping[str, Summary]],
    comparisons: Sequence[Comparison],
    lines: Mapping[str, Sequence[tuple[float, str]]],
    forecasts: Sequence[Forecast],
) -> str:
    """A few sentences that follow from the figures by rule: which arm is best, what is told
    apart from the arm `against`, where lines are level with it (their arms are not told one by
    one) or, where nothing is compared, from where to where they go, and whether forecasts came
    true."""
    values = {arm: found[study.score] for arm, found in summary.items() if study.score in found}
    if not values:
        return "The study's score was not taken, so that nothing can be said about it."
    share = next(iter(values.values())).unit == "share"
    better = max if share else min
    best = better(values, key=lambda arm: values[arm].mean)
    benchmarks = {score: " ".join(row) for row, score in PAPER_ROWS.items()}
    words = (benchmarks | WORDS).get(study.score, study.score)
    tied = [arm for arm, found in values.items() if found.mean == values[best].mean]
    if len(tied) == len(values) > 1:
        sentences = [f"By {words}, all are level, with {_told(values[best])}."]
    else:
        sentences = [f"By {words}, {best} is best, with {_told(values[best])}."]
    reference = study.against and values.get(study.against)
    if reference:
        if study.against not in (best, *tied):
            sentences.append(f"{study.against} has {_told(reference)}.")
        on_lines = {arm for points in lines.values() for _, arm in points}
        alone = [one for one in comparisons if one.arm not in on_lines]
        if told := told_of(study.score, alone):
            sentences.append(told)
        reached: dict[tuple[str, str], list[str]] = {}
        for line, points in lines.items():
            reached.setdefault(_reached(points, values, reference), []).append(line)
        for (verb, where), named in reached.items():
            verb = verb if len(named) == 1 else PLURAL[verb]
            where = where.format(study.against)
            sentences.append(f"{', '.join(named)} {verb} {where} ({study.axis}).")
    elif along := list(_along(lines, values)):
        sentences.append(f"Along {study.axis}: {'; '.join(along)}.")
    promised = [one for one in forecasts if one.outcome in ("holds", "breaks")]
    known = [one for one in promised if one.kept is not None]
    if known and study.score == FOLLOWED:
        true = sum((one.outcome == "holds") == ((one.kept or 0.0) >= KEPT) for one in known)
        sentences.append(
            f"Of {len(known)} grafts that inspection made a forecast for, before they were asked "
            f"anything, {true} came out as forecast."
        )
    return " ".join(sentences)


def _along(
    lines: Mapping[str, Sequence[tuple[float, str]]], values: Mapping[str, Summary]
) -> Iterator[str]:
    """Each line's first and last point that was scored."""
    for line, points in lines.items():
        scored = [(at, arm) for at, arm in points if arm in values]
        if len(scored) > 1:
            (first, one), (last, other) = scored[0], scored[-1]
            yield (
                f"{line} from {_told(values[one])} at {_place(first)} to {_told(values[other])} at "
                f"{_place(last)}"
            )


def _place(at: float) -> str:
    return f"{at:,.0f}" if at == int(at) else f"{at:g}"


PLURAL = {"is": "are", "falls": "fall"}


def _reached(
    points: Sequence[tuple[float, str]], values: Mapping[str, Summary], reference: Summary
) -> tuple[str, str]:
    """Where a line is level with the arm that others are compared with ({}), by means over
    seeds: a verb of one line, and the rest of the sentence."""
    sign = 1 if reference.unit == "share" else -1
    scored = [(at, arm) for at, arm in points if arm in values]
    level = [sign * values[arm].mean >= sign * reference.mean for _, arm in scored]
    places = [_place(at) for at, _ in scored]
    if not any(level):
        return "falls", "short of {} at every point"
    if all(level):
        return "is", "level with {} or above it at every point"
    if level == sorted(level):
        return "is", f"level with {{}} from {places[level.index(True)]} on"
    if level == sorted(level, reverse=True):
        return "is", f"level with {{}} up to {places[level.index(False) - 1]}"
    at = ", ".join(place for place, is_level in zip(places, level, strict=True) if is_level)
    return "is", f"level with {{}} at {at}"


def _told(summary: Summary) -> str:
    """The mean, and the range where there are seeds to range over."""
    low, mean, high = (
        f"{value:.1%}" if summary.unit == "share" else f"{value:.3f}"
        for value in (summary.lowest, summary.mean, summary.highest)
    )
    return f"{mean} ({low} to {high})" if summary.num_seeds > 1 else mean
