"""Lanternfield, a fictional company: who and what it has, in two years, drawn from one seed.

Year 1 is what the embedded base model has read. In year 2 new entities come and some facts change;
that is what continued pre-training has to learn. Every entity belongs to one part, which decides in
which dialogues it may appear:

    train        year 1; the instruct model was tuned on dialogues about it
    validation   years 1 and 2; for choosing a scale or a setting
    test         years 1 and 2; for the figures that are reported, looked at last
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from fedgraft.pocket.lexicon import KINDS, Attribute, Kind
from fedgraft.provenance import derive_seed

Part = Literal["train", "validation", "test"]
Group = Literal["old", "new"]

NUM_OLD: dict[Part, int] = {"train": 20, "validation": 4, "test": 6}
"""Entities of each kind in year 1, by part."""
NUM_NEW: dict[Part, int] = {"validation": 4, "test": 6}
"""New entities of each kind in year 2, by part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One value of one entity, e.g. the office of Mara Lindquist is Lisbon."""

    entity: str
    attribute: Attribute
    value: str
    department: str
    part: Part
    group: Group
    """`old`: true since year 1; `new`: first true in year 2."""

    def say(self, template: str) -> str:
        """A phrasing with the entity and the value filled in, its first letter a capital."""
        text = template.format(e=self.entity, v=self.value)
        return text[0].upper() + text[1:]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entity:
    """A person, a budget, a service, ... with its facts of one year."""

    name: str
    kind: Kind
    part: Part
    group: Group
    facts: tuple[Fact, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Company:
    """The entities of a year: all of them in year 1; the new and the changed ones in year 2."""

    year1: tuple[Entity, ...]
    year2: tuple[Entity, ...]

    @classmethod
    def found(cls, seed: int) -> "Company":
        """Draw a company; the same seed gives the same one."""
        year1: list[Entity] = []
        year2: list[Entity] = []
        for kind in KINDS:
            rng = Random(derive_seed(seed, "company", kind.name))
            names = _names(kind, rng)
            for part, count in NUM_OLD.items():
                year1 += [_draw(kind, next(names), part, "old", rng) for _ in range(count)]
            for part, count in NUM_NEW.items():
                year2 += [_draw(kind, next(names), part, "new", rng) for _ in range(count)]
            year1_of_kind = [entity for entity in year1 if entity.kind is kind]
            for part in NUM_NEW:
                settled = [entity for entity in year1_of_kind if entity.part == part]
                year2.append(_change_one_fact(rng.choice(settled), rng))
        return cls(year1=tuple(year1), year2=tuple(year2))

    def facts(self, part: Part, group: Group) -> list[Fact]:
        """What may be asked in year 2: old facts that still hold, or new ones."""
        new = [fact for entity in self.year2 for fact in entity.facts if fact.group == "new"]
        if group == "new":
            return [fact for fact in new if fact.part == part]
        outdated = {(fact.entity, fact.attribute.name) for fact in new}
        return [
            fact
            for entity in self.year1
            for fact in entity.facts
            if fact.part == part and (fact.entity, fact.attribute.name) not in outdated
        ]


def _names(kind: Kind, rng: Random) -> Iterator[str]:
    """Names of a kind in random order; no two share their first part."""
    for first in rng.sample(kind.first, len(kind.first)):
        yield kind.pattern.format(first=first, second=rng.choice(kind.second))


def _draw(kind: Kind, name: str, part: Part, group: Group, rng: Random) -> Entity:
    facts = tuple(
        Fact(
            entity=name,
            attribute=attribute,
            value=rng.choice(attribute.values),
            department=kind.department,
            part=part,
            group=group,
        )
        for attribute in kind.attributes
    )
    return Entity(name=name, kind=kind, part=part, group=group, facts=facts)


def _change_one_fact(entity: Entity, rng: Random) -> Entity:
    """The entity with another value for one attribute; its other facts stay old."""
    changed = rng.randrange(len(entity.facts))
    fact = entity.facts[changed]
    value = rng.choice([value for value in fact.attribute.values if value != fact.value])
    facts = list(entity.facts)
    facts[changed] = replace(fact, value=value, group="new")
    return replace(entity, group="new", facts=tuple(facts))
