"""The arguments: what is accepted, what they mean, and the words that refuse the rest."""

import dataclasses
import enum
import io
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch

from lightning_lora import LoRACallback, LoRAConfig, apply_lora
from lightning_lora.config import RunConfig
from lightning_lora.names import matches

REFUSED = [
    ({"r": 0}, ValueError, r"`r` must be at least 1, but got 0\. To train no adapter, leave LoRA out\."),
    ({"r": -3}, ValueError, r"`r` must be at least 1, but got -3"),
    ({"r": 8.0}, TypeError, r"`r` must be an integer, but got 8\.0"),
    ({"r": True}, TypeError, r"`r` must be an integer, but got True"),
    ({"r": "8"}, TypeError, r"`r` must be an integer, but got '8'"),
    ({"r": None}, TypeError, r"`r` must be an integer, but got None"),
    ({"alpha": 0}, ValueError, r"`alpha` must be positive and finite, but got 0"),
    ({"alpha": -1.5}, ValueError, r"`alpha` must be positive and finite, but got -1\.5"),
    ({"alpha": math.inf}, ValueError, r"`alpha` must be positive and finite, but got inf"),
    ({"alpha": math.nan}, ValueError, r"`alpha` must be positive and finite, but got nan"),
    ({"alpha": "16"}, TypeError, r"`alpha` must be a number, but got '16'"),
    ({"alpha": True}, TypeError, r"`alpha` must be a number, but got True"),
    ({"targets": "q_proj"}, ValueError, r"`targets` must be one of the presets 'attn', 'qv', 'mlp', 'all' or a list"),
    ({"targets": "q_proj"}, ValueError, r"but got 'q_proj'\. To adapt modules of that name write targets=\['q_proj'\]"),
    ({"targets": []}, ValueError, r"`targets` must name at least one module, but got \[\]"),
    ({"targets": None}, TypeError, r"`targets` must be a list of module names, but got None"),
    ({"targets": {"q_proj"}}, TypeError, r"`targets` must be a list of module names, but got \{'q_proj'\}"),
    ({"targets": [""]}, TypeError, r"`targets` must hold module names as non-empty strings, but got ''"),
    ({"targets": ["re:"]}, TypeError, r"`targets` must hold module names as non-empty strings, but got 're:'"),
    ({"targets": [3]}, TypeError, r"`targets` must hold module names as non-empty strings, but got 3"),
    ({"exclude": "head"}, TypeError, r"`exclude` must be a list of module names, but got 'head'"),
    ({"exclude": [None]}, TypeError, r"`exclude` must hold module names as non-empty strings, but got None"),
    ({"also_train": "head"}, TypeError, r"`also_train` must be a list of module names, but got 'head'"),
    ({"dropout": 1.0}, ValueError, r"`dropout` must be a probability in \[0, 1\), but got 1\.0"),
    ({"dropout": -0.1}, ValueError, r"`dropout` must be a probability in \[0, 1\), but got -0\.1"),
    ({"dropout": math.nan}, ValueError, r"`dropout` must be a probability in \[0, 1\), but got nan"),
    ({"init": "zeros"}, ValueError, r"`init` must be one of 'kaiming', 'gaussian', but got 'zeros'"),
    ({"bias": True}, ValueError, r"`bias` must be one of 'none', 'all', 'lora_only', but got True"),
    ({"rslora": 1}, TypeError, r"`rslora` must be a bool, but got 1"),
    ({"seed": 1.0}, TypeError, r"`seed` must be an integer or None, but got 1\.0"),
    ({"seed": True}, TypeError, r"`seed` must be an integer or None, but got True"),
    ({"name": "a.b"}, ValueError, r"`name` must be a Python identifier.* but got 'a\.b'"),
    ({"name": ""}, ValueError, r"`name` must be a Python identifier.* but got ''"),
    ({"name": None}, ValueError, r"`name` must be a Python identifier.* but got None"),
    ({"rank_pattern": {"q": 0}}, ValueError, r"`rank_pattern\['q'\]` must be at least 1, but got 0"),
    ({"rank_pattern": {"q": 2.5}}, TypeError, r"`rank_pattern\['q'\]` must be an integer, but got 2\.5"),
    ({"alpha_pattern": {"q": -1}}, ValueError, r"`alpha_pattern\['q'\]` must be positive and finite, but got -1"),
    ({"alpha_pattern": {"q": None}}, TypeError, r"`alpha_pattern\['q'\]` must be a number, but got None"),
    ({"rank_pattern": ["q"]}, TypeError, r"`rank_pattern` must .*, but got \['q'\]"),
    ({"alpha_pattern": 3}, TypeError, r"`alpha_pattern` must .*, but got 3"),
    ({"rank_pattern": {1: 2}}, TypeError, r"`rank_pattern` must .*, but got .*1"),
]


