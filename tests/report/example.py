"""A result with realistic numbers, as three seeds of the pocket study would give it."""

from statistics import fmean, stdev

from tests.evaluation.cards import card as card_of

from fedgraft.evaluation.gate import decide
from fedgraft.evaluation.scorecard import (
    FOLLOWED,
    RIGHT_AND_FOLLOWED,
    Example,
    Score,
    Scorecard,
)
from fedgraft.federation.aggregate import Rule
from fedgraft.federation.history import History, Part, Round, means
from fedgraft.noise import Spent
from fedgraft.study.comparison import check_claims, compare, summarise, verdict
from fedgraft.study.cost import Estimate, Prices, StageCost
from fedgraft.study.departments import means as department_means
from fedgraft.study.departments import over_seeds
from fedgraft.study.departments import verdict as departments_verdict
from fedgraft.study.federation import verdict as federation_verdict
from fedgraft.study.result import (
    ARM_WORDS,
    ARMS,
    CURVE_ARMS,
    DEPARTMENT_ARMS,
    FORGOTTEN,
    NEW_FACTS,
    OLD_FACTS,
    TEXT,
    AdapterResult,
    ArmResult,
    Carried,
    Comparison,
    CurvePoint,
    Departments,
    DomainResult,
    Federation,
    Forgetting,
    Holding,
    Holdings,
    Point,
    Result,
    ScaleCurve,
    ScalePoint,
    Scored,
    ScoredModel,
    Summary,
    Together,
    Way,
    WayCompared,
)
from fedgraft.study.result import NATS as RESULT_NATS

CURVE_SCORES = (FOLLOWED, OLD_FACTS, NEW_FACTS, TEXT)

DEPARTMENTS = ("finance", "hr", "engineering", "it_support")
SHARES = {  # score -> base, instruct, s1, pretrained_base, graft
    "instructions/prompt_strict": (0.01, 0.93, 0.44, 0.01, 0.86),
    "instructions/prompt_loose": (0.02, 0.94, 0.47, 0.02, 0.87),
    "instructions/instruction_strict": (0.03, 0.95, 0.52, 0.04, 0.89),
    "instructions/right_and_as_instructed": (0.00, 0.46, 0.31, 0.01, 0.64),
    "instructions/prompt_strict/old": (0.01, 0.94, 0.47, 0.01, 0.87),
    "instructions/prompt_strict/new": (0.01, 0.92, 0.41, 0.01, 0.85),
    "knowledge/asked/old": (0.05, 0.78, 0.70, 0.06, 0.77),
    "knowledge/asked/new": (0.02, 0.05, 0.62, 0.08, 0.61),
    "knowledge/recall/old": (0.81, 0.79, 0.77, 0.80, 0.80),
    "knowledge/recall/new": (0.05, 0.05, 0.66, 0.68, 0.64),
}
NATS = {
    "finance": (2.31, 2.38, 1.42, 1.36, 1.41),
    "hr": (2.12, 2.20, 1.30, 1.25, 1.31),
    "engineering": (2.47, 2.51, 1.61, 1.55, 1.60),
    "it_support": (2.25, 2.31, 1.38, 1.33, 1.39),
}
PROMPTS = (
    ("In which office does Mara Lindquist work? Answer in capital letters only.", "LISBON"),
    ("What is the limit of the Harbour budget? Give the answer in JSON format.", "12,000 euros"),
)


def scorecard(arm: str, seed: int | None, *, with_dialogues: bool = True) -> Scorecard:
    place = ARMS.index(arm)
    shift = 0.0 if seed is None else 0.012 * (seed - 2)
    scores = {}
    if with_dialogues:
        for name, means in SHARES.items():
            value = min(1.0, max(0.0, means[place] + shift))
            scores[name] = Score(value=value, num=280, stderr=0.02, unit="share")
    for department, nats in NATS.items():
        name = f"perplexity/{department}"
        value = nats[place] + shift
        scores[f"{name}/nats_per_token"] = Score(value=value, num=9100, stderr=0.01, unit="nats")
        scores[f"{name}/bits_per_byte"] = Score(
            value=0.45 * value, num=9100, stderr=0.01, unit="bits"
        )
    good = arm in ("instruct", "graft")
    examples = [
        Example(
            prompt=prompt,
            answer=f"THE ANSWER IS {answer}." if good else "The the office of <b>the</b> office",
            right=good,
            as_instructed=good,
        )
        for prompt, answer in PROMPTS
    ]
    return Scorecard(
        arm=arm, seed=seed, scores=scores, examples=tuple(examples) if with_dialogues else ()
    )


