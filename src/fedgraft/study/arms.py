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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedgraft.errors import StudyError
from fedgraft.evaluation.gate import decide
from fedgraft.evaluation.scorecard import FOLLOWED, Scorecard, evaluate
from fedgraft.models import open_model
from fedgraft.provenance import Record, derive_seed, hash_json
from fedgraft.study.comparison import check_claims, compare, summarise, verdict
from fedgraft.study.cost import graft_flops, training_flops, tuning_ratio
from fedgraft.study.estimate import estimate
from fedgraft.study.material import at_equal_distances, shared_out
from fedgraft.study.result import (
    ARM_WORDS,
    ARMS,
    NATS,
    AdapterResult,
    ArmResult,
    MergingResult,
    Result,
    ScaleCurve,
    ScalePoint,
    Together,
)
from fedgraft.study.run import PLAINLY, SCORECARD, versions
from fedgraft.study.stage import Say, run_stage
from fedgraft.study.study import Merging, Study
from fedgraft.study.together import Federating
from fedgraft.text.dialogues import Dialogue
from fedgraft.text.packing import Rows
from fedgraft.training.adapter import open_adapted, train_adapter


def run(study: Study, out: Path, *, say: Say = lambda _: None, num_processes: int = 1) -> Result:
    """Make and score every arm for every seed, and write `result.json` into `out`.

    Finished stages are kept: after an interruption, or with more seeds, the same call goes on.

    Raises StudyError for a study of forgetting (`curve`) or of departments (`federation.rules`),
    which `study.forgetting.run` and `study.departments.run` run.
    """
    if study.kind != "arms":
        key = "curve" if study.curve else "federation.rules"
        raise StudyError(
            f"{study.name}: expected a study of arms, found one with `{key}`; run it with "
            f"fedgraft.study.{study.kind}.run"
        )
    _Arms(study, out, say, num_processes).everything()
    return Result.load(out)


