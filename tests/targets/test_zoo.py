"""What presets choose on Hugging Face's architectures, against expectations written by hand, and that it works."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, merge_lora, unmerge_lora
from tests.helpers import oracles, zoo
from tests.helpers.selection import slow_except

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of the architectures themselves
    pytest.mark.usefixtures("quiet_transformers"),
]
# Where what is chosen is not what an expert would choose; each says so in an error or in the table at the start.
KNOWN = {
    ("squeezebert", "all"): "its one linear layer is taken for the output",
    ("zamba2", "mlp"): "the map behind a shared block is called `linear`, and it lies in a block",
}
# Fused and separate projections, encoder and decoder, experts, images, no attention.
FAST = ["gpt2", "falcon", "llama", "mixtral", "mamba", "squeezebert", "t5", "vit", "swin"]
every_case = pytest.mark.parametrize("name", slow_except(FAST, zoo.CASES))


def sites(model):
    """The adapted matrices: modules, or ``<module>.<part>``."""
    found = []
    for name, _ in lora_parameters(model):
        module, _, rest = name.partition(".lora.default.")
        part = rest.rpartition(".")[0]
        if rest.endswith("A"):
            found.append(f"{module}.{part}" if part else module)
    return found


def adapted(base, preset):
    """A copy of ``base`` with adapters, or ``None`` where the preset is an error."""
    model = copy.deepcopy(base)
    try:
        apply_lora(model, LoRAConfig(r=2, targets=preset))
    except ValueError:
        return None
    return model


def output(model, inputs):
    with torch.no_grad():
        return zoo.output(model, inputs)


def frozen(base, model):
    """The base with no gradients at all, and with those of adapted layers: torch makes another product without."""
    none = copy.deepcopy(base).requires_grad_(False)
    some = copy.deepcopy(none)
    for site in sites(model):
        layer = dict(some.named_modules()).get(site) or some.get_submodule(site.rpartition(".")[0])
        layer.requires_grad_(True)
    return none, some


@pytest.mark.slow
@every_case
def test_what_is_chosen(name):
    base, _ = zoo.build(zoo.CASES[name])
    for preset in zoo.PRESETS:
        model = adapted(base, preset)
        found = None if model is None else dict(Counter(map(zoo.fold, sites(model))))
        wrong = zoo.differences(zoo.CASES[name], preset, found)
        assert bool(wrong) == ((name, preset) in KNOWN), (preset, wrong)


@pytest.mark.slow
@every_case
def test_it_starts_as_the_base_trains_acts_in_eval_merges_and_comes_back(name):
    base, inputs = zoo.build(zoo.CASES[name])
    model = adapted(base, "all")
    assert model is not None
    start = output(model, inputs)
    assert any(oracles.same_bits(start, output(found, inputs)) for found in (base, *frozen(base, model)))
    oracles.train_by_hand(model)
    zoo.output(model, inputs).square().sum().backward()
    idle = [key for key, matrix in lora_parameters(model) if matrix.grad is None or not matrix.grad.any()]
    known = (*zoo.CASES[name].idle, *zoo.doubtful(zoo.CASES[name], "all"))
    assert [key for key in idle if not key.startswith(known) and not zoo.fold(key).startswith(known)] == []
    trained = output(model, inputs)
    if name != "mobilevit":  # tiny, it gives its last bias and nothing else
        assert not torch.allclose(trained, output(base, inputs), rtol=1e-3)
    merge_lora(model)
    oracles.assert_close(output(model, inputs), trained, torch.float32)
    unmerge_lora(model)
    assert oracles.same_bits(output(model, inputs), trained)
    for key, value in base.state_dict().items():
        assert oracles.same_bits(model.state_dict()[key], value), key


@pytest.mark.parametrize("name", slow_except(FAST, [name for name, case in zoo.CASES.items() if case.rows]))
def test_query_and_value_are_the_rows_that_an_expert_would_name(name):
    case = zoo.CASES[name]
    base, _ = zoo.build(zoo.CASES[name])
    model = adapted(base, "qv")
    if model is None:
        assert (name, "qv") in KNOWN
        return
    oracles.train_by_hand(model)
    merge_lora(model)
    for key, module in model.named_modules():
        layout = case.rows.get(zoo.fold(key))
        if layout is None:
            continue
        weights = (module, base.get_submodule(key))
        one, other = (m.in_proj_weight if isinstance(m, nn.MultiheadAttention) else m.weight for m in weights)
        if type(module).__name__ == "Conv1D":
            one, other = one.t(), other.t()
        changed = (one != other).any(1).nonzero().flatten().tolist()
        rows = zoo.rows(layout, len(one))
        if changed or f"{zoo.fold(key)}.q" not in zoo.doubtful(case, "qv"):
            assert changed == sorted([*rows.get("q", []), *rows.get("v", [])]), key
