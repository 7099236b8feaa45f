"""Suffixes, globs and regular expressions over dotted names."""

import fnmatch
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lora import LoRAConfig, names
from lightning_lora.names import covers, first_match, matches, nearest

few = settings(deadline=None, max_examples=60)
parts = st.text("abcq_0123", min_size=1, max_size=4)
dotted = st.lists(parts, min_size=1, max_size=5).map(".".join)

NAME = "net.layers.10.attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("q_proj", True),
        ("attn.q_proj", True),
        ("net.layers.10.attn.q_proj", True),
        ("proj", False),
        ("_proj", False),
        (".q_proj", False),
        ("attn", False),
        ("0.attn.q_proj", False),
        ("Q_PROJ", False),
        ("my.net.layers.10.attn.q_proj", False),
        ("*q_proj", True),
        ("q_*", True),
        ("?_proj", True),
        ("[qv]_proj", True),
        ("[kv]_proj", False),
        ("[!kv]_proj", True),
        ("layers.*.q_proj", True),
        ("layers.1.*", False),
        ("layers.1?.attn.*", True),
        ("ayers.*.q_proj", False),
        ("*", True),
        ("net.*", True),
        ("attn.*", True),
        ("Attn.*", False),
        (r"re:.*\.q_proj", True),
        (r"re:q_proj", False),
        (r"re:net\.layers\.\d+\.attn\.[qv]_proj", True),
        (r"re:net\.layers\.\d\.attn\.q_proj", False),
        (r"re:net", False),
        (r"re:(?i).*Q_PROJ", True),
    ],
)
def test_what_a_pattern_means(pattern, meant):
    assert matches(NAME, pattern) is meant


def test_a_dot_in_a_suffix_is_a_dot():
    assert not matches("netxq_proj", "net.q_proj")
    assert not matches("a.netxq_proj", "net.q_proj")


@few
@given(dotted, dotted)
@example("a.b", "a.b")
@example("aa.b", "a.b")
def test_a_plain_pattern_is_a_whole_tail_of_the_name(name, pattern):
    count = len(pattern.split("."))
    assert matches(name, pattern) == (name.split(".")[-count:] == pattern.split("."))


@pytest.mark.slow
@few
@given(dotted, dotted)
def test_a_regular_expression_must_match_the_whole_name(name, other):
    assert matches(name, "re:" + re.escape(other)) == (name == other)
    assert matches(f"{name}.{other}", "re:" + re.escape(name) + r"\..*")


@pytest.mark.slow
@few
@given(dotted, st.data())
def test_a_glob_matches_the_name_and_its_tails_only(name, data):
    tail = name.split(".")[data.draw(st.integers(0, name.count("."))) :]
    assert matches(name, ".".join(tail)[:-1] + "?")
    assert matches(name, ".".join(tail) + "*")
    assert not matches(name, "x" + ".".join(tail) + "*")


@pytest.mark.parametrize("argument", ["targets", "exclude", "also_train"])
def test_a_broken_regular_expression_is_refused_with_its_argument(argument):
    with pytest.raises(
        ValueError, match=rf"`{argument}` has 're:\(q', which cannot be used as a regular expression: missing \)"
    ):
        LoRAConfig(**{argument: ["re:(q"]})


def test_the_first_pattern_that_matches_counts():
    assert first_match([NAME], {"k_proj": 1, "attn.*": 2, "q_proj": 3}, 4) == 2
    assert first_match([NAME], {"q_proj": 3, "attn.*": 2}, 4) == 3
    assert first_match([NAME], {"k_proj": 1}, 4) == 4
    assert first_match([NAME], {}, None) is None


@pytest.mark.parametrize(
    ("patterns", "covered"),
    [
        (["attn"], True),
        (["layers"], True),
        (["net"], True),
        (["layers.10"], True),
        (["10"], True),
        (["q_proj"], True),
        (["layers.1"], False),
        (["k_proj", "layers.*.attn"], True),
        (["k_proj", "head"], False),
        ([r"re:net\.layers\.10"], True),
        ([r"re:layers\.10"], False),
        ([], False),
    ],
)
def test_a_pattern_covers_what_lies_inside_the_module_that_it_means(patterns, covered):
    assert covers(NAME, patterns) is covered


@few
@given(dotted, dotted)
def test_everything_under_a_name_is_covered_by_it(name, below):
    assert covers(f"{name}.{below}", [name])
    assert covers(name, [name])
    assert not covers(name, [f"{name}.{below}"])


NAMES = [f"layers.{i}.{part}" for i in range(12) for part in ("attn.q_proj", "attn.v_proj", "mlp.up_proj")] + ["head"]


@pytest.mark.parametrize(
    ("pattern", "first"),
    [
        ("q_porj", "layers.*.attn.q_proj"),
        ("up_prj", "layers.*.mlp.up_proj"),
        ("layers.5.mlp.upproj", "layers.*.mlp.up_proj"),
        ("heads", "head"),
        ("re:heed", "head"),
    ],
)
def test_the_nearest_name_comes_first_and_one_layer_stands_for_all(pattern, first):
    found = nearest(pattern, NAMES)
    assert found[0] == first
    assert len(set(found)) == len(found) <= 3


def test_some_names_come_even_when_none_is_near():
    assert nearest("zzzzzz", ["abc", "def"]) == ["abc", "def"]
    assert nearest("zzzzzz", []) == []


def test_of_the_many_or_long_names_of_a_stranger_few_are_compared():
    assert nearest("q_proj", ["a" * 100_000, "attn.q_proj"]) == ["attn.q_proj"]
    assert nearest("q_proj", (f"w{'x' * (i % 90)}.q_prop{i}" for i in range(1_000_000)), 1) != []


def test_modules_named_by_a_number_alone_are_not_shown_as_a_star():
    assert set(nearest("fc", ["0", "2"])) <= {"0", "2"}


@pytest.mark.slow
@few
@given(dotted, st.lists(dotted, max_size=8), st.integers(1, 4))
def test_nearest_gives_patterns_of_names_that_exist_and_no_more_than_asked_for(pattern, names, count):
    found = nearest(pattern, names, count)
    assert all(fnmatch.filter(names, one) for one in found)
    assert len(found) <= count
    assert bool(found) == bool(names)


def tied_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    model.add_module("again", model[1])
    model.register_module("missing", None)
    model._orig_mod = nn.Linear(2, 3)
    return model


def test_modules_and_parameters_come_as_torch_lists_them():
    model = tied_model()
    assert names.every_module(model) == list(model.named_modules(remove_duplicate=False))
    assert names.each_module_once(model) == list(model.named_modules())
    expected = [(name.replace("_orig_mod.", ""), id(p)) for name, p in model.named_parameters()]
    assert [(name, id(p)) for name, p in names.named_parameters(model)] == expected
    assert [(name, id(p)) for name, p in names.named_parameters(model, names.each_module_once(model))] == expected


def test_a_model_may_choose_its_parameters_itself():
    class Chosen(nn.Linear):
        def named_parameters(self, *args, **kwargs):
            return iter([("weight", self.weight)])

    assert [name for name, _ in names.named_parameters(Chosen(2, 2))] == ["weight"]
