"""The arms of a study, made and scored: each is one way to a model that has read the new text.

    base               as it came
    instruct           as it came
    s1                 instruct, pre-trained on the new text
    pretrained_base    base, pre-trained on the new text
    graft              pretrained_base + scale * (instruct - base)

s1 and pretrained_base read the same rows in the same order with the same settings; all arms are
scored on the same held-out documents, dialogues and questions. The scale is chosen on validation
material; test material is scored once, at the end.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from fedgraft.errors import StudyError
from fedgraft.evaluation.gate import decide
from fedgraft.evaluation.knowledge import Question, load_questions
from fedgraft.evaluation.scorecard import FOLLOWED, Scorecard, evaluate
from fedgraft.models import open_model, open_tokenizer
from fedgraft.provenance import Record, derive_seed, hash_json
from fedgraft.study.comparison import check_claims, summarise, verdict
from fedgraft.study.cost import StageCost, graft_flops, training_flops, tuning_ratio
from fedgraft.study.result import (
    ARM_WORDS,
    ARMS,
    AdapterResult,
    ArmResult,
    MergingResult,
    Result,
    ScaleCurve,
    ScalePoint,
)
from fedgraft.study.stage import Say, run_stage
from fedgraft.study.study import Merging, Scored, Study, Texts
from fedgraft.text.corpus import Corpus, Document, Splits
from fedgraft.text.dialogues import Dialogue, load_dialogues
from fedgraft.text.packing import Rows, pack
from fedgraft.training.adapter import open_adapted, train_adapter
from fedgraft.training.pretrain import continue_pretraining
from fedgraft.weights.family import Family
from fedgraft.weights.graft import graft
from fedgraft.weights.residual import Residual, extract

SCORECARD = "scorecard.json"
PLAINLY = Merging()

_Asked = TypeVar("_Asked", Dialogue, Question)


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """Everything that the arms read or are scored on."""

    splits: dict[str, Splits]
    replay: tuple[Document, ...]
    validation_dialogues: tuple[Dialogue, ...]
    test_dialogues: tuple[Dialogue, ...]
    test_questions: tuple[Question, ...]

    @classmethod
    def load(cls, study: Study) -> "Material":
        """Read the texts of a study.

        Raises CorpusError, DialogueError or EvaluationError for what cannot be read, StudyError
        where a department has too few documents to hold some out.
        """
        splits = {}
        for department, texts in study.departments.items():
            split = _load(texts, department).split()
            empty = [n for n in ("train", "validation", "test") if not getattr(split, n)]
            if empty:
                raise StudyError(
                    f"department {department}: expected enough documents to hold some out, found "
                    f"none for {' and '.join(empty)}; add documents"
                )
            splits[department] = split
        held_out = {d.hash for s in splits.values() for d in (*s.validation, *s.test)}
        old = _load(study.replay, None).documents if study.replay else ()
        dialogues, questions = study.dialogues, study.questions
        return cls(
            splits=splits,
            replay=tuple(document for document in old if document.hash not in held_out),
            validation_dialogues=_asked(load_dialogues, dialogues, "validation"),
            test_dialogues=_asked(load_dialogues, dialogues, "test"),
            test_questions=_asked(load_questions, questions, "test"),
        )

    @property
    def training_hash(self) -> str:
        """Hash of every document that is trained on, in order."""
        read = [d.hash for split in self.splits.values() for d in split.train]
        return hash_json([read, [d.hash for d in self.replay]])

    @property
    def test_hash(self) -> str:
        held_out = {name: [d.hash for d in split.test] for name, split in self.splits.items()}
        dialogues = [d.model_dump() for d in self.test_dialogues]
        return hash_json([held_out, dialogues, [q.model_dump() for q in self.test_questions]])

    def held_out(self, limit: int | None) -> dict[str, list[Document]]:
        """The test documents of each department, at most so many, the first by hash."""
        return {
            department: sorted(split.test, key=lambda d: d.hash)[:limit]
            for department, split in self.splits.items()
        }


def run(study: Study, out: Path, *, say: Say = lambda _: None) -> Result:
    """Make and score every arm for every seed, and write `result.json` into `out`.

    Finished stages are kept: after an interruption, or with more seeds, the same call goes on.
    """
    _Run(study, out, say).everything()
    return Result.load(out)


class _Run:
    """One run of a study: what its stages share."""

    def __init__(self, study: Study, out: Path, say: Say) -> None:
        self.study, self.out, self.say = study, out, say
        self.family = Family.open(study.family.base, study.family.instruct)
        self.base, self.instruct = self.family.base.path, self.family.instruct.path
        self.hashes = {
            "base": self.family.base.content_hash,
            "instruct": self.family.instruct.content_hash,
        }
        self.tokenizer = open_tokenizer(self.instruct)
        self.material = Material.load(study)
        self.costs: list[StageCost] = []
        self.losses: dict[str, tuple[tuple[int, float], ...]] = {}

    def everything(self) -> None:
        study = self.study
        self._extract()
        cards = {
            "base": [self._score("base", None, self.base, self.hashes["base"])],
            "instruct": [self._score("instruct", None, self.instruct, self.hashes["instruct"])],
            **{arm: [] for arm in ARMS[2:]},
        }
        scales, adapters, decisions = [], [], []
        merged: dict[str, list[tuple[ScaleCurve, Scorecard]]] = {way: [] for way in study.merging}
        for seed in study.seeds:
            s1 = self._pretrain("s1", seed, self.instruct, self.hashes["instruct"])
            pretrained = self._pretrain("pretrained_base", seed, self.base, self.hashes["base"])
            curve = self._choose_scale(seed, pretrained)
            grafted = self._graft(seed, pretrained, curve.chosen)
            made = {"s1": s1, "pretrained_base": pretrained, "graft": grafted}
            for arm, model in made.items():
                cards[arm].append(self._score(arm, seed, model, self._hash(model)))
            scales.append(curve)
            for way, merging in study.merging.items():
                merged[way].append(self._merge(seed, pretrained, way, merging))
            adapters += self._adapters(seed, grafted, cards["graft"][-1])
            references = {arm: cards[arm][0] for arm in ("base", "instruct")}
            decisions.append(decide(cards["graft"][-1], references, study.gate))
        summary = summarise(card for found in cards.values() for card in found)
        claims = check_claims(summary)
        tokens = self._num_tokens()
        Result(
            name=study.name,
            question=study.question,
            verdict=verdict(summary, claims, decisions),
            claims=claims,
            decisions=tuple(decisions),
            arms=tuple(
                ArmResult(arm=arm, words=ARM_WORDS[arm], scorecards=tuple(cards[arm]))
                for arm in ARMS
            ),
            summary=summary,
            scales=tuple(scales),
            merging={
                way: MergingResult(
                    words=_in_words(study.merging[way]),
                    scales=tuple(curve for curve, _ in found),
                    summary=summarise(card for _, card in found)[way],
                )
                for way, found in merged.items()
            },
            adapters=tuple(adapters),
            residual=self._residual_facts(),
            losses=self.losses,
            costs=tuple(self.costs),
            tuning=self._tuning_cost(tokens),
            tokens=tokens,
            settings=study.as_written,
            inputs={
                **self.hashes,
                "training text": self.material.training_hash,
                "test material": self.material.test_hash,
            },
            versions={
                "fedgraft": Record.make("stage").fedgraft,
                **Record.make("stage").libraries,
            },
        ).write(self.out)

    def _extract(self) -> None:
        def make(folder: Path) -> None:
            extract(self.family, folder / "residual")

        record = run_stage(
            self.out / "residual",
            title="extract the residual",
            inputs=self.hashes,
            settings={},
            make=make,
            say=self.say,
        )
        self._cost("extract", record)
        self.residual = Residual.open(self.out / "residual" / "residual")

    def _pretrain(self, arm: str, seed: int, model: Path, model_hash: str) -> Path:
        study = self.study
        settings = study.pretrain.model_copy(update={"seed": derive_seed(seed, "pretrain")})

        def make(folder: Path) -> dict[str, Any]:
            continue_pretraining(
                model,
                self._rows(seed),
                folder / "model",
                settings,
                replay=self._replay_rows(seed),
                replay_share=study.replay.share if study.replay else 0.0,
                label=f"{arm}, seed {seed}",
            )
            record = Record.read(folder / "model")
            assert record
            return record.figures

        folder = self.out / f"seed-{seed}" / arm
        record = run_stage(
            folder,
            title=f"seed {seed}: pre-train {arm}",
            inputs={"model": model_hash, "text": self.material.training_hash},
            settings={
                **settings.model_dump(),
                "replay": study.replay.share if study.replay else 0.0,
                "row_length": study.row_length,
            },
            make=make,
            say=self.say,
        )
        self._cost(f"{arm}, seed {seed}", record, trained=True)
        return folder / "model"

    def _merge(
        self, seed: int, pretrained: Path, way: str, merging: Merging
    ) -> tuple[ScaleCurve, Scorecard]:
        """Choose a scale for another way to add the residual, and score that graft on the test."""
        place = Path("merging", way)
        curve = self._choose_scale(seed, pretrained, merging, place)
        grafted = self._graft(seed, pretrained, curve.chosen, merging, place)
        return curve, self._score(way, seed, grafted, self._hash(grafted))

    def _choose_scale(
        self,
        seed: int,
        pretrained: Path,
        merging: Merging = PLAINLY,
        place: Path = Path(),
    ) -> ScaleCurve:
        search = self.study.scale
        metric = search.metric
        asked = self.material.validation_dialogues[: self.study.evaluation.max_dialogues]

        def make(folder: Path) -> None:
            points = [
                ScalePoint(
                    scale=scale,
                    scores=self._score_scale(
                        pretrained, scale, merging, asked, seed, folder / "graft"
                    ),
                )
                for scale in sorted(search.grid)
            ]
            if len(points) > 1 and any(metric not in point.scores for point in points):
                raise StudyError(
                    f"scale.metric: expected one of {', '.join(points[0].scores)}, found {metric}"
                )
            best = max(points, key=lambda p: (p.scores.get(metric, 0.0), -abs(p.scale - 1)))
            curve = ScaleCurve(seed=seed, metric=metric, points=tuple(points), chosen=best.scale)
            (folder / "curve.json").write_text(curve.model_dump_json(indent=1), encoding="utf-8")

        folder = self.out / f"seed-{seed}" / place / "scale"
        record = run_stage(
            folder,
            title=" ".join(filter(None, [f"seed {seed}: choose the scale", place.name])),
            inputs={
                "model": self._hash(pretrained),
                "residual": self.residual.content_hash,
                "dialogues": hash_json([dialogue.model_dump() for dialogue in asked]),
            },
            settings={
                **search.model_dump(),
                **self.study.evaluation.model_dump(),
                **merging.model_dump(),
            },
            make=make,
            say=self.say,
        )
        self._cost(", ".join(["scale", *place.parts[1:], f"seed {seed}"]), record)
        return ScaleCurve.model_validate_json((folder / "curve.json").read_bytes())

    def _score_scale(
        self,
        pretrained: Path,
        scale: float,
        merging: Merging,
        asked: Sequence[Dialogue],
        seed: int,
        place: Path,
    ) -> dict[str, float]:
        """Score a graft that stands in `place` for as long as that takes."""
        if len(self.study.scale.grid) == 1:
            return {}
        card = evaluate(
            open_model(self._add(pretrained, scale, merging, place)),
            self.tokenizer,
            arm=f"graft at scale {scale:g}",
            seed=seed,
            dialogues=asked,
            max_new_tokens=self.study.evaluation.max_new_tokens,
        )
        shutil.rmtree(place)
        return {name: score.value for name, score in card.scores.items()}

    def _add(self, pretrained: Path, scale: float, merging: Merging, place: Path) -> Path:
        method, factors = merging.method, merging.factors
        return graft(pretrained, self.residual, place, scale=scale, method=method, factors=factors)

    def _graft(
        self,
        seed: int,
        pretrained: Path,
        scale: float,
        merging: Merging = PLAINLY,
        place: Path = Path(),
    ) -> Path:
        def make(folder: Path) -> dict[str, Any]:
            self._add(pretrained, scale, merging, folder / "model")
            return {"flops": graft_flops(self.family.num_parameters)}

        folder = self.out / f"seed-{seed}" / place / "graft"
        record = run_stage(
            folder,
            title=" ".join(filter(None, [f"seed {seed}: graft at scale {scale:g}", place.name])),
            inputs={"model": self._hash(pretrained), "residual": self.residual.content_hash},
            settings={"scale": scale, **merging.model_dump()},
            make=make,
            say=self.say,
        )
        self._cost(", ".join(["graft", *place.parts[1:], f"seed {seed}"]), record)
        return folder / "model"

    def _score(self, arm: str, seed: int | None, model: Path, model_hash: str) -> Scorecard:
        settings = self.study.evaluation

        def make(folder: Path) -> None:
            card = evaluate(
                open_model(model),
                self.tokenizer,
                arm=arm,
                seed=seed,
                documents=self.material.held_out(settings.max_documents),
                dialogues=self.material.test_dialogues,
                questions=self.material.test_questions,
                window=settings.window,
                max_new_tokens=settings.max_new_tokens,
            )
            (folder / SCORECARD).write_text(card.model_dump_json(indent=1), encoding="utf-8")

        name = f"scores/{arm}" + ("" if seed is None else f"-seed-{seed}")
        record = run_stage(
            self.out / name,
            title=f"score {arm}" + ("" if seed is None else f", seed {seed}"),
            inputs={"model": model_hash, "test": self.material.test_hash},
            settings=settings.model_dump(),
            make=make,
            say=self.say,
        )
        self._cost(name, record)
        return Scorecard.model_validate_json((self.out / name / SCORECARD).read_bytes())

    def _adapters(self, seed: int, grafted: Path, before: Scorecard) -> list[AdapterResult]:
        if self.study.adapters is None:
            return []
        settings = self.study.adapters.model_copy(update={"seed": derive_seed(seed, "adapter")})
        grafted_hash = self._hash(grafted)
        held_out = self.material.held_out(self.study.evaluation.max_documents)
        results = []
        for department, split in self.material.splits.items():
            rows = self._pack(split.train, seed)
            dialogues = [d for d in self.material.test_dialogues if d.department == department]

            def make(
                folder: Path,
                rows: Rows = rows,
                dialogues: list[Dialogue] = dialogues,
                department: str = department,
            ) -> dict[str, Any]:
                label = f"adapter {department}, seed {seed}"
                adapter = train_adapter(
                    grafted, rows, folder / "adapter", settings, department=department, label=label
                )
                card = evaluate(
                    open_adapted(grafted, adapter),
                    self.tokenizer,
                    arm=label,
                    seed=seed,
                    documents={department: held_out[department]},
                    dialogues=dialogues,
                    window=self.study.evaluation.window,
                    max_new_tokens=self.study.evaluation.max_new_tokens,
                )
                (folder / SCORECARD).write_text(card.model_dump_json(indent=1), encoding="utf-8")
                record = Record.read(adapter)
                assert record
                return record.figures

            folder = self.out / f"seed-{seed}" / "adapters" / department
            record = run_stage(
                folder,
                title=f"seed {seed}: adapter for {department}",
                inputs={
                    "model": grafted_hash,
                    "text": rows.content_hash,
                    "test": self.material.test_hash,
                },
                settings={**settings.model_dump(), **self.study.evaluation.model_dump()},
                make=make,
                say=self.say,
            )
            self._cost(f"adapter {department}, seed {seed}", record, trained=True)
            after = Scorecard.model_validate_json((folder / SCORECARD).read_bytes())
            name = f"perplexity/{department}/nats_per_token"
            results.append(
                AdapterResult(
                    department=department,
                    seed=seed,
                    nats_per_token_before=before.scores[name].value,
                    nats_per_token_after=after.scores[name].value,
                    followed_before=before.value(f"{FOLLOWED}/{department}"),
                    followed_after=after.value(FOLLOWED),
                )
            )
        return results

    def _rows(self, seed: int) -> Rows:
        documents = [d for split in self.material.splits.values() for d in split.train]
        return self._pack(documents, seed)

    def _replay_rows(self, seed: int) -> Rows | None:
        if not self.material.replay:
            return None
        return self._pack(self.material.replay, seed)

    def _pack(self, documents: Sequence[Document], seed: int) -> Rows:
        return pack(
            self.tokenizer,
            documents,
            self.study.row_length,
            seed=seed,
            num_positions=self.family.base.config.get("max_position_embeddings"),
        )

    def _hash(self, model: Path) -> str:
        """Hash of what made a model; its figures hold times, which differ from run to run."""
        record = Record.read(model)
        assert record
        return hash_json(record.model_dump(exclude={"figures"}))

    def _cost(self, stage: str, record: Record, *, trained: bool = False) -> None:
        figures = record.figures
        self.costs.append(
            StageCost(
                stage=stage,
                seconds=figures["seconds"],
                num_tokens=figures.get("num_tokens", 0),
                flops=figures.get("flops", 0.0),
            )
        )
        if trained:
            self.losses[stage] = tuple((int(s), float(loss)) for s, loss in figures["losses"])

    def _num_tokens(self) -> int:
        return max(cost.num_tokens for cost in self.costs if cost.stage.startswith("s1"))

    def _tuning_cost(self, tokens: int) -> dict[str, float]:
        tuning, parameters = self.study.tuning, self.family.num_parameters
        costs = {"pretraining_flops": training_flops(parameters, tokens)}
        costs["graft_flops"] = graft_flops(parameters)
        if tuning:
            costs["tuning_flops"] = training_flops(parameters, tuning.num_tokens, tuning.epochs)
            costs["ratio"] = tuning_ratio(tuning, tokens)
        return costs

    def _residual_facts(self) -> dict[str, Any]:
        figures = self.residual.record.figures
        return {
            "num_parameters": self.family.num_parameters,
            "relative_norm": self.residual.relative_norm,
            **{name: value for name, value in figures.items() if isinstance(value, int | float)},
        }


def _in_words(merging: Merging) -> str:
    """What sets a way to add the residual apart: its settings that are not the default."""
    method = merging.method.model_dump(exclude_defaults=True)
    parts = [method.pop("name", "plain"), *(f"{key} {value:g}" for key, value in method.items())]
    parts += [f"{kind} x {factor:g}" for kind, factor in merging.factors.kinds.items()]
    parts += [
        f"layers {span.first} to {span.last} x {span.factor:g}" for span in merging.factors.layers
    ]
    return ", ".join(parts)


def _load(texts: Texts, department: str | None) -> Corpus:
    return Corpus.load(*texts.corpus, department=department, field=texts.field)


def _asked(
    load: Callable[[str], tuple[_Asked, ...]],
    scored: Scored | None,
    part: Literal["validation", "test"],
) -> tuple[_Asked, ...]:
    """What is asked in one part, of the groups that the study names."""
    if scored is None:
        return ()
    path: str = getattr(scored, part)
    rows = load(path)
    kept = tuple(row for row in rows if scored.groups is None or row.group in scored.groups)
    if not kept:
        raise StudyError(
            f"{path}: expected rows of the groups {', '.join(scored.groups or ())}, found only "
            f"{', '.join(sorted({row.group for row in rows}))}; correct `groups`"
        )
    return kept
