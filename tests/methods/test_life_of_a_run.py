"""The life of a run, for every method: one table of cases, to which a new method adds a row."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, adapt, load_from_checkpoint, plan, remove_adapted
from lightning_lora.cli.inspect import inspect_files
from lightning_lora.cli.reports import inspection_data, inspection_text
from tests.helpers.interrupts import interrupt, lines_in, state_of
from tests.helpers.method_cases import CASES, OF_EACH_CALLBACK, QUICK, bits, inputs, module, move, same_bits
from tests.helpers.models import LitEncoder, checkpoints, data, trainer
from tests.helpers.runs import load
from tests.helpers.selection import slow_except

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Frozen output head"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),  # torch's own tracing of an autograd.Function
]
every_method = pytest.mark.parametrize("case", CASES, ids=str)
# What takes part of a second goes through two cases in the fast selection.
each_run = pytest.mark.parametrize("case", slow_except(QUICK, CASES), ids=str)
each_callback = pytest.mark.parametrize("case", slow_except(QUICK, OF_EACH_CALLBACK), ids=str)
WITHOUT_LORA = [case for case in CASES if case.name != "lora"]


def fit(folder, case, epochs, ckpt=None, **kwargs):
    files = checkpoints(folder)
    own, callback = module(dropout=0.2), case.make(**kwargs)
    runner = trainer(callback, files, max_epochs=epochs)
    runner.fit(own, data(shuffle=True), data(1), ckpt_path=ckpt)
    return runner, own, files


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    """The file of a run of one epoch, made once for each case."""

    paths = {}

    def path(case):
        if case.name not in paths:
            paths[case.name] = fit(tmp_path_factory.mktemp(case.name), case, 1)[2].last_model_path
        return paths[case.name]

    return path


class Frozen(Callback):
    """The frozen parameters before and after training."""

    def on_train_start(self, trainer, pl_module):
        self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters() if not p.requires_grad}
        self.trains = {n for n, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_end(self, trainer, pl_module):
        now = dict(pl_module.named_parameters())
        self.same = all(torch.equal(value, now[name]) for name, value in self.before.items())


@every_method
def test_it_starts_as_the_base_where_that_is_promised(case):
    own, base = module().eval(), module().eval()
    random_state = torch.get_rng_state()
    assert adapt(own, case.make().config) == adapt(own, case.make().config) != []
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(own(inputs()), base(inputs())) is case.bare
    assert {name for name, p in own.named_parameters() if p.requires_grad} == case.trained


@pytest.mark.parametrize(
    ("case", "device"),
    slow_except([*product(CASES, ["cpu"]), *product(OF_EACH_CALLBACK, ["meta"])], product(CASES, ["cpu", "meta"])),
    ids=str,
)
def test_the_plan_counts_what_would_train_and_changes_nothing(case, device):
    own = module().to(device)
    before = state_of(own) if device == "cpu" else None
    text = str(plan(own, case.make()))
    assert before is None or state_of(own) == before
    adapted = module()
    adapt(adapted, case.make().config)
    size = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    base = sum(parameter.numel() for parameter in own.parameters())
    assert f"{size:,} trainable parameter" in text and f"of the base's {base:,}" in text
    assert f"{size:,} trainable parameter" in str(plan(adapted, case.make().config))


@pytest.mark.slow
@each_run
def test_frozen_weights_stay_and_files_hold_what_trains(case, tmp_path):
    spy, files, own = Frozen(), checkpoints(tmp_path), module()
    trainer(case.make(), spy, files, max_epochs=1).fit(own, data(), data(1))
    assert spy.same and spy.trains == case.trained
    saved = load(files.last_model_path)
    statistics = {f"net.bn.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}
    assert saved["state_dict"].keys() == case.trained | case.kept | statistics
    assert saved["lightning_lora"]["method"] == case.make().method.key
    base = {name for name, _ in module().named_parameters()}
    assert saved["lightning_lora"]["base"].keys() == base - case.trained
    assert all(parameter.requires_grad for parameter in own.parameters())


@pytest.mark.slow
@each_run
def test_a_resumed_run_is_bit_identical(case, tmp_path):
    torch.manual_seed(5)
    _, two, _ = fit(tmp_path / "two", case, 2)
    torch.manual_seed(99)
    _, resumed, _ = fit(tmp_path / "resumed", case, 2, tmp_path / "two" / "epoch=0.ckpt")
    assert same_bits(bits(two), bits(resumed))
    assert not same_bits(bits(two), bits(module()))


@pytest.mark.slow
@each_callback
def test_a_second_fit_continues(case, tmp_path):
    runner, own, _ = fit(tmp_path, case, 1)
    parameters = dict(runner.callbacks[0].method.main_parameters(own))
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    trainer(case.make(), max_epochs=1).fit(own, data(shuffle=True))
    after = dict(case.make().method.main_parameters(own))
    assert after.keys() == before.keys() and not any(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.slow
@each_run
def test_the_best_checkpoint_tests_as_a_fresh_module_does(case, tmp_path):
    runner, own, files = fit(tmp_path, case, 2)
    best = runner.test(own, data(2), ckpt_path="best", verbose=False)
    fresh = load_from_checkpoint(type(own), files.best_model_path)
    assert trainer().test(fresh, data(2), verbose=False) == best
    again = trainer(case.make()).test(module(), data(2), ckpt_path=files.best_model_path, verbose=False)
    assert again == best


@pytest.mark.slow
@each_run
def test_init_from_starts_from_the_values_of_a_run(case, file_of):
    started = module(dropout=0.2)
    trainer(case.make(init_from=file_of(case)), max_epochs=0).fit(started, data())
    expected, method = load(file_of(case))["state_dict"], case.make().method
    present = method.state(started)
    assert all(torch.equal(present[name], expected[name]) for name in case.trained)


@pytest.mark.slow
@each_run
def test_what_does_not_fit_is_refused_before_anything_is_loaded(case, file_of, tmp_path):
    content = load(file_of(case))
    first = sorted(case.trained)[0]

    def damaged(change):
        other = copy.deepcopy(content)
        change(other)
        torch.save(other, path := tmp_path / "damaged.ckpt")
        return path

    def without(key):
        return lambda c: (c["state_dict"].pop(key), c["lightning_lora"].pop("entries"))

    def with_more(c):
        c["state_dict"]["net.more"] = torch.ones(1)
        c["lightning_lora"].pop("entries")

    def longer(c):
        c["state_dict"][first] = torch.cat([c["state_dict"][first]] * 2)

    cases = [(without(first), f"lacks `{first}`"), (with_more, "`net.more`, which this model has not")]
    cases += [(longer, f"`{first}` has shape")]
    for change, words in cases:
        own = module(dropout=0.2)
        before = bits(own)
        with pytest.raises(ValueError, match=words):
            trainer(case.make(), max_epochs=2).fit(own, data(), ckpt_path=damaged(change))
        remove_adapted(own)
        assert same_bits(bits(own), before)


@pytest.mark.slow
@each_run
def test_a_file_of_another_method_or_other_arguments_is_refused(case, file_of):
    path = file_of(case)
    stranger = next(each for each in CASES if type(each.make()) is not type(case.make()))
    kind, own_kind = type(stranger.make().config).__name__, type(case.make().config).__name__
    with pytest.raises(ValueError, match=f"file of another method: it was written with a {own_kind}.* has a {kind}"):
        trainer(stranger.make(), max_epochs=2).fit(module(dropout=0.2), data(), ckpt_path=path)
    if case.other is not None:
        with pytest.raises(ValueError, match=r"was written with .* instead of .*: give .* the same arguments"):
            trainer(case.other(), max_epochs=2).fit(module(dropout=0.2), data(), ckpt_path=path)
    own = module()
    adapt(own, stranger.make().config)
    with pytest.raises(ValueError, match=f"adapted by {kind} already, and this asks for {own_kind}"):
        adapt(own, case.make().config)
    with pytest.raises(ValueError, match=f"adapted by {kind} already, and this asks for {own_kind}"):
        trainer(case.make()).fit(own, data())
    with pytest.raises(ValueError, match=f"adapted by {kind} already"):
        load_from_checkpoint(own, path)


@pytest.mark.slow
@each_run
def test_another_base_is_refused(case, file_of):
    if not {name for name, _ in module().named_parameters()} - case.trained:
        return  # nothing is frozen
    other = module(dropout=0.2)
    with torch.no_grad():
        other.net.embed.weight += 1
    with pytest.raises(ValueError, match=r"was trained on another base: `net\.embed\.weight`"):
        trainer(case.make(), max_epochs=2).fit(other, data(), ckpt_path=file_of(case))


@pytest.mark.slow
@each_run
def test_its_file_loads_by_load_state_dict(case, tmp_path):
    runner, own, files = fit(tmp_path, case, 1)
    expected, state = own.eval()(inputs()), load(files.last_model_path)["state_dict"]
    move(own, runner.callbacks[0])
    own.load_state_dict(state)
    assert torch.equal(own(inputs()), expected)


@pytest.mark.slow
@each_run
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision(case, precision):
    own = module()
    runner = trainer(case.make(**({"merge": False} if case.merges else {})), max_epochs=1, precision=precision)
    runner.fit(own, data())
    method = case.make().method
    added = {} if method.key == "tune" else dict(method.added_parameters(own))
    assert all(parameter.dtype == torch.float32 for parameter in added.values())
    start = module()
    adapt(start, case.make().config)
    initial = method.state(start)
    now = method.state(own)
    moved = [name for name in case.trained if not torch.equal(now[name].float(), initial[name].to(now[name]).float())]
    assert set(moved) == case.trained
    assert all(value.isfinite().all() for value in now.values())


# Of `TuneCallback`, which adds nothing to a graph, one case; bottleneck/test_method.py compiles every placement.
COMPILED = [case for case in CASES if case.name == "tune-bias" or not case.name.startswith(("tune", "bottleneck"))]


@pytest.mark.parametrize("case", slow_except([], COMPILED), ids=str)
def test_the_compiled_model_computes_the_same(case):
    torch._dynamo.reset()  # it counts the graphs of one forward, whatever module they are of
    own = module().eval()
    adapt(own, case.make().config)
    move(own, case.make())
    eager = own(inputs())
    compiled = torch.compile(own.net, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(inputs()), eager, atol=1e-6)
    eager.sum().backward()
    gradients = {name: p.grad for name, p in own.named_parameters() if p.requires_grad}
    own.zero_grad()
    compiled(inputs()).sum().backward()
    for name, parameter in own.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, gradients[name], atol=1e-5), name


@each_run
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(case, reentrant):
    gradients = []
    for checkpointed in (None, reentrant):
        own = module(checkpointed=checkpointed)
        adapt(own, case.make().config)
        move(own, case.make())
        torch.manual_seed(3)
        own(inputs()).square().sum().backward()
        gradients.append({name: p.grad for name, p in own.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    same = torch.allclose if case.gathers else torch.equal
    assert all(same(value, checkpointed[name]) for name, value in plain.items())


@each_run
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))], ids=["copy", "pickle"])
def test_copies_compute_the_same_and_are_apart(case, copied):
    own = module().eval()
    adapt(own, case.make().config)
    move(own, case.make())
    other = copied(own)
    expected = own(inputs())
    assert torch.equal(other(inputs()), expected)
    move(other, case.make(), by=1.0)
    assert torch.equal(own(inputs()), expected) and not torch.equal(other(inputs()), expected)
    remove_adapted(other)
    assert same_bits(bits(other), bits(module()))


@pytest.mark.slow
@each_run
def test_remove_gives_everything_back_bit_for_bit(case, tmp_path):
    _, own, _ = fit(tmp_path, case, 1)
    base = module(dropout=0.2)
    remove_adapted(own)
    assert same_bits(bits(own), bits(base))
    assert [type(each) for each in own.modules()] == [type(each) for each in base.modules()]
    assert all(parameter.requires_grad for parameter in own.parameters())
    assert not any("lightning_lora" in key for each in own.modules() for key in vars(each))
    assert not any(each._forward_hooks or each._load_state_dict_pre_hooks for each in own.modules())
    remove_adapted(own)


@pytest.mark.slow
@each_run
def test_an_interrupt_leaves_the_model_before_or_after(case):
    config = case.make().config

    def trained():
        own = module()
        adapt(own, config)
        move(own, case.make())
        return own

    for start, verb in ((module, lambda own: adapt(own, config)), (trained, remove_adapted)):
        before, done = state_of(start()), start()
        total = len(lines_in(lambda verb=verb, done=done: verb(done)))
        after = state_of(done)
        for share in (0.3, 0.6, 0.8, 0.95):
            own = start()
            interrupt(lambda verb=verb, own=own: verb(own), int(total * share))
            assert state_of(own) in (before, after)
            verb(own)
            assert state_of(own) == after


@pytest.mark.slow
@each_callback
def test_ctrl_c_keeps_what_was_trained(case):
    class Interrupting(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                raise KeyboardInterrupt

    own = module()
    with pytest.raises(SystemExit):
        trainer(case.make(), Interrupting(), max_epochs=1).fit(own, data())
    method = case.make().method
    assert method.is_adapted(own) and not method.is_untrained(own)
    trainer(case.make(), max_epochs=1).fit(own, data())


@each_callback
def test_an_error_before_the_first_step_leaves_the_module_as_it_was(case):
    class Failing(Callback):
        def on_train_start(self, trainer, pl_module):
            raise RuntimeError("stop")

    own = module()
    before = state_of(own)
    with pytest.raises(RuntimeError, match="stop"):
        trainer(case.make(), Failing(), max_epochs=1).fit(own, data())
    now = state_of(own)
    ignored = {key for key in now if key.endswith("/keys")}  # Lightning sets the trainer
    assert {key: value for key, value in now.items() if key not in ignored} == {
        key: value for key, value in before.items() if key not in ignored
    }


@pytest.mark.slow
@each_callback
@pytest.mark.parametrize("tune", ["lr_find", "scale_batch_size"])
def test_a_tuner_leaves_the_module_as_it_was(case, tune, tmp_path):
    class Sized(LitEncoder):
        batch_size = 8

        def train_dataloader(self):
            return DataLoader(data().dataset, batch_size=self.batch_size)

        def val_dataloader(self):
            return data(1)

    own = Sized()
    runner = trainer(case.make(), max_epochs=1, default_root_dir=tmp_path)
    if tune == "lr_find":
        Tuner(runner).lr_find(own, num_training=4, update_attr=False)
    else:
        Tuner(runner).scale_batch_size(own, max_trials=2, steps_per_trial=2, init_val=2)
    assert same_bits(bits(own), bits(module()))
    assert [type(each) for each in own.net.modules()] == [type(each) for each in module().net.modules()]


@pytest.mark.slow
@each_run
def test_liveness_names_a_site_that_is_not_reached(case):
    if not case.skipped:
        return
    with pytest.warns(UserWarning, match=rf"got no gradient in the first steps\..*{case.skipped}"):
        trainer(case.make(), max_epochs=2).fit(module(skipped=1), data())


@pytest.mark.slow
@each_callback
def test_lr_scale_multiplies_the_rates_of_what_the_method_trains(case):
    class Rates(Callback):
        def on_train_start(self, trainer, pl_module):
            self.rates = [group["lr"] for group in trainer.optimizers[0].param_groups]

    rates = Rates()
    trainer(case.make(lr_scale=10.0), rates, max_epochs=1, limit_train_batches=2).fit(module(), data())
    assert rates.rates == [pytest.approx(0.1)]


@pytest.mark.slow
@each_callback
def test_the_configuration_is_logged_under_its_key(case, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    callback = case.make()
    trainer(callback, max_epochs=1, logger=logger, limit_train_batches=2).fit(module(), data())
    assert logger.experiment.hparams[callback.method.key] == {
        **callback.method.config.to_dict(),
        **callback.run_config.to_dict(),
    }
    assert callback.state_key == f"{type(callback).__name__}[default]"


class PlainEncoder(LitEncoder):
    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)


@pytest.mark.slow
@every_method
def test_the_command_line_knows_it_by_its_short_name(case):
    name = type(case.make()).__name__
    flags = [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{flag}" for flag in case.flags())]
    made = LightningCLI(PlainEncoder, run=False, save_config_callback=None, args=[*flags, "--trainer.logger=false"])
    (callback,) = (each for each in made.trainer.callbacks if type(each).__name__ == name)
    assert not case.flags() or callback.config == case.make().config


@pytest.mark.slow
@pytest.mark.parametrize("cls", sorted({type(case.make()) for case in CASES}, key=lambda cls: cls.__name__))
def test_help_comes_from_the_docstring(cls):
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(cls, "method")
    text = " ".join(parser.format_help().split())
    assert " ".join(inspect.getdoc(cls).split("\n\n")[0].split()).rstrip(".") in text
    for argument in inspect.signature(cls).parameters:
        described = re.search(rf"^    {argument}: (\S+)", inspect.getdoc(cls), re.MULTILINE)
        assert described is not None and f"--method.{argument}" in text, argument


@each_run
def test_inspect_shows_what_the_file_holds(case, file_of):
    inspection = inspect_files(Path(file_of(case)))
    names = {*inspection.others, *(layer.name for layer in inspection.layers)}
    assert names >= {name for name in case.trained if ".lora." not in name}
    assert inspection.fingerprint is bool({name for name, _ in module().named_parameters()} - case.trained)
    assert str(file_of(case)) in inspection_text(inspection) and inspection_data(inspection)["about"]


@every_method
def test_two_callbacks_are_refused(case):
    other = next(each for each in CASES if type(each.make()) is not type(case.make()))
    with pytest.raises(Exception, match=f"has {type(case.make()).__name__} and {type(other.make()).__name__}"):
        trainer(case.make(), other.make()).fit(module(), data())


@pytest.mark.parametrize("case", slow_except(OF_EACH_CALLBACK, WITHOUT_LORA), ids=str)
def test_peft_refuses_it_by_name(case, tmp_path):
    from lightning_lora import load_adapter, save_adapter

    own, lora = module(), module()
    adapt(own, case.make().config)
    with pytest.raises(ValueError, match=f"adapted by {type(case.make().config).__name__}, and PEFT's LoRA format has"):
        save_adapter(own, tmp_path / "adapter")
    adapt(lora, LoRACallback(r=2).config)
    save_adapter(lora, tmp_path / "lora")
    with pytest.raises(ValueError, match=f"adapted by {type(case.make().config).__name__} already"):
        load_adapter(own, tmp_path / "lora")


@every_method
def test_the_callback_travels_as_its_configuration(case):
    callback = case.make()
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert other.config == callback.config and other.run_config == callback.run_config


@every_method
def test_a_plain_module_stays_plain_where_nothing_is_asked(case):
    own = nn.Sequential(nn.ReLU())
    words = r"`(targets|train|also_train|adapters)|needs transformer blocks|no floating parameter"
    with pytest.raises(ValueError, match=words):
        adapt(own, case.make().config)
    remove_adapted(own)
    assert state_of(own) == state_of(nn.Sequential(nn.ReLU()))
