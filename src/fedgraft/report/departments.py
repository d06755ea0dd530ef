"""Departments that train together, as one HTML page: a study of them, or one federation.

    study          each arm against the graft alone, department by department; then every rule's
    federation     learning curves, drift, traffic, time, privacy and refusals, which a run of
                   `fedgraft federate` shows alone

Every model that was scored has its name: the graft, or it with a client's, a department's or the
global adapter. Of clients' models there is a mean that counts each client alike, and one that is
weighted. What was not measured is shown as missing; privacy is spoken of where epsilon and delta
are known, and nowhere else.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import expm1
from statistics import fmean

from fedgraft.evaluation.scorecard import FOLLOWED, RIGHT_AND_FOLLOWED
from fedgraft.federation.history import History
from fedgraft.federation.ledger import MODELS
from fedgraft.report import figures
from fedgraft.report.figures import Series
from fedgraft.report.template import fill
from fedgraft.report.words import (
    Plot,
    Tile,
    amount,
    count,
    duration,
    figure,
    flatten,
    power,
    score,
    size,
    spaced,
    spread,
    took,
)
from fedgraft.study.result import (
    ALL,
    NATS,
    PERSONAL,
    RULE_WORDS,
    Departments,
    Federation,
    Holdings,
    Summary,
    Together,
)

LABELS: Mapping[str, str] = {
    "graft": "graft alone",
    "clients": "each client alone",
    **{str(rule): words for rule, words in RULE_WORDS.items()},
    "global": "one for all",
    "alone": "department, pooled",
    "pooled": "all text pooled",
}
COLOURS: Mapping[str, str] = {
    "graft": figures.GREEN,
    "clients": figures.GREY,
    "fedavg": figures.BLUE,
    "ffa": figures.SKY,
    "fedsa": figures.ORANGE,
    "flora": figures.VERMILION,
    "flexlora": figures.PURPLE,
    "fedex": figures.INK,
    "global": figures.GREY,
    "alone": figures.GREEN,
    "pooled": figures.SOFT,
}
DOTS = (figures.BLUE, figures.ORANGE, figures.GREEN, figures.PURPLE, figures.VERMILION, figures.SKY)
"""Colours of departments, in their order."""
TABLES = {
    NATS: (
        "Held-out text",
        "Nats per token on the department's test documents, which no arm has read; lower is "
        "better.",
    ),
    RIGHT_AND_FOLLOWED: (
        "Right, and as instructed",
        "Share of the department's held-out prompts with the right fact in the form that was asked "
        "for; higher is better.",
    ),
    FOLLOWED: (
        "Instructions followed",
        "Share of the department's held-out prompts whose every instruction is met; higher is "
        "better.",
    ),
}
PARTS = {
    "training": ("training", figures.BLUE),
    "scoring": ("scoring", figures.SKY),
    "transport": ("transport", figures.ORANGE),
    "waiting": ("waiting", figures.GREY),
    "aggregation": ("aggregation", figures.VERMILION),
    "writing": ("writing", figures.PURPLE),
}
"""What the time of a round goes into, for the mean client: together they are its clock time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One arm in a table."""

    arm: str
    label: str
    model: str
    """The model that was scored, in words."""
    cells: tuple[Summary | None, ...]
    """Of each department, then of all."""
    num_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One score of every arm, department by department."""

    title: str
    caption: str
    rows: tuple[Row, ...]


def render(result: Departments) -> str:
    """The page of a study of departments."""
    departments = _departments(result)
    return fill(
        "departments.html",
        *(duration, count, power, figure, score, spread, size, took, amount),
        result=result,
        labels=LABELS,
        colours=COLOURS,
        departments=[spaced(name) for name in departments],
        tiles=list(_tiles(result)),
        plots=list(_arm_plots(result, departments)),
        tables=list(_tables(result, departments)),
        settings=list(flatten(result.settings)),
        **sections(result.federations, result.partition),
    )


def render_federation(result: Federation) -> str:
    """The page of one federation."""
    history = result.history
    together = Together(
        rule=history.plan.get("rule", "fedavg"),  # type: ignore[arg-type]
        seed=0,
        shared=history.plan.get("share") == "organisation",
        history=history,
        traffic=result.traffic,
    )
    return fill(
        "federation.html",
        *(duration, count, power, figure, score, spread, size, took, amount),
        result=result,
        tiles=list(_run_tiles(result)),
        finals=_final_rows(history),
        scored=_scored(history),
        settings=list(flatten(result.settings)),
        **sections((together,), result.partition),
    )


