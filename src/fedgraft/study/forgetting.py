"""Forgetting against tokens: what a model still follows, and knows, the more it has read.

    instruct -- 25k -- 50k -- ... -> s1               every point is scored; so is the graft over
    base     -- 25k -- 50k -- ... -> pretrained_base  every point of the newer base, at scale 1

Both sides read the same rows in the same order, for each seed, learning rate, and share of replay
(none, and that of the study). The rate is constant after its warm-up, so that a point does not
depend on how far its run went on.

Each domain is a text that both sides read alone, at one budget, without replay: its distance is
what the base as it came needs for a token of it, in nats.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import correlation, fmean

from fedgraft.errors import StudyError
from fedgraft.evaluation.scorecard import FOLLOWED, RIGHT_AND_FOLLOWED, Score, Scorecard
from fedgraft.study.comparison import compare, in_a_sentence, summarise
from fedgraft.study.estimate import estimate
from fedgraft.study.material import at_equal_distances, first_by_hash
from fedgraft.study.result import (
    ARM_WORDS,
    CURVE_ARMS,
    FORGOTTEN,
    NEW_FACTS,
    OLD_FACTS,
    TEXT,
    CurvePoint,
    DomainResult,
    Forgetting,
    Point,
    Summary,
    Way,
    WayCompared,
)
from fedgraft.study.run import Run, versions
from fedgraft.study.stage import Say
from fedgraft.study.study import Study
from fedgraft.text.corpus import Document
from fedgraft.training.pretrain import budget_path
from fedgraft.training.settings import PretrainSettings

SCORES = (FOLLOWED, RIGHT_AND_FOLLOWED, OLD_FACTS, NEW_FACTS, TEXT)
RECALL = ("knowledge/recall/old", "knowledge/recall/new")
SCALE = 1.0


def run(
    study: Study, out: Path, *, say: Say = lambda _: None, num_processes: int = 1
) -> Forgetting:
    """Train and score every point of a study's curve, and write `result.json` into `out`.

    Finished stages are kept: after an interruption, or with more seeds, the same call goes on.

    Raises StudyError for a study without a curve.
    """
    if study.curve is None:
        raise StudyError(
            f"{study.name}: expected a study with `curve`, found one of {study.kind}; run it with "
            f"fedgraft.study.{study.kind}.run"
        )
    _Forgetting(study, out, say, num_processes).everything()
    return Forgetting.load(out)


class _Forgetting(Run):
    """One run of a study of forgetting."""

    def everything(self) -> None:
        study, curve = self.study, self.study.curve
        assert curve
        self.dialogues = at_equal_distances(
            self.material.test_dialogues, study.evaluation.max_dialogues
        )
        held_out = [d for part in self.material.splits.values() for d in part.test]
        self.held_out = first_by_hash(held_out, study.evaluation.max_documents)
        if not any(dialogue.constraints for dialogue in self.dialogues):
            raise StudyError(
                f"{study.name}, dialogues.test: expected some with constraints, of which the curve "
                f"is drawn, found none among the {len(self.dialogues)} that are asked; name others"
            )
        estimates = estimate(self.study, self.out, say=self.say, num_processes=self.num_processes)
        self.extract()
        references = {
            arm: self._score(arm, None, model, Path("scores", arm), self.held_out, f"score {arm}")
            for arm, model in (("base", self.base), ("instruct", self.instruct))
        }
        followed = references["instruct"].scores[FOLLOWED].value
        points = [
            (way, num_tokens, card)
            for seed in study.seeds
            for way in study.ways
            for num_tokens, card in self._curve(seed, way)
        ]
        curves = tuple(_over_seeds(points))
        comparisons = tuple(
            _compared(way, references["instruct"], points, study.pretrain.num_tokens)
            for way in study.ways
        )
        domains = tuple(self._domains(references["base"], followed, points))
        found = {
            arm: {name: score.value for name, score in _kept(card).items()}
            for arm, card in references.items()
        }
        Forgetting(
            name=study.name,
            question=study.question,
            verdict=verdict(study, found, curves, domains, comparisons),
            seeds=study.seeds,
            own=curve.domains.own if curve.domains else "own text",
            words={arm: ARM_WORDS[arm] for arm in ("base", "instruct", *CURVE_ARMS)},
            references=found,
            points=tuple(
                Point(
                    arm=card.arm,
                    way=way,
                    num_tokens=num_tokens,
                    seed=card.seed or 0,
                    scores={name: score.value for name, score in card.scores.items()},
                )
                for way, num_tokens, card in points
            ),
            curves=curves,
            domains=domains,
            comparisons=comparisons,
            residual=self.residual_facts(),
            losses=self.losses,
            learning_rates=self.learning_rates,
            estimates=estimates,
            costs=tuple(self.costs),
            prices=self.study.prices,
            settings=study.as_written,
            inputs=self.inputs(),
            versions=versions(),
        ).write(self.out)

    def _curve(self, seed: int, way: Way) -> Iterator[tuple[int, Scorecard]]:
        """The cards of one seed and way, budget by budget."""
        settings = self.study.pretrain.model_copy(update={"learning_rate": way.learning_rate})
        name = f"rate-{way.learning_rate:g}-replay-{way.replay:g}"
        place = Path("curve", name, f"seed-{seed}")
        sides = {
            arm: self._read(
                arm, seed, model, self.material.new, settings, place, way.words, way.replay
            )
            for arm, model in (("s1", self.instruct), ("pretrained_base", self.base))
        }
        for budget in (*settings.budgets, settings.num_tokens):
            last = budget == settings.num_tokens
            for arm in CURVE_ARMS:
                side = sides["s1" if arm == "s1" else "pretrained_base"]
                model = side if last else budget_path(side, budget)
                where = place / "scores" / f"{arm}-{budget}"
                title = f"seed {seed}, {way.words}: score {arm} after {budget:,} tokens"
                yield budget, self._score(arm, seed, model, where, self.held_out, title)

    def _domains(
        self, base: Scorecard, followed: float, points: Sequence[tuple[Way, int, Scorecard]]
    ) -> Iterator[DomainResult]:
        """The study's own text, whose models are points of the curve, then each other text."""
        study = self.study
        domains = study.curve and study.curve.domains
        if not domains:
            return
        plain = Way(learning_rate=study.pretrain.learning_rate, replay=0.0)
        own = [card for way, n, card in points if (way, n) == (plain, domains.num_tokens)]
        yield _domain(domains.own, base.scores[TEXT].value, domains.num_tokens, followed, own)
        settings = study.domain_settings
        for name, split in self.material.domains.items():
            place = Path("domains", name)
            held_out = first_by_hash(split.test, study.evaluation.max_documents)
            before = self.score(
                "base",
                None,
                self.base,
                place / "base",
                documents={"new": held_out},
                dialogues=(),
                questions=(),
                title=f"score base on {name}",
            )
            cards = []
            for seed in study.seeds:
                where = place / f"seed-{seed}"
                for arm, model in (("s1", self.instruct), ("graft", self.base)):
                    side = "s1" if arm == "s1" else "pretrained_base"
                    read = self._read(side, seed, model, split.train, settings, where, name, 0.0)
                    scored = where / f"scores-{arm}"
                    title = f"seed {seed}, {name}: score {arm}"
                    cards.append(self._score(arm, seed, read, scored, held_out, title))
            yield _domain(name, before.scores[TEXT].value, domains.num_tokens, followed, cards)

    def _read(
        self,
        arm: str,
        seed: int,
        model: Path,
        documents: Sequence[Document],
        settings: PretrainSettings,
        place: Path,
        words: str,
        replay: float,
    ) -> Path:
        """Let one side read."""
        stage = f"{arm}, {words}, seed {seed}"
        return self.pretrain(
            model,
            documents,
            settings,
            place / arm,
            seed=seed,
            replay_share=replay,
            stage=stage,
            title=f"seed {seed}, {words}: pre-train {arm}",
        )

    def _score(
        self,
        arm: str,
        seed: int | None,
        model: Path,
        place: Path,
        documents: Sequence[Document],
        title: str,
    ) -> Scorecard:
        card = self.score(
            arm,
            seed,
            model,
            place,
            documents={"new": documents},
            dialogues=self.dialogues,
            questions=self.material.test_questions,
            title=title,
            scale=SCALE if arm == "graft" else None,
        )
        return card.model_copy(update={"scores": _kept(card)})


