"""A result with realistic numbers, as three seeds of the pocket study would give it."""

from fedgraft.evaluation.gate import decide
from fedgraft.evaluation.scorecard import Example, Score, Scorecard
from fedgraft.study.comparison import check_claims, summarise, verdict
from fedgraft.study.cost import StageCost
from fedgraft.study.result import (
    ARM_WORDS,
    ARMS,
    AdapterResult,
    ArmResult,
    Result,
    ScaleCurve,
    ScalePoint,
)

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
            costs.append(StageCost(stage=stage, seconds=seconds, num_tokens=400_000, flops=flops))
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
        verdict=verdict(summary, claims, decisions),
        claims=claims,
        decisions=decisions,
        arms=tuple(ArmResult(arm=arm, words=ARM_WORDS[arm], scorecards=cards[arm]) for arm in ARMS),
        summary=summary,
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
        costs=tuple(costs),
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