def example_result(seeds: tuple[int, ...] = (1, 2, 3), *, with_dialogues: bool = True) -> Result:
    """A result of all arms; without dialogues it is what real departments give."""
    cards = {
        arm: tuple(
            scorecard(arm, seed, with_dialogues=with_dialogues)
            for seed in ((None,) if arm in ("base", "instruct") else seeds)
        )
        for arm in ARMS
    }
    references = {arm: cards[arm][0] for arm in ("base", "instruct")}
    decisions = tuple(decide(card, references) for card in cards["graft"])
    summary = summarise(card for found in cards.values() for card in found)
    claims = check_claims(summary)
    costs = [StageCost(stage="extract", seconds=0.4)]
    losses = {}
    for seed in seeds:
        for arm, seconds in (("s1", 46.1), ("pretrained_base", 44.5)):
            stage = f"{arm}, seed {seed}"
            flops = 6.0 * 2_360_000 * 400_000
            costs.append(
                StageCost(
                    stage=stage, work="training", seconds=seconds, num_tokens=400_000, flops=flops
                )
            )
            drop = 2.2 if arm == "s1" else 2.0
            losses[stage] = tuple(
                (step, round(1.3 + drop / (1 + step / 12) + 0.01 * seed, 4))
                for step in range(1, 101)
            )
        costs.append(StageCost(stage=f"scale, seed {seed}", seconds=31.0))
        costs.append(StageCost(stage=f"graft, seed {seed}", seconds=0.31))
    followed = {0.6: 0.52, 0.8: 0.71, 1.0: 0.84, 1.2: 0.88, 1.4: 0.86}
    known = {0.6: 0.66, 0.8: 0.65, 1.0: 0.62, 1.2: 0.58, 1.4: 0.47}
    return Result(
        name="pocket",
        question="Does a graft keep the instructions that continued pre-training destroys?",
        verdict=verdict(summary, claims, decisions, compare(cards)),
        claims=claims,
        decisions=decisions,
        arms=tuple(ArmResult(arm=arm, words=ARM_WORDS[arm], scorecards=cards[arm]) for arm in ARMS),
        summary=summary,
        comparisons=compare(cards),
        scales=tuple(
            ScaleCurve(
                seed=seed,
                metric="instructions/right_and_as_instructed",
                points=tuple(
                    ScalePoint(
                        scale=scale,
                        scores={
                            "instructions/prompt_strict": share,
                            "instructions/right_and_as_instructed": share * known[scale] * 1.2,
                            "knowledge/asked/new": known[scale],
                        },
                    )
                    for scale, share in followed.items()
                )
                if with_dialogues
                else (ScalePoint(scale=1.0, scores={}),),
                chosen=1.0 + 0.2 * (seed % 2) if with_dialogues else 1.0,
            )
            for seed in seeds
        ),
        adapters=tuple(
            AdapterResult(
                department=department,
                seed=seed,
                nats_per_token_before=NATS[department][4],
                nats_per_token_after=NATS[department][4] - 0.18,
                followed_before=0.86 if with_dialogues and department != "hr" else None,
                followed_after=0.81 if with_dialogues and department != "hr" else None,
            )
            for seed in seeds
            for department in DEPARTMENTS
        ),
        residual={"num_parameters": 2_360_000, "relative_norm": 0.1731, "num_not_restored": 12},
        losses=losses,
        estimates=(
            Estimate(
                work="training",
                machine="a machine",
                rate=1e11,
                num_runs=2 * len(seeds),
                paper_flops=2 * len(seeds) * 6.0 * 2_360_000 * 400_000,
                operations=2 * len(seeds) * 5.5 * 2_360_000 * 400_000,
                seconds=115.3 * 2 * len(seeds),
            ),
        ),
        costs=tuple(costs),
        prices=Prices(currency="EUR", watts=60, per_kwh=0.3),
        tuning={
            "pretraining_flops": 6.0 * 2_360_000 * 400_000,
            "graft_flops": 2.0 * 2_360_000,
            "tuning_flops": 6.0 * 2_360_000 * 1_600_000,
            "ratio": 4.0,
        },
        tokens=400_000,
        settings={
            "name": "pocket",
            "family": {"base": "/a/place/weights/base", "instruct": "/a/place/weights/instruct"},
            "pretrain": {"num_tokens": 400_000, "learning_rate": 5e-4},
            "adapters": None,
            "seeds": list(seeds),
        },
        inputs={"base": "sha256:" + "1a" * 32, "instruct": "sha256:" + "2b" * 32},
        versions={"fedgraft": "0.1.0", "torch": "2.13.0"},
    )


