"""Regular expressions that are matched in linear time: a checked subset of Python's, for patterns from strangers.

``re`` tries one way through an expression after the other, and of ``(a+)+$`` or ``.*.*.*=`` there are more ways than
anybody can wait for. Where there are few ``re`` matches; else all are followed at the same time (Thompson 1968): a step
takes the set of places in the name that can be reached, and gives the next set. A set is an integer with one bit for
each place. What a single character matches is asked from ``re`` there, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from lightning_lora.patterns.cost import (
    CHARACTERS,
    FEW_WAYS,
    MOST_STEPS,
    UNBOUNDED,
    check_flags,
    compiler,
    constants,
    parser,
    steps,
    ways,
)

LONGEST = 200_000  # characters; one that names every layer of a large model has tens of thousands


class Name:
    """A name, and for each character in it the set of its places."""

    def __init__(self, text: str) -> None:
        self.text, self.end = text, 1 << len(text)
        self.places: dict[str, int] = {}
        for place, character in enumerate(text):
            self.places[character] = self.places.get(character, 0) | 1 << place


Step = Callable[[Name, int], int]  # from the places reached so far to those reached next


class Expression:
    r"""A checked regular expression.

    Args:
        pattern: as for ``re.compile``, without back-references, conditions and repeats in an unbounded repeat.

    Raises:
        ValueError: saying what is not allowed.

    Example:
        >>> expression = Expression(r".*\.(?:q|v)_proj")
        >>> expression.fullmatch("layers.0.q_proj"), expression.fullmatch("layers.0.k_proj")
        (True, False)
    """

    _step: Step

    def __init__(self, pattern: str) -> None:
        if len(pattern) > LONGEST:
            raise ValueError(f"it has {len(pattern):,} characters, and {LONGEST:,} are allowed")
        try:
            tree = parser.parse(pattern)
            self.flags = tree.state.flags
            check_flags(self.flags)
            if steps(tree) > MOST_STEPS:
                raise ValueError("its repeats would take too long")
            self._plain = re.compile(pattern) if ways(tree) <= FEW_WAYS else None
            if self._plain is None:
                self._step = self._sequence(tree)
        except (re.error, OverflowError) as error:
            raise ValueError(str(error).encode("unicode_escape").decode()[:200]) from error
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error

    def fullmatch(self, name: str) -> bool:
        """Whether the whole ``name`` matches, as with ``re.fullmatch``."""
        if self._plain is not None:
            return self._plain.fullmatch(name) is not None
        known = _name(name)
        return bool(self._step(known, 1) & known.end)

    def match(self, name: str) -> bool:
        """Whether a beginning of ``name`` matches, as with ``re.match``."""
        if self._plain is not None:
            return self._plain.match(name) is not None
        return self._step(_name(name), 1) != 0

    def _sequence(self, items: Any) -> Step:
        steps = [self._item(*item) for item in items]
        if len(steps) == 1:
            return steps[0]

        def follow(name: Name, places: int) -> int:
            for step in steps:
                if not places:
                    break
                places = step(name, places)
            return places

        return follow

    def _item(self, kind: Any, what: Any) -> Step:
        kind = str(kind)
        if kind in CHARACTERS:
            return self._character((kind, what))
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):  # greedy or not, the same names match
            return self._repeat(*what)
        if kind == "BRANCH":
            return _either([self._sequence(branch) for branch in what[1]])
        if kind == "SUBPATTERN":
            return self._group(*what)
        if kind == "AT":
            return self._at(str(what))
        return self._look(kind, *what)

    def _group(self, number: int | None, added: int, removed: int, items: Any) -> Step:
        outer, self.flags = self.flags, (self.flags | added) & ~removed
        step = self._sequence(items)
        self.flags = outer
        return step

    def _character(self, item: tuple[str, Any]) -> Step:
        accepts = _accepts(self, item)

        def follow(name: Name, places: int) -> int:
            return (places & accepts(name)) << 1

        return follow

    def _repeat(self, least: Any, most: Any, items: Any) -> Step:
        least, most = int(least), int(most)
        if len(items) == 1 and str(items[0][0]) in CHARACTERS and most == UNBOUNDED:
            return _run(_accepts(self, (str(items[0][0]), items[0][1])), least)
        step = self._sequence(items)

        def follow(name: Name, places: int) -> int:
            for _ in range(least):
                places = step(name, places) if places else 0
            new, rounds = places, least
            while new and rounds < most:
                new = step(name, new) & ~places
                places, rounds = places | new, rounds + 1
            return places

        return follow

    def _at(self, what: str) -> Step:
        if what in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return lambda name, places: places & 1
        if what in ("AT_END", "AT_END_STRING"):  # no name ends in a line feed
            return lambda name, places: places & name.end
        inside = what == "AT_NON_BOUNDARY"
        letters = _accepts(self, ("IN", [(constants.CATEGORY, constants.CATEGORY_WORD)]))

        def follow(name: Name, places: int) -> int:
            word = letters(name)
            edges = word ^ (word << 1)
            return places & (~edges if inside else edges)

        return follow

    def _look(self, kind: str, direction: int, items: Any) -> Step:
        step, wanted = self._sequence(items), kind == "ASSERT"
        back = items.getwidth()[0] if direction < 0 else 0

        def holds(name: Name, place: int) -> bool:
            if place < back:
                return False
            reached = step(name, 1 << place - back)
            return bool(reached & 1 << place) if direction < 0 else reached != 0

        def follow(name: Name, places: int) -> int:
            return sum(1 << place for place in _each(places) if holds(name, place) is wanted)

        return follow


def _accepts(expression: Expression, item: tuple[str, Any]) -> Callable[[Name], int]:
    """The places of the characters that one item of an expression matches."""
    kind, what = item
    flags, memo = expression.flags, dict[str, bool]()
    if kind == "LITERAL" and not flags & re.IGNORECASE:
        character = chr(what)
        return lambda name: name.places.get(character, 0)
    state = parser.State()
    state.flags = flags
    matches = compiler.compile(parser.SubPattern(state, [(getattr(constants, kind), what)])).fullmatch

    def places(name: Name) -> int:
        reached = 0
        for character, where in name.places.items():
            if character not in memo:
                memo[character] = matches(character) is not None
            if memo[character]:
                reached |= where
        return reached

    return places


def _run(accepts: Callable[[Name], int], least: int) -> Step:
    """At least so many accepted characters. A sum carries each place to the end of its run of accepted ones."""

    def follow(name: Name, places: int) -> int:
        accepted = accepts(name)
        for _ in range(least):
            places = (places & accepted) << 1
        return places | (((places & accepted) + accepted) ^ accepted)

    return follow


def _either(branches: list[Step]) -> Step:
    def follow(name: Name, places: int) -> int:
        reached = 0
        for branch in branches:
            reached |= branch(name, places)
        return reached

    return follow


def _each(places: int) -> list[int]:
    return [place for place in range(places.bit_length()) if places >> place & 1]


@lru_cache(maxsize=1 << 14)
def _name(text: str) -> Name:
    return Name(text)


@lru_cache(maxsize=1 << 16)  # a configuration may have one for each layer
def expression(pattern: str) -> Expression:
    """The checked expression of ``pattern``, made once.

    Raises:
        ValueError: saying what is not allowed in it.
    """
    return Expression(pattern)