REFUSED_OF_A_RUN = [
    ({"merge": "first"}, ValueError, r"`merge` must be one of True, False, 'last', 'best', but got 'first'"),
    ({"merge": 1}, ValueError, r"`merge` must be one of True, False, 'last', 'best', but got 1"),
    ({"merge": None}, ValueError, r"`merge` must be one of True, False, 'last', 'best', but got None"),
    ({"lr_scale": 0.0}, ValueError, r"`lr_scale` must be positive and finite, but got 0\.0"),
    ({"lr_scale": None}, TypeError, r"`lr_scale` must be a number, but got None"),
    ({"liveness": 1}, TypeError, r"`liveness` must be a bool, but got 1"),
    ({"init_from": 3}, TypeError, r"`init_from` must be a path as a string, but got 3"),
    ({"export": ["a"]}, TypeError, r"`export` must be a path as a string, but got \['a'\]"),
    ({"base_dtype": "fp8"}, ValueError, r"`base_dtype` must be one of None, 'bf16', 'fp16', but got 'fp8'"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED_OF_A_RUN, ids=[str(c[0]) for c in REFUSED_OF_A_RUN])
def test_refused_arguments_of_a_run(arguments, error, words):
    with pytest.raises(error, match=words):
        RunConfig(**arguments)
    with pytest.raises(error, match=words):
        LoRACallback(**arguments)


@pytest.mark.parametrize("argument", [field.name for field in dataclasses.fields(RunConfig)])
def test_an_argument_of_a_run_is_no_argument_of_the_adapter(argument):
    with pytest.raises(
        TypeError, match=rf"`{argument}` is an argument of LoRACallback, not of LoRAConfig: .* Write Lo"
    ):
        LoRAConfig(**{argument: getattr(RunConfig(), argument)})


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_refused_arguments_say_what_was_expected_and_what_came(arguments, error, words):
    with pytest.raises(error, match=words):
        LoRAConfig(**arguments)


@pytest.mark.parametrize("name", ["keys", "items", "values", "pop", "enabled", "active_pairs", "training", "forward"])
def test_names_that_a_module_dict_has_taken_are_refused_before_anything_changes(name):
    model = torch.nn.Linear(4, 2)
    with pytest.raises(ValueError, match=rf"`name` .*'{name}'"):
        apply_lora(model, LoRAConfig(name=name, targets="all"))
    assert type(model) is torch.nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "arguments",
    [
        {"r": 1},
        {"alpha": 0.5},
        {"targets": ["q_proj", "re:.*v_proj"]},
        {"exclude": []},
        {"dropout": 0},
        {"dropout": 0.999},
        {"seed": -1},
        {"name": "A"},
    ],
    ids=str,
)
def test_the_edges_of_what_is_accepted_stay_as_given(arguments):
    config = LoRAConfig(**arguments)
    assert {key: getattr(config, key) for key in arguments} == arguments


