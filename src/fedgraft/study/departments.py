"""Ways to an adapter for each department, over one graft, made and scored.

                    trained at            on the text of        adapters
    graft           -                     -                     none
    clients         each client           that client           one a client
    fedavg, ...     clients, together     its department        one a department, by each rule
    global          clients, together     all departments       one
    alone           one place             its department        one a department
    pooled          one place             all departments       one

Every arm has one budget of tokens for the whole organisation, counted over all its adapters:
rounds x clients x tokens of one client in one round. A client that trains alone has its share of
it, a department the shares of its clients, `pooled` all of it. Each rounds to whole steps.

All arms are scored on the same test documents and dialogues of each department; clients score what
they get and make on documents of their own that are held out beside those.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import expm1
from pathlib import Path
from statistics import fmean
from typing import Any

from fedgraft.errors import StudyError
from fedgraft.provenance import Record, derive_seed
from fedgraft.study.estimate import estimate
from fedgraft.study.material import Clients, shared_out
from fedgraft.study.result import (
    ALL,
    DEPARTMENT_ARMS,
    NATS,
    PERSONAL,
    RULE_WORDS,
    Departments,
    Scored,
    ScoredModel,
    Scores,
    Summary,
    Together,
)
from fedgraft.study.run import versions
from fedgraft.study.stage import Say, run_stage
from fedgraft.study.study import Study
from fedgraft.study.together import Federating, holdings, num_tokens, read_scored, write_scored
from fedgraft.text.corpus import Document
from fedgraft.training.adapter import train_adapter

Values = dict[str, dict[int, dict[str, dict[str, float]]]]
"""Arm -> seed -> department -> score -> value."""


def run(
    study: Study, out: Path, *, say: Say = lambda _: None, num_processes: int = 1
) -> Departments:
    """Make and score every arm for every seed, and write `result.json` into `out`.

    Finished stages are kept: after an interruption, or with more seeds, the same call goes on.

    Raises StudyError for a study of another kind, and for text that cannot be shared out.
    """
    if study.kind != "departments":
        raise StudyError(
            f"{study.name}: expected a study of departments (`federation` with `rules`), found one "
            f"of {study.kind}; run it with fedgraft.study.{study.kind}.run"
        )
    _Departments(study, out, say, num_processes).everything()
    return Departments.load(out)


class _Departments(Federating):
    """One run of a study of departments."""

    def everything(self) -> None:
        study, part = self.study, self.study.federation
        assert part
        shares = {
            seed: shared_out(self.material.splits, part.partition, seed) for seed in study.seeds
        }
        estimates = estimate(self.study, self.out, say=self.say, num_processes=self.num_processes)
        self.extract()
        scored: list[Scored] = []
        federations: list[Together] = []
        tokens: dict[str, int] = {}
        for seed, clients in shares.items():
            grafted = self.grafted(seed)
            scored += self._graft(seed, grafted)
            budget = num_tokens(self.plan(clients, seed))
            of_all = sum(map(len, clients.values()))
            scored += self._clients(seed, grafted, clients, budget // of_all)
            for rule in part.rules:
                found, together = self._together(seed, grafted, clients, rule)
                scored += found
                federations.append(together)
            found, together = self._together(seed, grafted, clients, "global")
            scored += found
            federations.append(together)
            scored += self._alone(seed, grafted, clients, budget // of_all)
            scored += self._pooled(seed, grafted, budget)
            tokens = dict.fromkeys(("clients", *part.rules, "global", "alone", "pooled"), budget)
        values, weighted = means(scored), means(scored, weighted=True)
        summary = over_seeds(values)
        Departments(
            name=study.name,
            question=study.question,
            verdict=verdict(summary),
            seeds=study.seeds,
            words={arm: words for arm, words in DEPARTMENT_ARMS.items() if arm in values},
            scored=tuple(scored),
            summary=summary,
            weighted=over_seeds(weighted),
            tokens=tokens,
            partition=holdings(shares[study.seeds[0]], part.partition),
            federations=tuple(federations),
            residual=self.residual_facts(),
            losses=self.losses,
            estimates=estimates,
            costs=tuple(self.costs),
            prices=self.study.prices,
            settings=study.as_written,
            inputs=self.inputs(),
            versions=versions(),
        ).write(self.out)

    def _together(
        self, seed: int, grafted: Path, clients: Clients, arm: str
    ) -> tuple[list[Scored], Together]:
        one_for_all = {"share": "organisation", "mixing": None}
        changes = one_for_all if arm == "global" else {"rule": arm}
        words = "one for all" if arm == "global" else RULE_WORDS[arm]  # type: ignore[index]
        return self.federate(
            grafted,
            clients,
            self.plan(clients, seed, **changes),
            Path(f"seed-{seed}", arm),
            arm=arm,
            seed=seed,
            title=f"seed {seed}: train together, {words}",
            personal=arm == PERSONAL,
        )

    def _graft(self, seed: int, grafted: Path) -> list[Scored]:
        departments = list(self.material.splits)

        def make(folder: Path) -> None:
            scored = self.scored(grafted, None, departments, arm="graft", seed=seed, kind="graft")
            write_scored(folder, scored)

        place = Path(f"seed-{seed}", "scores", "graft")
        record = run_stage(
            self.out / place,
            title=f"seed {seed}: score the graft alone",
            inputs={"model": self.hash_of(grafted), "test": self.material.test_hash},
            settings=self.study.evaluation.model_dump(mode="json"),
            make=make,
            say=self.say,
        )
        self.cost(place.as_posix(), record)
        return read_scored(self.out / place)

    def _clients(self, seed: int, grafted: Path, clients: Clients, budget: int) -> list[Scored]:
        return [
            one
            for department, ours in clients.items()
            for client, splits in ours.items()
            for one in self._trained(
                seed,
                grafted,
                splits.train,
                [department],
                arm="clients",
                kind="client",
                budget=budget,
                client=client,
            )
        ]

    def _alone(self, seed: int, grafted: Path, clients: Clients, budget: int) -> list[Scored]:
        return [
            one
            for department, split in self.material.splits.items()
            for one in self._trained(
                seed,
                grafted,
                split.train,
                [department],
                arm="alone",
                kind="department",
                budget=budget * len(clients[department]),
            )
        ]

    def _pooled(self, seed: int, grafted: Path, budget: int) -> list[Scored]:
        everybody = list(self.material.splits)
        return self._trained(
            seed, grafted, self.material.new, everybody, arm="pooled", kind="global", budget=budget
        )

    def _trained(
        self,
        seed: int,
        grafted: Path,
        documents: Sequence[Document],
        departments: Sequence[str],
        *,
        arm: str,
        kind: ScoredModel,
        budget: int,
        client: str | None = None,
    ) -> list[Scored]:
        """Train an adapter at one place and score it on the test material of departments."""
        part = self.study.federation
        assert part
        whose = client or (departments[0] if len(departments) == 1 else "")
        changed = {"seed": derive_seed(seed, arm, whose), "num_tokens": budget}
        settings = part.training.model_copy(update=changed)
        rows = self.rows(documents, seed)
        label = f"{arm} {whose}".strip() + f", seed {seed}"

        def make(folder: Path) -> dict[str, Any]:
            adapter = train_adapter(
                grafted, rows, folder / "adapter", settings, department=whose or None, label=label
            )
            found = self.scored(
                grafted,
                adapter,
                departments,
                arm=arm,
                seed=seed,
                kind=kind,
                client=client,
                num_documents=len(documents) if client else 0,
            )
            write_scored(folder, found)
            record = Record.read(adapter)
            assert record
            return record.figures

        place = Path(f"seed-{seed}", arm, whose)
        record = run_stage(
            self.out / place,
            title=f"seed {seed}: adapter, {arm} {whose}".rstrip(),
            inputs={
                "model": self.hash_of(grafted),
                "text": rows.content_hash,
                "test": self.material.test_hash,
            },
            settings={
                **settings.model_dump(),
                **self.study.evaluation.model_dump(),
                "departments": list(departments),
            },
            make=make,
            say=self.say,
        )
        self.cost(label, record, trained=True)
        return read_scored(self.out / place)


def means(scored: Iterable[Scored], *, weighted: bool = False) -> Values:
    """The mean of each score over the clients of a department; then over departments, each alike.

    Args:
        weighted: Weight clients by the documents they train on, and give arms of clients alone.
    """
    found: dict[str, dict[int, dict[str, list[Scored]]]] = {}
    for one in scored:
        if one.client or not weighted:
            of_seed = found.setdefault(one.arm, {}).setdefault(one.seed, {})
            of_seed.setdefault(one.department, []).append(one)
    values: Values = {}
    for arm, seeds in found.items():
        for seed, departments in seeds.items():
            own = {name: _mean(ones, weighted=weighted) for name, ones in departments.items()}
            names = dict.fromkeys(name for scores in own.values() for name in scores)
            whole = {
                name: fmean(scores[name] for scores in own.values())
                for name in names
                if all(name in scores for scores in own.values())
            }
            values.setdefault(arm, {})[seed] = {**own, ALL: whole}
    return values


def _mean(scored: Sequence[Scored], *, weighted: bool) -> dict[str, float]:
    names = dict.fromkeys(name for one in scored for name in one.scores)
    means = {}
    for name in names:
        known = [one for one in scored if name in one.scores]
        weights = [one.num_documents for one in known] if weighted else None
        means[name] = fmean([one.scores[name] for one in known], weights)
    return means


def over_seeds(values: Values) -> Scores:
    """Mean and spread of each score over the seeds that have it."""
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    for arm, seeds in values.items():
        for departments in seeds.values():
            for department, found in departments.items():
                for name, value in found.items():
                    of_department = scores.setdefault(arm, {}).setdefault(department, {})
                    of_department.setdefault(name, []).append(value)
    return {
        arm: {
            department: {
                name: Summary.of(known, "nats" if name == NATS else "share")
                for name, known in found.items()
            }
            for department, found in departments.items()
        }
        for arm, departments in scores.items()
    }


def verdict(summary: Mapping[str, Mapping[str, Mapping[str, Summary]]]) -> str:
    """A few sentences that follow from the figures by rule: perplexity on test text, the mean over
    departments, of the best rule against the graft, against each client alone, and against text
    that is put together; then what it cost of the instructions.
    """
    nats = {
        arm: found[ALL][NATS].mean for arm, found in summary.items() if NATS in found.get(ALL, {})
    }
    rules = [rule for rule in RULE_WORDS if rule in nats]
    if "graft" not in nats or not rules:
        return "No rule was scored beside the graft, so that nothing can be said."
    best = min(rules, key=nats.__getitem__)
    gained = _change(nats["graft"], nats[best])
    sentences = [
        f"Training together, a department's clients predict its text {gained} than the graft alone "
        f"(perplexity, {RULE_WORDS[best]}, the best of {len(rules)} "
        f"rule{'s' if len(rules) > 1 else ''})."
    ]
    against = {
        "clients": "each client by itself",
        "global": "one adapter for all departments",
        "alone": "the department's text at one place",
        "pooled": "all text at one place",
    }
    told = [
        f"{_change(nats[arm], nats[best])} than with {words}"
        for arm, words in against.items()
        if arm in nats
    ]
    if told:
        sentences.append(f"That is {', '.join(told)}.")
    worst = max(rules, key=nats.__getitem__)
    if len(rules) > 1:
        spread = _change(nats[best], nats[worst])
        sentences.append(f"The last of the rules, {RULE_WORDS[worst]}, is {spread} than the first.")
    right = {
        arm: found[ALL].get("instructions/right_and_as_instructed")
        for arm, found in summary.items()
        if ALL in found
    }
    before, after = right.get("graft"), right.get(best)
    if before and after:
        sentences.append(
            f"Right and as instructed are {after.mean:.0%} of its answers, {before.mean:.0%} of "
            "the graft's."
        )
    return " ".join(sentences)


def _change(before: float, after: float) -> str:
    """`12.3% better`: of perplexity."""
    change = 100 * expm1(after - before)
    return f"{abs(change):.1f}% {'better' if change < 0 else 'worse'}"
