"""What people and programs read."""

from __future__ import annotations

import json
import math

from lightning_lora.cli.diff import Difference, Differences
from lightning_lora.cli.merge import MergedLayer, MergeReport
from lightning_lora.cli.reports import columns, difference_text, listed, merge_text, number, plain, printable


def test_names_cannot_steer_a_terminal():
    assert printable("a\x1b[31mb\nc") == "a?[31mb?c"
    assert "\x1b" not in "\n".join(columns(("name", "r"), [("\x1b[2J", "1")]))
    assert "\x1b" not in "\n".join(listed("others", ["\x1b[2J"]))


def test_a_list_has_a_line_for_each_name():
    many = [f"layers.{i}.{name}" for i in range(300) for name in ("q", "k")]
    assert listed("unchanged", [*many, "head"]) == [
        "unchanged (601):", "  layers.*.q (300)", "  layers.*.k (300)", "  head",
    ]  # fmt: skip
    lines = listed("others", [f"w{i}" for i in range(25)])
    assert lines[20:] == ["  w19", "  and 5 more"] and not listed("others", [])


def test_columns_are_aligned():
    lines = columns(("layer", "r"), [("a", "16"), ("longer", "4")])
    assert lines == ["  layer    r", "  a       16", "  longer   4"]


def test_numbers():
    assert [number(value) for value in (None, 0.0, 1234.5678, 1e-9)] == ["-", "0", "1235", "1e-09"]


def test_json_has_no_nan():
    assert json.loads(json.dumps(plain({"a": [math.nan, 1.0], 2: (math.inf,)}), allow_nan=False)) == {
        "a": [None, 1.0],
        "2": [None],
    }


def test_worst_layers_come_first():
    layers = {f"l{i}": MergedLayer(1.0, 1.0, i / 100) for i in range(30)}
    lines = merge_text(MergeReport(layers), "out").splitlines()
    assert lines[2].split() == ["l29", "1", "1", "29.00%"]
    assert "  and 10 more, of which less was lost" in lines
    assert lines[0] == "out: 30 weights merged, 0 B"
    assert merge_text(MergeReport({"l0": MergedLayer(1.0, 1.0, 0.0)}), "out").startswith("out: 1 weight merged, 0 B")


def test_equal_things_need_no_table():
    rows = [Difference("a", 1.0, 1.0, 0.0, 1.0)]
    assert difference_text(Differences("models", rows), 5) == "tensors that differ: 0 of 1"