def sections(federations: Sequence[Together], partition: Holdings | None) -> dict[str, object]:
    """What the pages of both have: curves, drift, traffic, time, partition, privacy, refusals."""
    return {
        "curves": list(_curves(federations)),
        "drift": _drift(federations),
        "traffic": list(_traffic_rows(federations)),
        "time": _time_plot(federations),
        "times": list(_time_rows(federations)),
        "time_heads": [words for words, _ in PARTS.values()],
        "several_seeds": len({one.seed for one in federations}) > 1,
        "partition": partition,
        "heat": heat(partition) if partition else [],
        "held_in_words": _held_in_words(federations, partition),
        "privacy": [
            (_name(one, federations), one.history.privacy)
            for one in federations
            if one.history.privacy
        ],
        "refusals": list(_refusals(federations)),
        "kept": list(_kept(federations)),
        "mixed": list(_mixed(federations)),
        "num_answers": sum(len(done.parts) for one in federations for done in one.history.rounds),
    }


def _held_in_words(federations: Sequence[Together], partition: Holdings | None) -> str:
    """What the table of who has what counts, and what of it takes no part."""
    history = next((one.history for one in federations), None)
    noun = history.examples if history else "documents"
    sentences = [f"{noun.capitalize()} of each client; a tenth or two of them are held out."]
    if partition and partition.num_duplicates:
        sentences.append(f"{partition.num_duplicates:,} that say what others say were dropped.")
    if history and history.left_out:
        told = ", ".join(f"{name} {number:,}" for name, number in sorted(history.left_out.items()))
        sentences.append(f"Longer than a row, and left out though counted here: {told}.")
    return " ".join(sentences)


def _departments(result: Departments) -> list[str]:
    return list(dict.fromkeys(scored.department for scored in result.scored))


def _models(result: Departments) -> dict[str, str]:
    """Arm -> the kind of model that was scored."""
    return {scored.arm: scored.model for scored in result.scored}


def _tiles(result: Departments) -> Iterator[Tile]:
    """Perplexity of the best rule, of the clients alone and of the pooled text, to the graft's."""
    graft = _summary(result, "graft", ALL, NATS)
    if not graft:
        return
    rules = {
        rule: found
        for rule in RULE_WORDS
        if (found := _summary(result, rule, ALL, NATS)) is not None
    }
    best = [rule for rule, _ in sorted(rules.items(), key=lambda named: named[1].mean)][:1]
    wanted = ["clients", *best, "alone", "pooled"]
    for arm in wanted:
        if found := _summary(result, arm, ALL, NATS):
            first = "the best rule, " if arm in best else ""
            yield Tile(
                value=f"{100 * expm1(found.mean - graft.mean):+.1f}%",
                words=f"perplexity against the graft alone: {first}{LABELS[arm]}",
                colour=COLOURS[arm],
            )


def _summary(result: Departments, arm: str, department: str, name: str) -> Summary | None:
    return result.summary.get(arm, {}).get(department, {}).get(name)


def _arm_plots(result: Departments, departments: Sequence[str]) -> Iterator[Plot]:
    arms = [arm for arm in result.words if arm != "graft"]
    series = []
    for number, department in enumerate(departments):
        before = _summary(result, "graft", department, NATS)
        after = [_summary(result, arm, department, NATS) for arm in arms]
        series.append(
            Series(
                name=spaced(department),
                colour=DOTS[number % len(DOTS)],
                x=[
                    100 * expm1(one.mean - before.mean) if one and before else None for one in after
                ],
            )
        )
    yield Plot(
        title="How much better each department's text is predicted",
        svg=figures.changes(series, [LABELS[arm] for arm in arms]),
        caption="Change in perplexity on the department's held-out documents against the graft "
        "alone, mean over seeds; further left is better.",
    )
    asked = [arm for arm in result.words if _summary(result, arm, ALL, RIGHT_AND_FOLLOWED)]
    if asked:
        rows = []
        for arm in result.words:
            found = _by_seed(result, arm, RIGHT_AND_FOLLOWED)
            rows.append(
                Series(name=LABELS[arm], colour=COLOURS[arm], x=[100 * value for value in found])
            )
        yield Plot(
            title="Right, and as instructed",
            svg=figures.bars(rows),
            caption="Share of held-out prompts with the right fact in the form that was asked for, "
            "mean over departments. A dot is a seed, the dark line their range.",
        )


