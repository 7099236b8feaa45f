"""LoRAMonitor: what it logs, when, to which loggers, what it costs, and what it refuses."""

from __future__ import annotations

import csv

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_lora import LoRACallback, LoRAConfig, LoRAMonitor, TuneCallback, apply_lora
from lightning_lora.analysis import AmplificationFactor, UpdateRatio
from lightning_lora.analysis import measures as measuring
from lightning_lora.layers.quantized.formats import dequantized
from tests.helpers.models import Lit, checkpoints, data, trainer

LAYERS = [f"net.layers.{block}.{name}" for block in (0, 1) for name in "qkvo"]


def fit(folder, *callbacks, module=None, **kwargs):
    """A run of 16 batches, and the rows in its file that the monitor wrote."""
    module, logger = Lit() if module is None else module, CSVLogger(folder, name="", version="")
    settings = {"logger": logger, "limit_val_batches": 0, **kwargs}
    trainer(*callbacks, **settings).fit(module, data())
    return module, rows(folder)


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("lora_ratio")]


def steps(rows):
    return [int(row["step"]) for row in rows]


def adapters(module):
    return {name: value.detach().clone() for name, value in module.named_parameters() if ".lora." in name}


def test_it_logs_what_the_metrics_measure(tmp_path):
    module, found = fit(tmp_path, LoRACallback(r=2, merge=False), LoRAMonitor(5))
    assert steps(found) == [0, 5, 10, 15, 16]
    ratio, amplification = UpdateRatio(), AmplificationFactor()
    for metric in (ratio, amplification):
        metric.update(module)
    for layer in LAYERS:
        own = ratio.compute()[layer]
        assert float(found[-1][f"lora_ratio/{layer}"]) == pytest.approx(float(own["ratio"]))
        assert float(found[-1][f"lora_stable_rank/{layer}"]) == pytest.approx(float(own["stable_rank"]))
        factor = amplification.compute()[layer]["factor"]
        assert float(found[-1][f"lora_amplification/{layer}"]) == pytest.approx(float(factor))
    norms = {
        key: torch.stack([ratio.compute()[layer][key] for layer in LAYERS]).norm()
        for key in ("delta_norm", "weight_norm")
    }
    assert float(found[-1]["lora_ratio"]) == pytest.approx(float(norms["delta_norm"] / norms["weight_norm"]))
    mean = sum(float(each["stable_rank"]) for each in ratio.compute().values()) / 8
    assert float(found[-1]["lora_stable_rank"]) == pytest.approx(mean)
    factors = amplification.compute().values()
    projected = torch.stack([each["update_directions"] for each in factors]).norm()
    assert float(found[-1]["lora_amplification"]) == pytest.approx(float(norms["delta_norm"] / projected))


def test_a_quantized_base_is_measured_as_the_dequantized_one(tmp_path):
    pytest.importorskip("bitsandbytes")
    from tests.helpers.quantized import FourBits

    module, found = fit(tmp_path, LoRACallback(r=2, targets=["q"]), LoRAMonitor(8), module=FourBits())
    delta, weight = 0.0, 0.0
    for block in module.net.layers:
        pair = block.q.lora.default
        delta += (pair.scale * pair.B @ pair.A).detach().double().square().sum()
        weight += dequantized(block.q).double().square().sum()
    assert steps(found) == [0, 8, 16]
    assert float(found[-1]["lora_ratio"]) == pytest.approx(float((delta / weight).sqrt()))


def test_before_the_first_step_only_the_ratio_is_defined(tmp_path):
    _, found = fit(tmp_path, LoRACallback(r=2), LoRAMonitor(100))
    defined = {key for key, value in found[0].items() if value}
    assert defined == {"step", "lora_ratio", *(f"lora_ratio/{layer}" for layer in LAYERS)}
    assert steps(found) == [0, 16] and float(found[0]["lora_ratio"]) == 0 < float(found[1]["lora_ratio"])


def test_training_is_bit_identical_to_a_run_without_it(tmp_path):
    plain, _ = Lit(dropout=0.1), torch.manual_seed(3)
    trainer(LoRACallback(r=2, merge=False), limit_val_batches=0).fit(plain, data())
    for place in (0, 1):
        torch.manual_seed(3)
        callbacks = [LoRACallback(r=2, merge=False)]
        callbacks.insert(place, LoRAMonitor(1))
        module, found = fit(tmp_path / str(place), *callbacks, module=Lit(dropout=0.1))
        assert steps(found) == list(range(17))
        own = adapters(module)
        assert all(torch.equal(value, own[name]) for name, value in adapters(plain).items())


def test_a_batch_whose_gradients_accumulate_is_no_step(tmp_path):
    _, found = fit(tmp_path, LoRACallback(r=2), LoRAMonitor(1), accumulate_grad_batches=4)
    assert steps(found) == [0, 1, 2, 3, 4]