class _Arms(Federating):
    """One run of a study of arms."""

    def everything(self) -> None:
        study = self.study
        estimates = estimate(self.study, self.out, say=self.say, num_processes=self.num_processes)
        self.extract()
        cards = {
            "base": [self._score("base", None, self.base)],
            "instruct": [self._score("instruct", None, self.instruct)],
            **{arm: [] for arm in ARMS[2:]},
        }
        scales, adapters, decisions = [], [], []
        federations: list[Together] = []
        merged: dict[str, list[tuple[ScaleCurve, Scorecard]]] = {way: [] for way in study.merging}
        for seed in study.seeds:
            s1 = self._pretrain("s1", seed, self.instruct)
            pretrained = self._pretrain("pretrained_base", seed, self.base)
            curve = self._choose_scale(seed, pretrained)
            grafted = self._graft(seed, pretrained, curve.chosen)
            made = {"s1": s1, "pretrained_base": pretrained, "graft": grafted}
            for arm, model in made.items():
                cards[arm].append(self._score(arm, seed, model))
            scales.append(curve)
            for way, merging in study.merging.items():
                merged[way].append(self._merge(seed, pretrained, way, merging))
            if study.federation:
                found, together = self._federated(seed, grafted, cards["graft"][-1])
                adapters += found
                federations.append(together)
            adapters += self._adapters(seed, grafted, cards["graft"][-1])
            references = {arm: cards[arm][0] for arm in ("base", "instruct")}
            references |= {arm: cards[arm][-1] for arm in ("s1", "pretrained_base")}
            decisions.append(decide(cards["graft"][-1], references, study.gate))
        summary = summarise(card for found in cards.values() for card in found)
        comparisons = compare(cards)
        ways = {way: [card for _, card in found] for way, found in merged.items()}
        plainly = {"graft": cards["graft"]}
        ways_compared = {
            way: compare({**plainly, way: found}, [(way, "graft")]) for way, found in ways.items()
        }
        claims = check_claims(summary)
        tokens = self._num_tokens()
        Result(
            name=study.name,
            question=study.question,
            verdict=verdict(
                summary,
                claims,
                decisions,
                comparisons,
                ways=[one for found in ways_compared.values() for one in found],
            ),
            claims=claims,
            decisions=tuple(decisions),
            arms=tuple(
                ArmResult(arm=arm, words=ARM_WORDS[arm], scorecards=tuple(cards[arm]))
                for arm in ARMS
            ),
            summary=summary,
            comparisons=comparisons,
            scales=tuple(scales),
            merging={
                way: MergingResult(
                    words=_in_words(study.merging[way]),
                    scales=tuple(curve for curve, _ in found),
                    summary=summarise(ways[way])[way],
                    comparisons=ways_compared[way],
                )
                for way, found in merged.items()
            },
            adapters=tuple(adapters),
            residual=self.residual_facts(),
            losses=self.losses,
            estimates=estimates,
            costs=tuple(self.costs),
            prices=self.study.prices,
            tuning=self._tuning_cost(tokens),
            tokens=tokens,
            federations=tuple(federations),
            settings=study.as_written,
            inputs=self.inputs(),
            versions=versions(),
        ).write(self.out)

    def _merge(
        self, seed: int, pretrained: Path, way: str, merging: Merging
    ) -> tuple[ScaleCurve, Scorecard]:
        """Choose a scale for another way to add the residual, and score that graft on the test."""
        place = Path("merging", way)
        curve = self._choose_scale(seed, pretrained, merging, place)
        grafted = self._graft(seed, pretrained, curve.chosen, merging, place)
        return curve, self._score(way, seed, grafted)

    def _choose_scale(
        self,
        seed: int,
        pretrained: Path,
        merging: Merging = PLAINLY,
        place: Path = Path(),
    ) -> ScaleCurve:
        search = self.study.scale
        metric = search.metric
        asked = at_equal_distances(
            self.material.validation_dialogues, self.study.evaluation.max_dialogues
        )

        def make(folder: Path) -> None:
            points = []
            for scale in sorted(search.grid):
                scores = self._score_scale(
                    pretrained, scale, merging, asked, seed, folder / "graft"
                )
                if scores and metric not in scores:
                    raise StudyError(
                        f"scale.metric: expected one of {', '.join(scores)}, found {metric}"
                    )
                points.append(ScalePoint(scale=scale, scores=scores))
            best = max(points, key=lambda p: (p.scores.get(metric, 0.0), -abs(p.scale - 1)))
            curve = ScaleCurve(seed=seed, metric=metric, points=tuple(points), chosen=best.scale)
            (folder / "curve.json").write_text(curve.model_dump_json(indent=1), encoding="utf-8")

        folder = self.out / f"seed-{seed}" / place / "scale"
        record = run_stage(
            folder,
            title=" ".join(filter(None, [f"seed {seed}: choose the scale", place.name])),
            inputs={
                "model": self.hash_of(pretrained),
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
        self.cost(", ".join(["scale", *place.parts[1:], f"seed {seed}"]), record)
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
            open_model(self.add(pretrained, scale, place, merging)),
            self.tokenizer,
            arm=f"graft at scale {scale:g}",
            seed=seed,
            dialogues=asked,
            max_new_tokens=self.study.evaluation.max_new_tokens,
        )
        shutil.rmtree(place)
        return {name: score.value for name, score in card.scores.items()}

    def _pretrain(self, arm: str, seed: int, model: Path) -> Path:
        study = self.study
        return self.pretrain(
            model,
            self.material.new,
            study.pretrain,
            Path(f"seed-{seed}", arm),
            seed=seed,
            replay_share=study.replay.share if study.replay else 0.0,
            stage=f"{arm}, seed {seed}",
            title=f"seed {seed}: pre-train {arm}",
        )

    def _graft(
        self,
        seed: int,
        pretrained: Path,
        scale: float,
        merging: Merging = PLAINLY,
        place: Path = Path(),
    ) -> Path:
        title = " ".join(filter(None, [f"seed {seed}: graft at scale {scale:g}", place.name]))
        return self.graft(
            pretrained,
            scale,
            Path(f"seed-{seed}", place, "graft"),
            stage=", ".join(["graft", *place.parts[1:], f"seed {seed}"]),
            title=title,
            merging=merging,
        )

    def _score(self, arm: str, seed: int | None, model: Path) -> Scorecard:
        return self.score(
            arm,
            seed,
            model,
            Path("scores", arm + ("" if seed is None else f"-seed-{seed}")),
            documents=self.material.held_out(self.study.evaluation.max_documents),
            dialogues=self.material.test_dialogues,
            questions=self.material.test_questions,
            title=f"score {arm}" + ("" if seed is None else f", seed {seed}"),
        )

    def _adapters(self, seed: int, grafted: Path, before: Scorecard) -> list[AdapterResult]:
        if self.study.adapters is None:
            return []
        settings = self.study.adapters.model_copy(update={"seed": derive_seed(seed, "adapter")})
        grafted_hash = self.hash_of(grafted)
        held_out = self.material.held_out(self.study.evaluation.max_documents)
        results = []
        for department, split in self.material.splits.items():
            rows = self.rows(split.train, seed)
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
            self.cost(f"adapter {department}, seed {seed}", record, trained=True)
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

    def _federated(
        self, seed: int, grafted: Path, before: Scorecard
    ) -> tuple[list[AdapterResult], Together]:
        """The departments' adapters, trained by their clients together."""
        part = self.study.federation
        assert part
        clients = shared_out(self.material.splits, part.partition, seed)
        plan = self.plan(clients, seed)
        scored, together = self.federate(
            grafted,
            clients,
            plan,
            Path(f"seed-{seed}", "adapters"),
            arm=part.rule,
            seed=seed,
            title=f"seed {seed}: adapters, {len(plan.clients)} clients together",
        )
        return [
            AdapterResult(
                department=one.department,
                seed=seed,
                nats_per_token_before=before.scores[f"perplexity/{one.department}/{NATS}"].value,
                nats_per_token_after=one.scores[NATS],
                followed_before=before.value(f"{FOLLOWED}/{one.department}"),
                followed_after=one.scores.get(FOLLOWED),
            )
            for one in scored
        ], together

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


def _in_words(merging: Merging) -> str:
    """What sets a way to add the residual apart: its settings that are not the default."""
    method = merging.method.model_dump(exclude_defaults=True)
    parts = [method.pop("name", "plain"), *(f"{key} {value:g}" for key, value in method.items())]
    if merging.form:
        parts.append(merging.form.words)
    parts += [f"{kind} x {factor:g}" for kind, factor in merging.factors.kinds.items()]
    parts += [
        f"layers {span.first} to {span.last} x {span.factor:g}" for span in merging.factors.layers
    ]
    return ", ".join(parts)