def example_forgetting(seeds: tuple[int, ...] = (1, 2, 3)) -> Forgetting:
    """A curve of forgetting with realistic numbers: two rates, with replay and without."""
    budgets = (25_000, 50_000, 100_000, 200_000, 400_000)
    ways = [Way(learning_rate=r, replay=s) for r in (2e-4, 4e-4) for s in (0.0, 0.3)]
    points, losses, rates = [], {}, {}
    for seed in seeds:
        for way in ways:
            for arm in ("s1", "pretrained_base"):
                stage = f"{arm}, {way.words}, seed {seed}"
                losses[stage] = tuple((n, 1.3 + 2 / (1 + n / 12) + 0.01 * seed) for n in range(100))
                rates[stage] = tuple((n, way.learning_rate * min(1, n / 5)) for n in range(100))
            for place, budget in enumerate(budgets):
                read = (place + 1) / len(budgets) * way.learning_rate / 4e-4 * (1 - way.replay)
                shift = 0.02 * (seed - 2)
                for arm, scores in {
                    "s1": (0.93 - 0.5 * read, 0.8 - 0.2 * read, 0.6 * read, 2.3 - read),
                    "pretrained_base": (0.01, 0.05, 0.06, 2.2 - read),
                    "graft": (0.93 - 0.1 * read, 0.8 - 0.1 * read, 0.55 * read, 2.25 - read),
                }.items():
                    values = [max(0.0, value + shift) for value in scores]
                    points.append(
                        Point(
                            arm=arm,
                            way=way,
                            num_tokens=budget,
                            seed=seed,
                            scores=dict(zip(CURVE_SCORES, values, strict=True)),
                        )
                    )
    groups: dict[tuple[str, Way, int], list[Point]] = {}
    for point in points:
        groups.setdefault((point.arm, point.way, point.num_tokens), []).append(point)
    curves = tuple(
        CurvePoint(
            arm=arm,
            way=way,
            num_tokens=budget,
            scores={
                name: over([point.scores[name] for point in found], nats=name == TEXT)
                for name in CURVE_SCORES
            },
        )
        for (arm, way, budget), found in groups.items()
    )
    shifts = {"company, year 2": 2.9, "news": 4.6, "real finance": 4.5, "real it support": 5.9}
    return Forgetting(
        name="forgetting_curve",
        question="How much does a model still follow, the more it has read?",
        verdict="After 400,000 tokens S1 loses 50 points, the graft loses 10 points.",
        seeds=seeds,
        own="company, year 2",
        words={arm: ARM_WORDS[arm] for arm in ("base", "instruct", *CURVE_ARMS)},
        references={
            "base": dict(zip(CURVE_SCORES, (0.0, 0.02, 0.0, 2.9), strict=True)),
            "instruct": dict(zip(CURVE_SCORES, (0.94, 0.8, 0.05, 3.0), strict=True)),
        },
        points=tuple(points),
        curves=curves,
        domains=tuple(
            DomainResult(
                domain=name,
                nats_per_token=nats,
                num_tokens=100_000,
                arms={
                    arm: {
                        FORGOTTEN: over([lost, lost + 0.05]),
                        TEXT: over([nats - 1, nats - 0.9], nats=True),
                    }
                    for arm, lost in (("s1", nats / 12), ("graft", nats / 40 - 0.08))
                },
            )
            for name, nats in shifts.items()
        ),
        comparisons=tuple(WayCompared(way=way, comparisons=told_apart(way)) for way in ways),
        residual={"num_parameters": 2_360_000, "relative_norm": 0.1731},
        losses=losses,
        learning_rates=rates,
        costs=(StageCost(stage="s1, rate 0.0002, no replay, seed 1", seconds=52.0),),
        settings={"pretrain": {"learning_rate": 4e-4}, "seeds": list(seeds)},
        inputs={"base": "sha256:" + "1a" * 32},
        versions={"fedgraft": "0.1.0", "torch": "2.13.0"},
    )