def test_defaults_are_those_of_the_design():
    assert dataclasses.asdict(LoRAConfig()) == {
        "r": 8,
        "alpha": None,
        "targets": "attn",
        "exclude": None,
        "dropout": 0.0,
        "init": "kaiming",
        "rslora": False,
        "bias": "none",
        "also_train": None,
        "rank_pattern": None,
        "alpha_pattern": None,
        "seed": None,
        "name": "default",
        "adapters": None,
    }
    assert dataclasses.asdict(RunConfig()) == {
        "compute": "auto",
        "route": None,
        "balance": False,
        "keep": None,
        "lr_scale": 1.0,
        "merge": True,
        "liveness": True,
        "init_from": None,
        "export": None,
        "base_dtype": None,
        "save": "adapter",
        "merged": None,
        "dequantize": False,
        "merge_base": None,
    }


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRAConfig().r = 4


# Arguments, and the rank, alpha and scale of `layers.0.q_proj`.
SCALES = [
    ({}, 8, 8.0, 1.0),
    ({"r": 3}, 3, 3.0, 1.0),
    ({"alpha": 16}, 8, 16.0, 2.0),
    ({"alpha": 16, "rslora": True}, 8, 16.0, 16 / 8**0.5),
    ({"r": 4, "rslora": True}, 4, 4.0, 2.0),
    ({"rank_pattern": {"q_proj": 2}}, 2, 2.0, 1.0),
    ({"rank_pattern": {"q_proj": 2}, "alpha": 8}, 2, 8.0, 4.0),
    ({"rank_pattern": {"k_proj": 2}}, 8, 8.0, 1.0),
    ({"rank_pattern": {"proj": 2}}, 8, 8.0, 1.0),
    ({"rank_pattern": {"layers.*.q_proj": 2, "q_proj": 5}}, 2, 2.0, 1.0),
    ({"rank_pattern": {"q_proj": 5, "layers.*.q_proj": 2}}, 5, 5.0, 1.0),
    ({"alpha_pattern": {"q_proj": 24}}, 8, 24, 3.0),
    ({"alpha_pattern": {"q_proj": 4}, "rank_pattern": {"q_proj": 16}, "alpha": 99}, 16, 4, 0.25),
    ({"alpha_pattern": {r"re:layers\.\d+\.q_.*": 2}, "r": 4, "rslora": True}, 4, 2, 1.0),
]


@pytest.mark.parametrize(("arguments", "rank", "alpha", "scale"), SCALES, ids=[str(case[0]) for case in SCALES])
def test_rank_alpha_and_scale_of_a_layer(arguments, rank, alpha, scale):
    config = LoRAConfig(**arguments)
    assert config.rank_for("layers.0.q_proj") == rank
    assert config.alpha_for("layers.0.q_proj") == alpha
    assert config.scale_for("layers.0.q_proj") == pytest.approx(scale, rel=1e-15)