def _by_seed(result: Departments, arm: str, name: str) -> list[float]:
    """The mean over departments of an arm's score, seed by seed; of clients each counts alike."""
    values: dict[int, dict[str, list[float]]] = {}
    for one in result.scored:
        if one.arm == arm and name in one.scores:
            of_seed = values.setdefault(one.seed, {})
            of_seed.setdefault(one.department, []).append(one.scores[name])
    return [fmean(map(fmean, found.values())) for _, found in sorted(values.items())]


def _tables(result: Departments, departments: Sequence[str]) -> Iterator[Table]:
    """A table for each score that any arm has."""
    models = _models(result)
    places = (*departments, ALL)
    for name, (title, caption) in TABLES.items():
        rows = []
        for arm in result.words:
            rows.append(
                Row(
                    arm=arm,
                    label=LABELS[arm],
                    model=models.get(arm, "missing"),
                    cells=tuple(_summary(result, arm, place, name) for place in places),
                    num_tokens=result.tokens.get(arm),
                )
            )
            if weighted := result.weighted.get(arm):
                rows.append(
                    Row(
                        arm=arm,
                        label=f"{LABELS[arm]}, weighted by documents",
                        model=models.get(arm, "missing"),
                        cells=tuple(weighted.get(place, {}).get(name) for place in places),
                    )
                )
        if any(cell for row in rows for cell in row.cells):
            yield Table(title=title, caption=caption, rows=tuple(rows))


def _name(one: Together, among: Sequence[Together]) -> str:
    """What tells a federation from the others: its rule, and its seed where there are several."""
    label = RULE_WORDS[one.rule] + (", one for all" if one.shared else "")
    several = len({other.seed for other in among}) > 1
    return f"{label}, seed {one.seed}" if several else label


def _kinds(federations: Sequence[Together]) -> dict[tuple[str, bool], list[Together]]:
    """Federations that differ in nothing but the seed."""
    kinds: dict[tuple[str, bool], list[Together]] = {}
    for one in federations:
        kinds.setdefault((one.rule, one.shared), []).append(one)
    return kinds


def _colour(rule: str, shared: bool) -> str:
    return COLOURS["global"] if shared else COLOURS[rule]


def _label(rule: str, shared: bool) -> str:
    return LABELS["global"] if shared else LABELS[rule]


def _curves(federations: Sequence[Together]) -> Iterator[Plot]:
    """A panel a department: each rule's adapter by the rounds behind it, on clients' own text."""
    groups = dict.fromkeys(
        department for one in federations for department in one.history.final_means
    )
    groups |= dict.fromkeys(
        department
        for one in federations
        for done in one.history.rounds
        for department in done.means
    )
    names = [name for name in groups if name != ALL]
    for department in [*names, ALL] if len(names) > 1 else names:
        series = []
        for (rule, shared), found in _kinds(federations).items():
            lines = [learning(one.history, department) for one in found]
            for model in ("department", "global", "client"):
                known = [line[model] for line in lines if model in line]
                if known and (model != "client" or len(federations) == 1 or rule == PERSONAL):
                    label, colour = _label(rule, shared), _colour(rule, shared)
                    if model == "client" and rule != PERSONAL:
                        label, colour = "clients' own", figures.GREY
                    series.append(_band(label, colour, known))
        before = [
            mean.weighted
            for one in federations
            for done in one.history.rounds[:1]
            if (mean := done.means.get(department, {}).get("graft"))
        ]
        levels = [
            Series(name="graft alone", colour=figures.GREEN, x=(), y=(fmean(before or [0.0]),))
        ]
        yield Plot(
            title="All departments" if department == ALL else spaced(department),
            svg=figures.curves(
                series,
                levels=levels if before else [],
                x_label="rounds",
                y_label="nats per token",
                logarithmic=False,
            ),
            caption="",
        )


def learning(history: History, department: str) -> dict[str, dict[int, float]]:
    """Adapter -> rounds behind it -> nats per token, weighted by tokens; at 0 the graft alone.

    FedSA-LoRA has clients' adapters alone: a department's is made when all is done.
    """
    found: dict[str, dict[int, float]] = {}
    for done in history.rounds:
        for model, mean in done.means.get(department, {}).items():
            behind = done.number if model == "client" else done.number - 1
            found.setdefault(model, {})[behind] = mean.weighted
    for model, mean in history.final_means.get(department, {}).items():
        found.setdefault(model, {})[len(history.rounds)] = mean.weighted
    start = found.pop("graft", {})
    return {
        model: line | start
        for model, line in found.items()
        if model == "client" or history.plan.get("rule") != PERSONAL
    }


