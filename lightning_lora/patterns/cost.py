"""What a match of a regular expression costs at most, and which expressions are not allowed.

The standard library's parser reads them; it is not public, and had other names until Python 3.11.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from math import inf, prod
from typing import Any

NEW = sys.version_info >= (3, 11)
parser: Any = import_module("re._parser" if NEW else "sre_parse")
compiler: Any = import_module("re._compiler" if NEW else "sre_compile")
constants: Any = import_module("re._constants" if NEW else "sre_constants")

MOST_STEPS = 1_000_000  # that one match may take
LONGEST_NAME = 500  # of a module, for the bound on steps
UNBOUNDED = int(constants.MAXREPEAT)
FEW_WAYS = 2 * LONGEST_NAME**2  # that `re` goes in milliseconds: two repeats and two alternatives
FLAGS = re.IGNORECASE | re.ASCII | re.UNICODE | re.DOTALL | re.VERBOSE
CHARACTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")


def steps(items: Any, repeated: bool = False) -> int:
    """How many steps a match takes at most; ``repeated``: within a repeat that is unbounded.

    Raises:
        ValueError: if the expression has what is not allowed.
    """
    return 1 + sum(_steps_of(str(kind), what, repeated) for kind, what in items)


def _steps_of(kind: str, what: Any, repeated: bool) -> int:
    if kind in (*CHARACTERS, "AT"):
        return 1
    if kind == "BRANCH":
        return sum(steps(branch, repeated) for branch in what[1])
    if kind == "SUBPATTERN":
        check_flags(what[1] | what[2])
        return steps(what[3], repeated)
    if kind in ("ASSERT", "ASSERT_NOT"):
        return LONGEST_NAME * steps(what[1], repeated)
    if kind not in ("MAX_REPEAT", "MIN_REPEAT"):
        raise ValueError(f"{NOT_ALLOWED.get(kind, kind)} are not allowed: write the alternatives out")
    most, items = int(what[1]), what[2]
    if most == UNBOUNDED and repeated:
        raise ValueError("a repeat without a bound inside another is not allowed: write `.*` for both")
    inside = steps(items, repeated or most == UNBOUNDED)
    simple = most == UNBOUNDED and len(items) == 1 and str(items[0][0]) in CHARACTERS
    return inside * (int(what[0]) + (1 if simple else min(most, LONGEST_NAME)))


def check_flags(flags: int) -> None:
    """Raise at flags that change what a name is: several lines, the locale."""
    if flags & ~FLAGS:
        raise ValueError("only the flags a, i, s, u and x are allowed")


def ways(items: Any) -> float:
    """How many ways through the expression ``re`` tries at most on a name that does not match."""
    return prod(_ways_of(str(kind), what) for kind, what in items)


def _ways_of(kind: str, what: Any) -> float:
    if kind == "BRANCH":
        return sum(map(ways, what[1]))
    if kind in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return ways(what[-1])
    if kind not in ("MAX_REPEAT", "MIN_REPEAT"):
        return 1.0
    least, most, inside = int(what[0]), min(int(what[1]), LONGEST_NAME), ways(what[2])
    if inside == 1:
        return max(1.0, most - least + 1)
    return inf if most > 9 else sum(inside**times for times in range(most + 1))


NOT_ALLOWED = {
    "GROUPREF": "back-references",
    "GROUPREF_EXISTS": "conditions",
    "ATOMIC_GROUP": "atomic groups",
    "POSSESSIVE_REPEAT": "possessive repeats",
}