def test_a_resumed_run_measures_at_the_same_steps(tmp_path):
    files = checkpoints(tmp_path / "files", monitor=None)
    fit(tmp_path / "one", LoRACallback(r=2, merge=False), LoRAMonitor(6), files, max_epochs=1)
    module, logger = Lit(), CSVLogger(tmp_path / "two", name="", version="")
    runner = trainer(LoRACallback(r=2), LoRAMonitor(6), logger=logger, limit_val_batches=0, max_epochs=2)
    runner.fit(module, data(), ckpt_path=tmp_path / "files" / "last.ckpt")
    assert steps(rows(tmp_path / "one")) == [0, 6, 8] and steps(rows(tmp_path / "two")) == [8, 12, 16]
    assert rows(tmp_path / "one")[-1]["lora_ratio"] == rows(tmp_path / "two")[0]["lora_ratio"]


class TwoOptimizers(Lit):
    automatic_optimization = False

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        layers = self.net.layers
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (layers[0], layers[1])]


def test_two_optimizers_step_once_for_a_batch(tmp_path):
    _, found = fit(tmp_path, LoRACallback(r=2), LoRAMonitor(4), module=TwoOptimizers())
    assert steps(found) == [0, 4, 8, 12, 16]


def test_every_logger_gets_the_values(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board, files = TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv", name="", version="")
    trainer(LoRACallback(r=2), LoRAMonitor(8), logger=[board, files], limit_val_batches=0).fit(Lit(), data())
    events = accumulator.EventAccumulator(board.log_dir)
    events.Reload()
    for key in ("lora_ratio", "lora_stable_rank/net.layers.0.q", "lora_amplification"):
        written = {str(event.step): event.value for event in events.Scalars(key)}
        assert written == {row["step"]: pytest.approx(float(row[key])) for row in rows(tmp_path / "csv") if row[key]}
        assert "16" in written


def test_norms_of_frozen_weights_are_computed_once_in_a_run(tmp_path, monkeypatch):
    computed, plain = [], measuring._norms
    monkeypatch.setattr(measuring, "_norms", lambda matrix: computed.append(tuple(matrix.shape)) or plain(matrix))
    fit(tmp_path, LoRACallback(r=2), LoRAMonitor(5))
    assert computed.count((16, 16)) == len(LAYERS) and computed.count((2, 2)) == 5 * len(LAYERS)


def test_a_module_that_apply_lora_adapted_and_a_name(tmp_path):
    module = Lit()
    apply_lora(module, LoRAConfig(r=2, targets="qv", name="fr"))
    fit(tmp_path, LoRAMonitor(name="fr"), module=module)
    assert "lora_ratio/fr" in (tmp_path / "metrics.csv").read_text()
    assert "lora_stable_rank/fr/net.layers.1.v" in (tmp_path / "metrics.csv").read_text()


def test_which_arguments_are_refused():
    with pytest.raises(TypeError, match=r"`every_n_steps` must be an integer, but got 2\.5"):
        LoRAMonitor(2.5)
    with pytest.raises(ValueError, match=r"`every_n_steps` must be at least 1, but got 0\. .* leave the callback out"):
        LoRAMonitor(0)


def test_without_a_logger(tmp_path):
    with pytest.raises(
        MisconfigurationException, match=r"it has none\. Give it a `logger`, such as CSVLogger, or leave"
    ):
        trainer(LoRACallback(r=2), LoRAMonitor()).fit(Lit(), data())
    fit(tmp_path, LoRACallback(r=2), LoRAMonitor())
    trainer(LoRACallback(r=2), LoRAMonitor(), fast_dev_run=True, logger=True).fit(Lit(), data(), data())


@pytest.mark.parametrize("callbacks", [(), (TuneCallback("bias"),)])
def test_without_adapters(tmp_path, callbacks):
    with pytest.raises(
        MisconfigurationException, match=r"and Lit has none\. Add a LoRACallback to the Trainer, or leave"
    ):
        fit(tmp_path, *callbacks, LoRAMonitor())
    trainer(*callbacks, max_steps=1).fit(Lit(), data(), data())


def test_what_cannot_be_measured_is_refused_before_the_first_step(tmp_path):
    module, steps_taken = Lit(), []
    apply_lora(module, LoRAConfig(r=2, targets="qv"))
    module.on_before_zero_grad = lambda optimizer: steps_taken.append(1)
    with pytest.raises(ValueError, match="`name` must be an adapter of Lit, which has 'default', but got 'fr'"):
        fit(tmp_path, LoRAMonitor(name="fr"), module=module)
    assert not steps_taken


def test_the_command_line_knows_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py"])
    arguments = [
        "--trainer.callbacks+=LoRACallback",
        "--trainer.callbacks+=LoRAMonitor",
        "--trainer.callbacks.every_n_steps=7",
    ]
    made = LightningCLI(Lit, args=[*arguments, "--trainer.logger=false"], run=False, save_config_callback=None)
    (monitor,) = [callback for callback in made.trainer.callbacks if isinstance(callback, LoRAMonitor)]
    assert monitor.every_n_steps == 7
