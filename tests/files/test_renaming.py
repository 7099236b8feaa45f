"""What modules are called in the file of a model that holds theirs, or is a part of it."""

from __future__ import annotations

import pytest

from lightning_lora.files.renaming import renamings

NAMES = ["net.model.layers.0.q", "net.model.layers.1.q"]


def called(keys: set[str], leading: int = 1) -> list[tuple[str, list[str]]]:
    ways = renamings(NAMES, keys, lambda way: all(f"{way(name)}.weight" in keys for name in NAMES), leading)
    return [(start, [way(name) for name in NAMES]) for start, way in ways]


@pytest.mark.parametrize(
    ("before", "leading"),
    [("net.model.", 1), ("model.", 1), ("", 2)],
    ids=["the same names", "one part is missing", "two are"],
)
def test_leading_parts_that_the_file_lacks(before, leading):
    names = [f"{before}layers.{number}.q" for number in (0, 1)]
    assert called({f"{name}.weight" for name in names}, leading) == [("", names)]


def test_a_part_in_front_that_only_the_file_has():
    both = {f"{start}.{name}.weight" for start in ("student", "teacher") for name in NAMES}
    assert called({key for key in both if key.startswith("student")}) == [("student", [f"student.{n}" for n in NAMES])]
    assert [start for start, _ in called(both)] == ["student", "teacher"]


def test_none_fits_if_a_single_name_is_missing():
    assert called({"net.model.layers.0.q.weight"}) == [] == called(set())