def _kept(card: Scorecard) -> dict[str, Score]:
    """The scores that a curve is about."""
    return {name: card.scores[name] for name in (*SCORES, *RECALL) if name in card.scores}


def _over_seeds(points: Sequence[tuple[Way, int, Scorecard]]) -> Iterator[CurvePoint]:
    """Mean and spread of what differs in nothing but the seed."""
    groups: dict[tuple[Way, int, str], list[Scorecard]] = {}
    for way, num_tokens, card in points:
        groups.setdefault((way, num_tokens, card.arm), []).append(card)
    for (way, num_tokens, arm), cards in groups.items():
        yield CurvePoint(
            arm=arm,
            way=way,
            num_tokens=num_tokens,
            scores=summarise(cards)[arm],
        )


def _compared(
    way: Way,
    instruct: Scorecard,
    points: Sequence[tuple[Way, int, Scorecard]],
    num_tokens: int,
) -> WayCompared:
    """The arms of one way after so many tokens, with one another and the instruct model."""
    cards = {"instruct": [instruct]}
    for other, tokens, card in points:
        if (other, tokens) == (way, num_tokens):
            cards.setdefault(card.arm, []).append(card)
    return WayCompared(way=way, comparisons=compare(cards))


def _domain(
    name: str, shift: float, num_tokens: int, followed: float, cards: Sequence[Scorecard]
) -> DomainResult:
    """A text with what each arm scored on it, and lost of what the instruct model followed."""
    lost = [
        card.model_copy(
            update={
                "scores": {
                    **card.scores,
                    FORGOTTEN: card.scores[FOLLOWED].model_copy(
                        update={"value": followed - card.scores[FOLLOWED].value}
                    ),
                }
            }
        )
        for card in cards
        if card.arm in ("s1", "graft")
    ]
    return DomainResult(
        domain=name, nats_per_token=shift, num_tokens=num_tokens, arms=summarise(lost)
    )


