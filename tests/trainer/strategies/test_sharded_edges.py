"""Where sharding goes wrong in silence: tied weights, ranks without gradients or experts, a backward that failed."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_lora import LoRAConfig, apply_lora, disable_lora, remove_lora
from lightning_lora.distributed.sharded import is_sharded, shape_of
from lightning_lora.files.safetensors_writing import write_merged
from lightning_lora.layers.base import adapted_layers
from lightning_lora.layers.registry import parts_of
from lightning_lora.layers.weight_view import WeightPart
from lightning_lora.model.freeze import unfreeze
from lightning_lora.trainer.strategies.base import states_in
from lightning_lora.trainer.strategies.fsdp import FSDP1, FSDP2, Sharded
from tests.helpers.models import net
from tests.helpers.scripts import run_script
from tests.helpers.sharded_edges import Failing, Mixture, Tied
from tests.helpers.strategy_runs import plain


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edges")
    done = run_script("sharded_edges.py", folder, ranks=2)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder, torch.load(folder / "results-0.pt", weights_only=False, map_location="cpu")


def added(saved: dict, base: dict, *layers: str) -> dict:
    """`W + B @ A` for each of `layers`."""
    pairs = {layer: (saved[f"{layer}.lora.default.A"], saved[f"{layer}.lora.default.B"]) for layer in layers}
    return {f"{layer}.weight": base[f"{layer}.weight"] + B @ A for layer, (A, B) in pairs.items()}


def test_after_an_evaluation_the_parts_get_their_flags_back(tmp_path):
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        apply_lora(model, LoRAConfig(r=2, targets="all"))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with torch.no_grad():
            model(torch.ones(2, 4))
        assert not is_sharded(model[0]._parameters["weight"])  # the whole, which the root keeps
        unfreeze(model)
        assert all(is_sharded(parameter) and parameter.requires_grad for parameter in model.parameters())
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_a_tied_and_sharded_weight_is_merged_into_a_file(ran):
    found, folder = ran[1]["tied"], ran[0] / "tied"
    assert found["own"] == found["best"] and found["adapters"] == 6
    assert found["own"][0]["test_loss"] == pytest.approx(found["ddp"][0]["test_loss"], rel=1e-6)
    merged, saved = (
        load_file(folder / "merged.safetensors"),
        torch.load(folder / "last.ckpt", weights_only=True, map_location="cpu"),
    )
    base = plain(Tied).state_dict()
    for key, value in added(saved["state_dict"], base, "net.first", "net.second", "net.layers.0.q").items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-6)
    assert merged.keys() == base.keys() and torch.equal(merged["net.out.weight"], base["net.out.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_frozen_weights_that_move_are_named_by_their_shards(ran, name):
    assert ran[1]["moving"][name, False] == []
    (message,) = ran[1]["moving"][name, True]
    # Under FSDP1 the biases are in the second rank's part of the flat parameter.
    biases = "`net.layers.0.mlp.bias`, `net.layers.1.mlp.bias`, " if name == "fsdp2" else ""
    assert message.startswith(f"Frozen, but moving: {biases}`net.head.weight`. Code outside")
    assert "Checkpoints do not hold what is sharded" in message


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one_rank", "clipped_by_value"])
@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_it_trains_as_under_ddp(ran, case, name):
    ends = ran[1][case]
    noise = 0.02 if torch.cuda.device_count() > 1 else 0  # there products depend on how a weight lies in memory
    for key, value in ends["ddp"].items():
        torch.testing.assert_close(ends[name][key], value, rtol=0, atol=noise)


@pytest.mark.slow
def test_a_rank_that_holds_no_expert_merges_none(ran):
    saved = torch.load(ran[0] / "experts" / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]
    base = plain(Mixture).state_dict()
    pair = "net.experts.lora.default.weight"
    expected = base["net.experts.weight"] + saved[f"{pair}.B"] @ saved[f"{pair}.A"]
    torch.testing.assert_close(ran[1]["experts"]["net.experts.weight"].detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_ranks_stay_equal_after_a_backward_that_failed(ran):
    assert ran[1]["failed_backward"] == {"equal": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "fit and test",
            "Lightning cannot do so twice where parameters are outside of all wrapped blocks. Make a fresh",
        ),
        ("by hand", "is wrapped in FullyShardedDataParallel already, by an earlier run or in its `configure_model`"),
        ("validate and fit", "Leave the wrapping to the strategy: FSDPStrategy(auto_wrap_policy={YourBlock})"),
    ],
)
def test_what_fsdp1_cannot_take(ran, case, words):
    assert words.lower() in ran[1]["refused"][case].lower()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize(
    ("case", "words"), [("rank", "was written with `r=4` instead of `r=8`"), ("base", "was trained on another base")]
)
def test_a_file_that_does_not_fit_is_refused_on_every_rank(ran, name, case, words):
    assert words in ran[1]["wrong_files"][name, case]


@pytest.mark.slow
def test_a_run_that_failed_leaves_nothing_and_the_next_one_merges(ran):
    found = ran[1]["failed_run"]
    assert found == {"error": "planned failure", "left": [], "directories": True}
    merged = torch.load(ran[0] / "failed_run" / "merged.ckpt", weights_only=True, map_location="cpu")["state_dict"]
    saved = torch.load(ran[0] / "failed_run" / "again" / "last.ckpt", weights_only=True, map_location="cpu")[
        "state_dict"
    ]
    base = plain(Failing).state_dict()
    assert merged.keys() == base.keys()
    for key, value in added(saved, base, "net.layers.0.q", "net.layers.1.v").items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-6)


def adapted() -> nn.Module:
    model = net()
    apply_lora(model, LoRAConfig(r=2, targets=["q"], also_train=["head"]))
    return model


def test_tensor_parallel_layers_are_refused_by_name():
    model = adapted()
    for _, layer in adapted_layers(model):
        layer.weight.device_mesh = SimpleNamespace(mesh_dim_names=("data_parallel", "tensor_parallel"))
    with pytest.raises(MisconfigurationException, match=r"`layers.0.q.weight` is split by tensor parallelism"):
        FSDP2(None, model).before_wrap(ExitStack())


def test_a_cast_that_would_pass_by_what_trains():
    half = SimpleNamespace(param_dtype=torch.bfloat16)
    strategy = SimpleNamespace(mixed_precision=half, kwargs={}, root_device=torch.device("cpu"))
    with pytest.raises(MisconfigurationException, match=r"`head.weight` trains in addition to the adapters and stays"):
        FSDP1(strategy, adapted()).before_wrap(ExitStack())


@pytest.mark.parametrize("name", ["ignored_modules", "ignored_states"])
def test_what_the_user_lets_fsdp1_ignore_stays_ignored(name):
    model = adapted()
    theirs = [model.layers[0].mlp] if name == "ignored_modules" else iter(model.layers[0].mlp.parameters())
    strategy = SimpleNamespace(mixed_precision=None, kwargs={name: theirs}, root_device=torch.device("cpu"))
    stack = ExitStack()
    FSDP1(strategy, model).before_wrap(stack)
    ignored = {id(parameter) for parameter in strategy.kwargs["ignored_states"]}
    assert ignored == {id(p) for p in model.parameters() if p.requires_grad} | {
        id(p) for p in model.layers[0].mlp.parameters()
    }
    assert "ignored_modules" not in strategy.kwargs
    stack.close()
    assert strategy.kwargs[name] is theirs


def test_a_file_without_the_state_of_the_optimizers_or_with_that_of_others():
    with pytest.raises(ValueError, match=r"was saved with weights only.*`save_weights_only=False`"):
        states_in({}, 1)
    with pytest.raises(ValueError, match="holds the state of 2 optimizers, but the module has 1: resume with"):
        states_in({"optimizer_states": [{}, {}]}, 1)


@pytest.mark.parametrize("choice", ["fused", "foreach"])
def test_a_step_that_cannot_take_both_kinds(monkeypatch, choice):
    model = adapted()
    monkeypatch.setattr("lightning_lora.trainer.strategies.fsdp.is_sharded", lambda p: p is model.head.weight)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **{choice: True})
    with pytest.raises(MisconfigurationException, match=f"`{choice}=True` cannot step on sharded parameters and whole"):
        Sharded(None, model).after_optimizers(ExitStack(), [optimizer], [])


def test_a_mixture_is_not_stepped_on_at_once_and_no_file_says_so(monkeypatch):
    model = adapted()
    monkeypatch.setattr("lightning_lora.trainer.strategies.fsdp.is_sharded", lambda p: p is model.head.weight)
    rest = [parameter for name, parameter in model.named_parameters() if name.endswith(".A")]
    optimizer = torch.optim.AdamW([{"params": [*rest, model.head.weight]}, {"params": [model.head.bias]}])
    strategy_adapter = Sharded(None, model)
    strategy_adapter.step_singly([optimizer])
    assert [group["foreach"] for group in optimizer.param_groups] == [False, None]
    written = strategy_adapter.optimizer_state(None, optimizer)["param_groups"]
    assert [group["foreach"] for group in written] == [None, None]


def test_how_to_step_is_not_taken_from_a_file():
    model = adapted()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False)
    state = torch.optim.AdamW(trained, fused=True).state_dict()
    Sharded(SimpleNamespace(optimizers=[optimizer]), model).load_optimizers({"optimizer_states": [state]})
    assert (optimizer.param_groups[0]["fused"], optimizer.param_groups[0]["foreach"]) == (None, False)


def partitioned(*shape: int) -> torch.Tensor:
    """As ZeRO 3 leaves a parameter behind."""
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_shape, parameter.ds_status = torch.Size(shape), SimpleNamespace(name="NOT_AVAILABLE")
    return parameter


def test_shapes_of_what_zero_3_has_partitioned():
    assert shape_of(partitioned(3, 4, 5)) == (3, 4, 5) and shape_of(partitioned()) == ()
    part = WeightPart(stacked=True)
    assert part.stack(partitioned(3, 4, 5)) == (3,) and part.features(partitioned(3, 4, 5)) == (5, 4)
    experts = type("Experts", (nn.Module,), {})()
    experts.up, experts.down = partitioned(3, 8, 4), partitioned(3, 4, 8)
    assert [part.stacked for part in parts_of(experts)] == [True, True]


def test_the_base_cannot_be_asked_for_under_zero_3():
    model = adapted()
    model.head.weight.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
    for ask in (remove_lora, lambda model: disable_lora(model).__enter__()):
        with pytest.raises(ValueError, match=r"`head.weight` is partitioned by ZeRO 3.*on one device"):
            ask(model)


def test_a_merged_file_is_whole_or_not_there(tmp_path):
    path, values = tmp_path / "m.safetensors", {"a": torch.randn(3, 2), "b": torch.ones(2, dtype=torch.bfloat16)}
    write_merged(path, values, iter(values.items()), values)
    read = load_file(path)
    assert all(torch.equal(read[name], value) for name, value in values.items())
    with pytest.raises(RuntimeError, match="`b` could not be gathered, so the merged weights were not written"):
        write_merged(tmp_path / "other", values, iter([("a", values["a"])]), values)
    with pytest.raises(RuntimeError, match=r"`a` is of torch.complex64, which safetensors has no name for"):
        write_merged(tmp_path / "other", ["a"], iter([("a", torch.ones(1, dtype=torch.complex64))]), [])
    with pytest.raises(RuntimeError, match="`names` must hold every tensor's"):
        write_merged(tmp_path / "other", [], iter(values.items()), [])
    assert list(tmp_path.iterdir()) == [path]
