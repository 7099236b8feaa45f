"""LightningCLI: flags, YAML, a short name for the arguments, and the help that a stranger reads."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

import lightning_lora
from tests.helpers.models import Lit, data
from tests.helpers.scripts import run_script
from tests.helpers.selection import slow_except

COMMON = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


class Plain(Lit):
    def __init__(self, lr: float = 1e-2):
        super().__init__(lr=lr)


class Data(LightningDataModule):
    def train_dataloader(self):
        return data()

    def val_dataloader(self):
        return data(1)

    def test_dataloader(self):
        return data(2)


class ShortCLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_lightning_class_args(lightning_lora.LoRACallback, "lora")


class MonitoringCLI(ShortCLI):
    def instantiate_trainer(self, **kwargs):
        made = super().instantiate_trainer(**kwargs)
        made.checkpoint_callback.monitor = "val_loss"
        return made


def cli(folder: Path, *arguments: str, cls=LightningCLI, **kwargs: object) -> LightningCLI:
    kwargs.setdefault("save_config_callback", None)
    return cls(Plain, Data, args=[*arguments, *COMMON, f"--trainer.default_root_dir={folder}"], **kwargs)


def callback(made: LightningCLI) -> lightning_lora.LoRACallback:
    return next(c for c in made.trainer.callbacks if isinstance(c, lightning_lora.LoRACallback))


def adapters_in(folder: Path) -> dict:
    [file] = folder.rglob("*.ckpt")
    return torch.load(file, weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("path", slow_except(["LoRACallback"], ["lightning_lora.LoRACallback", "LoRACallback"]))
def test_flags(tmp_path, path):
    made = cli(
        tmp_path, "fit", f"--trainer.callbacks+={path}", "--trainer.callbacks.r=4", "--trainer.callbacks.targets=qv"
    )
    config = callback(made).config
    assert (config.r, config.targets) == (4, "qv")
    assert {name.split(".")[3] for name in adapters_in(tmp_path)} == {"q", "v"}
    assert list(made.model.state_dict()) == list(Lit().state_dict())


@pytest.mark.slow
def test_short_arguments_with_lists_and_dicts(tmp_path):
    lora = ["--lora.r=4", '--lora.targets=["q", "layers.1.mlp"]', '--lora.rank_pattern={"mlp": 2}', "--lora.merge=best"]
    made = cli(tmp_path, "fit", *lora, "--lora.also_train=[head]", "--lora.alpha=8", cls=MonitoringCLI)
    config = callback(made).config
    assert (config.r, config.targets, config.rank_pattern) == (4, ["q", "layers.1.mlp"], {"mlp": 2})
    assert (callback(made).run_config.merge, config.also_train, config.alpha) == ("best", ["head"], 8)
    saved = adapters_in(tmp_path)
    assert saved["net.layers.1.mlp.lora.default.A"].shape == (2, 16)
    assert saved["net.layers.0.q.lora.default.A"].shape == (4, 16) and "net.head.weight" in saved


@pytest.mark.slow
def test_yaml(tmp_path):
    arguments = {"r": 2, "targets": ["re:.*layers\\.0\\.[qk]"], "exclude": ["k"], "merge": False, "lr_scale": 10.0}
    entry = {"class_path": "lightning_lora.LoRACallback", "init_args": arguments}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [entry]}}))
    made = cli(tmp_path / "run", "fit", f"--config={config}")
    assert [name for name, _ in lightning_lora.lora_parameters(made.model)] == [
        "net.layers.0.q.lora.default.A",
        "net.layers.0.q.lora.default.B",
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`Plain.configure_optimizers` will be overridden")
def test_the_optimizer_of_the_command_line_is_restricted(tmp_path):
    class OptimizerCLI(ShortCLI):
        def add_arguments_to_parser(self, parser):
            super().add_arguments_to_parser(parser)
            parser.add_optimizer_args(torch.optim.AdamW)
            parser.add_lr_scheduler_args(torch.optim.lr_scheduler.ExponentialLR)

        def instantiate_trainer(self, **kwargs):
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(look)
            return trainer

    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            [self.group] = [dict(group, params=list(group["params"])) for group in trainer.optimizers[0].param_groups]

    look = Look()
    flags = [
        "--optimizer.lr=0.01",
        "--lr_scheduler.gamma=0.9",
        "--lora.r=4",
        "--lora.merge=false",
        "--lora.lr_scale=10",
    ]
    made = cli(tmp_path, "fit", *flags, cls=OptimizerCLI, auto_configure_optimizers=True)
    assert {id(p) for p in look.group["params"]} == {id(p) for _, p in lightning_lora.lora_parameters(made.model)}
    assert look.group["initial_lr"] == pytest.approx(0.1)
    assert "configure_optimizers" in vars(made.model), "the command line's own method is back on the instance"
    assert not hasattr(made.model.configure_optimizers, "replacement")


@pytest.mark.slow
def test_resume_and_test_from_a_file(tmp_path):
    cli(tmp_path / "a", "fit", "--lora.r=4", cls=ShortCLI)
    [file] = (tmp_path / "a").rglob("*.ckpt")
    made = cli(tmp_path / "b", "fit", "--lora.r=4", f"--ckpt_path={file}", "--trainer.max_epochs=2", cls=ShortCLI)
    assert made.trainer.global_step == 8  # COMMON comes last and sets one epoch, which the file has already
    made = cli(tmp_path / "c", "test", "--lora.r=4", f"--ckpt_path={file}", cls=ShortCLI)
    assert "test_loss" in made.trainer.callback_metrics


@pytest.mark.slow
def test_the_saved_configuration_runs_again(tmp_path):
    flags = ["--lora.r=4", "--lora.targets=[q]", "--lora.alpha_pattern={q: 2.0}"]
    made = cli(tmp_path / "a", "fit", *flags, cls=ShortCLI, save_config_callback=SaveConfigCallback)
    saved = tmp_path / "a" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["lora"]["targets"] == ["q"]
    again = cli(tmp_path / "b", "fit", f"--config={saved}", cls=ShortCLI)
    assert callback(again).config == callback(made).config


SCRIPT = """
import sys
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel
import lightning_lora
class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_lightning_class_args(lightning_lora.LoRACallback, "lora")
(CLI if sys.argv[1] == "short" else LightningCLI)(DemoModel, args=sys.argv[2:])
"""


def printed(folder: Path, *arguments: str) -> str:
    (folder / "cli.py").write_text(SCRIPT)
    done = run_script(folder / "cli.py", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_print_config_has_the_public_path(tmp_path):
    text = printed(tmp_path, "long", "fit", "--trainer.callbacks+=lightning_lora.LoRACallback", "--print_config")
    [entry] = yaml.safe_load(text)["trainer"]["callbacks"]
    assert entry["class_path"] == "lightning_lora.LoRACallback"
    assert entry["init_args"]["targets"] == "attn" and entry["init_args"]["r"] == 8
    assert set(entry["init_args"]) == set(inspect.signature(lightning_lora.LoRACallback).parameters)


@pytest.mark.slow
def test_help_comes_from_the_docstring(tmp_path):
    text = " ".join(printed(tmp_path, "short", "fit", "--help").split())
    for words in (
        "LoRA for the LightningModule of this Trainer",
        "--lora.r R Rank of the update. A has shape (r, in_features)",
        "--lora.targets TARGETS",
        "--lora.also_train",
        "(type: Union[bool, Literal['last', 'best'], dict[str, float]], default: True)",
        "(type: float, default: 1.0)",
    ):
        assert words in text, words
    for argument in inspect.signature(lightning_lora.LoRACallback).parameters:
        assert f"--lora.{argument}" in text


@pytest.mark.slow
def test_wrong_values_are_told_by_the_command_line(tmp_path, capsys):
    with pytest.raises(ValueError, match="`r` must be at least 1, but got 0"):
        cli(tmp_path, "fit", "--lora.r=0", cls=ShortCLI)
    with pytest.raises(SystemExit):
        cli(tmp_path, "fit", "--lora.init=xavier", cls=ShortCLI)
    assert "xavier" in capsys.readouterr().err