def _band(name: str, colour: str, lines: Sequence[Mapping[int, float]]) -> Series:
    """The mean of some lines, in the band of their lowest and highest."""
    places = sorted({place for line in lines for place in line})
    at = [[line[place] for line in lines if place in line] for place in places]
    return Series(
        name=name,
        colour=colour,
        x=places,
        y=[fmean(values) for values in at],
        low=[min(values) for values in at],
        high=[max(values) for values in at],
    )


def _drift(federations: Sequence[Together]) -> Plot | None:
    """How far clients pull apart in each round."""
    series = []
    for (rule, shared), found in _kinds(federations).items():
        lines = []
        for one in found:
            line = {}
            for done in one.history.rounds:
                known = [part.drift for part in done.parts if part.drift is not None]
                if known:
                    line[done.number] = fmean(known)
            if line:
                lines.append(line)
        if lines:
            series.append(_band(_label(rule, shared), _colour(rule, shared), lines))
    if not series:
        return None
    return Plot(
        title="Client drift",
        svg=figures.curves(
            series, levels=[], x_label="round", y_label="1 - cosine", logarithmic=False
        ),
        caption="1 - cosine of a client's change of its adapter and the mean change of its group, "
        "mean over clients: 0 is the same way, 1 at right angles, 2 against it.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What the federations of one rule carried, mean over seeds."""

    label: str
    num_messages: float
    bytes_up: float
    bytes_down: float
    kinds: tuple[tuple[str, float, float, float], ...]
    """Kind of message, messages, bytes up and down."""


def _traffic_rows(federations: Sequence[Together]) -> Iterator[Load]:
    for (rule, shared), found in _kinds(federations).items():
        kinds = dict.fromkeys(kind for one in found for kind in one.traffic)
        known = [one for one in found if one.traffic]
        if not known:
            continue
        rows = []
        for kind in kinds:
            carried = [one.traffic[kind] for one in known if kind in one.traffic]
            rows.append(
                (
                    kind,
                    sum(c.num_messages for c in carried) / len(known),
                    sum(c.bytes_up for c in carried) / len(known),
                    sum(c.bytes_down for c in carried) / len(known),
                )
            )
        yield Load(
            label=_label(rule, shared),
            num_messages=sum(row[1] for row in rows),
            bytes_up=sum(row[2] for row in rows),
            bytes_down=sum(row[3] for row in rows),
            kinds=tuple(rows),
        )


def time_split(history: History) -> dict[str, float]:
    """Seconds of all rounds by what they went into, for the mean client; see PARTS."""
    spent = dict.fromkeys(PARTS, 0.0)
    for done in history.rounds:
        clock = done.seconds.get("select", 0.0) + done.seconds.get("train", 0.0)
        heard = [part for part in done.parts if part.seconds]
        training, scoring, answering = (
            fmean(getattr(part, name) for part in heard) if heard else 0.0
            for name in ("seconds_training", "seconds_scoring", "seconds")
        )
        spent["training"] += training
        spent["scoring"] += scoring
        spent["transport"] += max(0.0, answering - training - scoring)
        spent["waiting"] += max(0.0, clock - answering)
        spent["aggregation"] += done.seconds.get("aggregate", 0.0)
        spent["writing"] += done.seconds.get("write", 0.0)
    return spent


def _times(federations: Sequence[Together]) -> dict[str, dict[str, float]]:
    """Label -> part -> seconds, mean over seeds."""
    times = {}
    for (rule, shared), found in _kinds(federations).items():
        splits = [time_split(one.history) for one in found if one.history.rounds]
        if splits:
            times[_label(rule, shared)] = {
                part: fmean(split[part] for split in splits) for part in PARTS
            }
    return times


def _time_plot(federations: Sequence[Together]) -> Plot | None:
    times = _times(federations)
    if not times:
        return None
    series = [
        Series(name=words, colour=colour, x=[split[part] for split in times.values()])
        for part, (words, colour) in PARTS.items()
    ]
    together = {one.history.transport for one in federations}
    turns = (
        " Clients of one process take turns, so that most of a client's time is waiting."
        if together == {"in process"}
        else ""
    )
    return Plot(
        title="Where the time of the rounds went",
        svg=figures.shares(series, list(times), duration),
        caption=f"On the clock, as the mean client sees it: waiting is for the others.{turns}",
    )


def _time_rows(federations: Sequence[Together]) -> Iterator[tuple[str, list[float]]]:
    for label, split in _times(federations).items():
        yield label, [*split.values(), sum(split.values())]


def heat(partition: Holdings) -> list[tuple[str, str, list[tuple[str, str]], int, int]]:
    """Client, department, (count, background) of each label, documents to train on, held out."""
    most = max((number for one in partition.clients for number in one.counts), default=0)

    def cell(number: int) -> tuple[str, str]:
        if not number:
            return "", "transparent"
        return f"{number:,}", f"rgba(0, 114, 178, {0.1 + 0.5 * number / most:.2f})"

    return [
        (
            one.client,
            spaced(one.department),
            [cell(number) for number in one.counts],
            one.num_train,
            one.num_held_out,
        )
        for one in partition.clients
    ]


def _refusals(federations: Sequence[Together]) -> Iterator[tuple[str, str, str, int | None]]:
    """Federation, client, fault or reason, how often: every answer that did not count.

    None: who was not asked again, since it cannot take part.
    """
    for one in federations:
        for client, reason in one.history.excluded.items():
            yield _name(one, federations), client, _reason(reason), None
        found = Counter(
            (part.client, part.fault or _reason(part.refused))
            for done in one.history.rounds
            for part in done.parts
            if not part.counted
        )
        for (client, reason), number in sorted(found.items()):
            yield _name(one, federations), client, reason, number


def _reason(refused: str | None) -> str:
    """What the server said of an update, without the client that it begins with."""
    words = refused or ""
    return words.partition(": ")[2] if words.startswith("client ") else words


def _kept(federations: Sequence[Together]) -> Iterator[tuple[str, int, str, str]]:
    """Federation, round, group, why it keeps its last adapter."""
    for one in federations:
        for done in one.history.rounds:
            for group, why in done.kept.items():
                yield _name(one, federations), done.number, group, why


def _mixed(federations: Sequence[Together]) -> Iterator[tuple[str, int, str]]:
    """Federation, round, the departments that moved towards each other."""
    for one in federations:
        for done in one.history.rounds:
            clusters = [" and ".join(map(spaced, found)) for found in done.clusters]
            if clusters:
                yield _name(one, federations), done.number, "; ".join(clusters)


def _final_rows(history: History) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """Department -> model, weighted, unweighted, number of clients; the organisation last."""
    first = history.rounds[0].means if history.rounds else {}
    means = {
        place: {**{m: mean for m, mean in first.get(place, {}).items() if m == "graft"}, **models}
        for place, models in history.final_means.items()
    }
    places = [name for name in means if name != ALL]
    places += [ALL] if len(places) > 1 else []
    return [
        (
            "all departments" if place == ALL else spaced(place),
            [
                (model, f"{mean.weighted:.3f}", f"{mean.unweighted:.3f}", str(mean.num_clients))
                for model, mean in sorted(
                    means[place].items(), key=lambda named: MODELS.index(named[0])
                )
            ],
        )
        for place in places
    ]


def _scored(history: History) -> str:
    return "answers" if history.examples == "dialogues" else "text"


def _run_tiles(result: Federation) -> Iterator[Tile]:
    """Perplexity of the last adapter against the graft; bytes and time."""
    means = result.history.final_means.get(ALL, {})
    rounds = result.history.rounds
    before = rounds[0].means.get(ALL, {}).get("graft") if rounds else None
    for model in ("department", "global"):
        if before and (after := means.get(model)):
            yield Tile(
                value=f"{100 * expm1(after.weighted - before.weighted):+.1f}%",
                words=f"perplexity on held-out {_scored(result.history)}, with the {model} "
                "adapter against the graft alone",
                colour=figures.GREEN,
            )
    up = sum(carried.bytes_up for carried in result.traffic.values())
    down = sum(carried.bytes_down for carried in result.traffic.values())
    yield Tile(value=size(up), words="left the clients", colour=figures.ORANGE)
    yield Tile(value=size(down), words="went to the clients", colour=figures.SKY)
    yield Tile(
        value=duration(result.seconds),
        words=f"on the clock, {len(rounds)} rounds",
        colour=figures.GREY,
    )