def told_apart(way: Way) -> tuple[Comparison, ...]:
    """Forty prompts of three arms after the most tokens; S1 follows fewer the higher the rate."""
    followed = {"instruct": 38, "graft": 36, "s1": round(36 - 5e4 * way.learning_rate)}
    return compare(
        {
            arm: [card_of([1.0] * right + [0.0] * (40 - right), arm=arm, name=FOLLOWED)]
            for arm, right in followed.items()
        }
    )


def over(values: list[float], *, nats: bool = False) -> Summary:
    return Summary(
        mean=fmean(values),
        lowest=min(values),
        highest=max(values),
        stdev=stdev(values) if len(values) > 1 else None,
        num_seeds=len(values),
        unit="nats" if nats else "share",
    )


MEMBERS = {department: tuple(f"{department}-{n}" for n in (1, 2, 3)) for department in DEPARTMENTS}


def example_history(
    rule: Rule = "fedavg", seed: int = 1, *, shared: bool = False, num_rounds: int = 3
) -> History:
    """Rounds of twelve clients; one is late in the second round, and one update is refused."""
    adapter = "global" if shared else "department"
    rounds = []
    for number in range(1, num_rounds + 1):
        parts = [
            example_part(client, department, number, adapter, seed)
            for department, clients in MEMBERS.items()
            for client in clients
        ]
        if number == 2:
            parts[0] = Part(client="finance-1", department="finance", fault="late", seconds=9.0)
            refused = "client 'hr-2': expected finite numbers in 'x', found NaN or infinity; lower"
            parts[4] = parts[4].model_copy(update={"refused": refused, "scores": {}, "drift": None})
        rounds.append(
            Round(
                number=number,
                parts=tuple(parts),
                kept={"hr": "hr: expected updates of 3 of 3 clients, found 2"}
                if number == 2
                else {},
                means=means(parts),
                seconds={"select": 0.5, "train": 20.0, "aggregate": 0.25, "write": 0.125},
            )
        )
    final = [
        example_part(client, department, num_rounds + 1, adapter, seed)
        for department, clients in MEMBERS.items()
        for client in clients
    ]
    return History(
        name="departments",
        plan={"rule": rule, "share": "organisation" if shared else "department"},
        model="sha256:" + "3c" * 32,
        transport="in process",
        rounds=tuple(rounds),
        final=tuple(final),
    )


def example_part(client: str, department: str, number: int, adapter: str, seed: int) -> Part:
    place = int(client[-1])
    nats = NATS[department][4] - 0.1 * number + 0.02 * place + 0.01 * seed
    return Part(
        client=client,
        department=department,
        num_examples=40 + 10 * place,
        num_scored=1000 * place,
        scores={"graft" if number == 1 else adapter: nats, "client": nats - 0.03},
        loss=nats - 0.2,
        moved=0.4,
        drift=0.1 * place + 0.05 * number,
        seconds_training=1.0,
        seconds_scoring=0.25,
        seconds=1.5,
        bytes_up=440_000,
        bytes_down=450_000,
    )