def verdict(
    study: Study,
    references: Mapping[str, Mapping[str, float]],
    curves: Sequence[CurvePoint],
    domains: Sequence[DomainResult],
    comparisons: Sequence[WayCompared] = (),
) -> str:
    """A few sentences that follow from the figures by rule: at the last budget, at the rate of
    `pretrain`; what replay changes, what the other rates do, and what distance has to do with it.
    """
    assert study.curve
    budget, rate = study.pretrain.num_tokens, study.pretrain.learning_rate
    last = {(p.arm, p.way): p.scores for p in curves if p.num_tokens == budget}
    before = references["instruct"].get(FOLLOWED)
    if before is None:
        return "Following was not asked, so that nothing can be said about forgetting."

    def lost(arm: str, learning_rate: float, replay: float) -> float:
        way = Way(learning_rate=learning_rate, replay=replay)
        return before - last[arm, way][FOLLOWED].mean

    sentences = [
        f"The instruct model follows {before:.0%} of the prompts. After {budget:,} tokens at rate "
        f"{rate:g} without replay, the model that read them itself (S1) "
        f"{_change(lost('s1', rate, 0))}, the graft {_change(lost('graft', rate, 0))}."
    ]
    plain = Way(learning_rate=rate, replay=0)
    ahead = [
        one
        for found in comparisons
        for one in found.comparisons
        if found.way == plain and (one.arm, one.against, one.score) == ("graft", "s1", FOLLOWED)
    ]
    sentences += [
        f"Prompt by prompt against S1, the graft {in_a_sentence(one)}."
        for one in ahead
        if one.difference
    ]
    if study.replay:
        share = study.replay.share
        sentences.append(
            f"With {share:.0%} of replay S1 {_change(lost('s1', rate, share))}, the graft "
            f"{_change(lost('graft', rate, share))}."
        )
    for other in study.curve.learning_rates:
        if other != rate:
            sentences.append(
                f"At rate {other:g}, without replay, S1 {_change(lost('s1', other, 0))}, the graft "
                f"{_change(lost('graft', other, 0))}."
            )
    known = {
        arm: last[arm, Way(learning_rate=rate, replay=0)].get(NEW_FACTS) for arm in ("s1", "graft")
    }
    if known["s1"] and known["graft"]:
        sentences.append(
            f"Asked in chat, S1 then knows {known['s1'].mean:.0%} of the new facts, the graft "
            f"{known['graft'].mean:.0%}."
        )
    if len(domains) > 2:
        sentences.append(_of_distance(domains))
    return " ".join(sentences)


def _of_distance(domains: Sequence[DomainResult]) -> str:
    """Whether the farther text costs more, by the rank correlation (Spearman's rho) over texts."""
    near, far = (pick(domains, key=lambda domain: domain.nats_per_token) for pick in (min, max))
    distances = _ranks([domain.nats_per_token for domain in domains])
    words = []
    for arm, label in (("s1", "S1"), ("graft", "the graft")):
        losses = [domain.arms[arm][FORGOTTEN].mean for domain in domains]
        rho = correlation(distances, _ranks(losses)) if len(set(losses)) > 1 else 0.0
        words.append(
            f"{label} loses {_points(near.arms[arm][FORGOTTEN])} on {near.domain} and "
            f"{_points(far.arms[arm][FORGOTTEN])} on {far.domain} (rank correlation of distance "
            f"and loss {rho:+.2f})"
        )
    return (
        f"Of {len(domains)} texts, {near.domain} is nearest to what the base knows and "
        f"{far.domain} farthest: {'; '.join(words)}."
    )


def _change(lost: float) -> str:
    return f"loses {_in_points(lost)}" if lost >= 0 else f"gains {_in_points(-lost)}"


def _points(lost: Summary) -> str:
    return _in_points(lost.mean)


def _in_points(share: float) -> str:
    number = f"{100 * share:.0f}"
    return f"{number} point" if number == "1" else f"{number} points"


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [
        fmean([place for place, other in enumerate(ordered, 1) if other == value])
        for value in values
    ]