@pytest.mark.parametrize("mapping", [dict, MappingProxyType])
def test_to_dict_is_plain_data_that_makes_the_same_config_again(mapping):
    config = LoRAConfig(r=2, targets=("q", "v"), rank_pattern=mapping({"q": 1}), alpha_pattern=mapping({"v": 2.0}))
    buffer = io.BytesIO()
    torch.save(config.to_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert loaded == config.to_dict()
    assert (loaded["targets"], loaded["rank_pattern"], loaded["name"]) == (["q", "v"], {"q": 1}, "default")
    assert LoRAConfig(**loaded).to_dict() == config.to_dict()


def test_files_of_format_1_hold_the_arguments_of_the_run_as_well():
    config = LoRAConfig(r=2, targets=["q"])
    assert LoRAConfig.from_file({**config.to_dict(), **RunConfig(merge="best").to_dict()}) == config
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        LoRAConfig.from_file({**config.to_dict(), "rank": 3})


class Listed(Sequence):
    """A sequence that is no list, as OmegaConf's."""

    def __init__(self, *values):
        self.values = values

    def __getitem__(self, index):
        return self.values[index]

    def __len__(self):
        return len(self.values)


class Word(str, enum.Enum):
    QV = "qv"


FOREIGN = [
    ({"targets": Listed("q", "v")}, {"targets": ["q", "v"]}),
    ({"targets": ("q", "v")}, {"targets": ["q", "v"]}),
    ({"targets": np.array(["q", "v"])}, {"targets": ["q", "v"]}),
    ({"targets": [np.str_("q")], "exclude": Listed(np.str_("k"))}, {"targets": ["q"], "exclude": ["k"]}),
    ({"targets": Word.QV}, {"targets": "qv"}),
    ({"r": np.int64(4), "seed": np.int32(3)}, {"r": 4, "seed": 3}),
    ({"r": torch.tensor(4)}, {"r": 4}),
    ({"alpha": np.float64(2.5), "dropout": np.float32(0.5)}, {"alpha": 2.5, "dropout": 0.5}),
    ({"alpha": np.logspace(0, 1, 3)[1]}, {"alpha": float(np.logspace(0, 1, 3)[1])}),
    ({"rslora": np.bool_(True)}, {"rslora": True}),
    ({"rank_pattern": MappingProxyType({np.str_("q"): np.int64(2)})}, {"rank_pattern": {"q": 2}}),
    ({"alpha_pattern": {"q": np.float64(3)}}, {"alpha_pattern": {"q": 3.0}}),
    ({"lr_scale": np.float64(3), "merge": np.bool_(False)}, {"lr_scale": 3.0, "merge": False}),
    ({"init_from": Path("a") / "b", "export": Path("c")}, {"init_from": str(Path("a") / "b"), "export": "c"}),
]


@pytest.mark.parametrize(("arguments", "plain"), FOREIGN, ids=[str(case[1]) for case in FOREIGN])
def test_a_configuration_is_plain_data_whatever_came_in(arguments, plain):
    callback = LoRACallback(**arguments)
    stored = {**callback.config.to_dict(), **callback.run_config.to_dict()}
    assert {key: stored[key] for key in plain} == plain
    assert types_in(stored) <= {dict, list, str, int, float, bool, type(None)}
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == stored


def types_in(value):
    inside = value.items() if isinstance(value, dict) else value if isinstance(value, list) else []
    pairs = [part for item in inside for part in (item if isinstance(value, dict) else [item])]
    return {type(value)}.union(*map(types_in, pairs))


def test_to_dict_is_a_copy():
    config = LoRAConfig(targets=["q"], rank_pattern={"q": 1})
    config.to_dict()["targets"].append("v")
    config.to_dict()["rank_pattern"]["q"] = 3
    assert (config.targets, config.rank_pattern) == (["q"], {"q": 1})


def test_pickle_gives_an_equal_config():
    config = LoRAConfig(r=2, targets=["q"], alpha_pattern={"q": 3.0})
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("cls", [LoRACallback, LoRAConfig], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("target_modules", ["q"], r"takes no `target_modules`, which is peft's name\. Write targets="),
        ("lora_alpha", 16, r"takes no `lora_alpha`, which is peft's name\. Write alpha="),
        ("lora_dropout", 0.1, "Write dropout="),
        ("modules_to_save", ["head"], "Write also_train="),
        ("use_rslora", True, "Write rslora="),
        ("init_lora_weights", "gaussian", "Write init="),
        ("layers_to_transform", [0], "with an expression for the layers"),
    ],
)
def test_the_arguments_of_peft_are_told_by_their_names_here(cls, argument, value, words):
    with pytest.raises(TypeError, match=f"{cls.__name__} {words}" if "takes" in words else words):
        cls(**{argument: value})


def test_an_argument_that_is_no_ones_stays_pythons_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'rnk'"):
        LoRACallback(rnk=4)


def test_a_sub_class_may_use_such_a_name_itself():
    class Mine(LoRACallback):
        def __init__(self, target_modules):
            super().__init__(targets=target_modules)

    assert Mine(target_modules=["q"]).config.targets == ["q"]


def test_the_expression_for_layers_that_the_hint_shows_works():
    pattern = "re:.*layers[.][0-3][.].*q_proj"
    assert matches("model.layers.2.attn.q_proj", pattern) and not matches("model.layers.4.attn.q_proj", pattern)