TRAFFIC = {
    "adapter": Carried(num_messages=36, bytes_up=15_840_000, bytes_down=16_200_000),
    "scores": Carried(num_messages=12, bytes_up=3_600, bytes_down=5_400_000),
    "sizes": Carried(num_messages=12, bytes_up=2_400, bytes_down=6_000),
}
HOLDINGS = Holdings(
    words="each department's documents, cut at random into clients of equal size",
    labels=tuple(sorted(DEPARTMENTS)),
    clients=tuple(
        Holding(
            client=client,
            department=department,
            counts=tuple(
                60 + 7 * number if label == department else 0 for label in sorted(DEPARTMENTS)
            ),
            num_train=48 + 7 * number,
            num_held_out=6,
        )
        for department, clients in MEMBERS.items()
        for number, client in enumerate(clients)
    ),
    skew=0.75,
)


def example_departments(
    seeds: tuple[int, ...] = (1, 2, 3), rules: tuple[Rule, ...] = ("fedavg", "fedsa", "fedex")
) -> Departments:
    """A study of departments with realistic numbers."""
    gains = {"graft": 0.0, "clients": 0.1, "global": 0.12, "alone": 0.2, "pooled": 0.22}
    gains |= {rule: 0.14 + 0.01 * place for place, rule in enumerate(rules)}
    models: dict[str, ScoredModel] = {"graft": "graft", "global": "global", "pooled": "global"}
    scored = []
    for seed in seeds:
        for arm in gains:
            for department in DEPARTMENTS:
                personal = arm in ("clients", "fedsa")
                for place, client in enumerate(MEMBERS[department] if personal else (None,)):
                    nats = NATS[department][4] - gains[arm] + 0.01 * place + 0.004 * seed
                    right = 0.6 + gains[arm] / 10 - 0.01 * place - 0.002 * seed
                    scored.append(
                        Scored(
                            arm=arm,
                            department=department,
                            seed=seed,
                            model="client" if client else models.get(arm, "department"),
                            client=client,
                            num_documents=50 * (place + 1) if client else 0,
                            scores={
                                RESULT_NATS: nats,
                                RIGHT_AND_FOLLOWED: right,
                                FOLLOWED: right + 0.2,
                            },
                        )
                    )
    summary = over_seeds(department_means(scored))
    return Departments(
        name="departments",
        question="What do departments gain by training together?",
        verdict=departments_verdict(summary),
        seeds=seeds,
        words={arm: words for arm, words in DEPARTMENT_ARMS.items() if arm in gains},
        scored=tuple(scored),
        summary=summary,
        weighted=over_seeds(department_means(scored, weighted=True)),
        tokens=dict.fromkeys([arm for arm in gains if arm != "graft"], 192_000),
        partition=HOLDINGS,
        federations=tuple(
            Together(
                rule=rule,
                seed=seed,
                shared=shared,
                history=example_history(rule, seed, shared=shared),
                traffic=TRAFFIC,
            )
            for seed in seeds
            for rule, shared in [*((rule, False) for rule in rules), (rules[0], True)]
        ),
        residual={"num_parameters": 2_360_000, "relative_norm": 0.1731},
        losses={"alone hr, seed 1": ((1, 2.5), (2, 2.4))},
        costs=(StageCost(stage="seed-1/fedavg", seconds=61.0, num_tokens=192_000),),
        settings={"federation": {"num_rounds": 3, "rules": list(rules)}, "seeds": list(seeds)},
        inputs={"base": "sha256:" + "1a" * 32},
        versions={"fedgraft": "0.1.0", "torch": "2.13.0"},
    )


def example_federation(privacy: Spent | None = None) -> Federation:
    """What `fedgraft federate` finds, with realistic numbers."""
    history = example_history().model_copy(update={"privacy": privacy})
    return Federation(
        name="handbooks",
        question="What do the departments learn together?",
        verdict=federation_verdict(history),
        history=history,
        traffic=TRAFFIC,
        partition=HOLDINGS,
        seconds=63.2,
        settings={"name": "handbooks", "num_rounds": 3},
        inputs={"model": history.model},
        versions={"fedgraft": "0.1.0", "torch": "2.13.0"},
    )
