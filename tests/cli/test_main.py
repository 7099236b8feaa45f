"""The command as a user calls it: output, exit status, JSON, and errors of one line."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors.torch import load_file, save_file

from lightning_lora import LoRACallback, __version__
from lightning_lora.cli import main as command_line
from lightning_lora.cli import options as command_options
from lightning_lora.cli.main import COMMANDS, main
from tests.helpers.on_disk import (
    attention_pairs,
    base_tensors,
    everything_in,
    listing,
    values,
    write_adapter,
    write_base,
)
from tests.helpers.scripts import run_module

ROOT = Path(__file__).parents[2]
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
Q = "model.layers.0.self_attn.q_proj"


def trained(path):
    """The checkpoint of a run."""
    files = ModelCheckpoint(dirpath=path.parent, filename=path.stem, every_n_epochs=1)
    callbacks = [LoRACallback(r=2, targets=["layer"], merge=False), files]
    Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=2, limit_val_batches=0, callbacks=callbacks, **QUIET
    ).fit(BoringModel())


def fill(folder):
    trained(folder / "run.ckpt")  # first, while the folder is empty: ModelCheckpoint warns of other files
    base = base_tensors(torch.bfloat16)
    write_base(folder / "base", base, 2)
    write_adapter(folder / "adapter", attention_pairs())
    write_adapter(folder / "other", {name: (A, 2 * B) for name, (A, B) in attention_pairs().items()})
    write_base(folder / "tuned", {name: value + values(*value.shape).bfloat16() for name, value in base.items()})
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(fill(tmp_path))
    return tmp_path


CALLS = {
    "inspect": ["inspect", "adapter"],
    "merge": ["merge", "base", "adapter", "out", "--json"],
    "diff": ["diff", "adapter", "other"],
    "extract": ["extract", "base", "tuned", "extracted", "--r", "2", "--targets", "q_proj", "v_proj"],
    "plan": ["plan", "base", "--targets", "qv", "--json"],
    "export": ["export", "run.ckpt", "exported", "--inner", ""],
    "error": ["merge", "base", "nothing", "out2"],
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder in which every sub-command ran, and of each: output, errors and exit status."""
    folder = fill(tmp_path_factory.mktemp("cli"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        return folder, {name: captured(call) for name, call in CALLS.items()}


def captured(call):
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = main(call)
    return out.getvalue(), err.getvalue(), status


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "import"])
def test_every_command_runs(done, name):
    assert done[1][name][2] == 0, done[1][name][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merge", "error"])
def test_a_process_of_its_own_does_the_same(done, tmp_path, name):
    process = run_module("lightning_lora", *CALLS[name], folder=fill(tmp_path))
    assert (process.stdout, process.stderr, process.returncode) == done[1][name]


def test_export_and_import_are_each_others_reverse(done, monkeypatch):
    folder, finished = done
    assert finished["export"][0].startswith("exported: 1 adapted layer, ")
    monkeypatch.chdir(folder)
    assert json.loads(captured(["import", "exported", "again.ckpt", "--json"])[0])["layers"] == [{"name": "layer"}]
    one, other = (torch.load(folder / name, weights_only=True)["state_dict"] for name in ("run.ckpt", "again.ckpt"))
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_inspect_shows_every_map(done):
    lines = done[1]["inspect"][0].splitlines()
    assert lines[0] == "adapter: PEFT directory, 4 adapted layers, rank 3"
    assert re.search(rf"{Q} +8 -> 8  3      2          48", done[1]["inspect"][0])
    assert "fingerprint of the base: no" in lines


def test_merge_writes_and_reports(done):
    folder, finished = done
    found = json.loads(finished["merge"][0])
    assert {layer["name"] for layer in found["layers"]} == {f"{name}.weight" for name in attention_pairs()}
    A, B = attention_pairs()[Q]
    merged = everything_in(folder / "out")[f"{Q}.weight"]
    torch.testing.assert_close(merged, (base_tensors(torch.bfloat16)[f"{Q}.weight"].float() + 2 * B @ A).bfloat16())
    assert 0 < found["total"]["lost"] < 0.05


def test_diff_shows_the_factor(done):
    assert "updates that differ: 4 of 4" in done[1]["diff"][0]
    assert all(" 1  1.000000" in line for line in done[1]["diff"][0].splitlines()[2:])


def test_extract_writes_an_adapter(done):
    folder, finished = done
    assert listing(folder / "extracted") == ["adapter_config.json", "adapter_model.safetensors"]
    assert "extracted: 4 pairs" in finished["extract"][0] and "not chosen" in finished["extract"][0]


def test_plan_counts(done):
    found = json.loads(done[1]["plan"][0])["total"]
    assert found["trainable_parameters"] == 8 * 2 * (16 + 12)
    assert found["checkpoint_bytes"]["16-bit"]["lora"] == 2 * found["trainable_parameters"]


def test_an_error_is_one_line(done):
    folder, finished = done
    out, err, status = finished["error"]
    assert (out, status) == ("", 1)
    assert re.fullmatch(r"lightning-lora merge: `nothing` does not exist: give a PEFT directory\.\n", err)
    assert not (folder / "out2").exists()


@pytest.mark.parametrize(
    "call",
    [
        [], ["mrg"], ["merge", "base"], ["extract", "a", "b", "c", "--r", "0"], ["plan"],
        ["plan", "base", "--hidden", "8"], ["inspect", "adapter", "--unknown"], ["diff", "a", "b", "--top", "x"],
    ],
)  # fmt: skip
def test_wrong_usage(here, capsys, call):
    with pytest.raises(SystemExit) as stopped:
        main(call)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


# Runs each command in one process, and prints the modules of Lightning after each; `-c SCRIPT JSON`.
ALONE = """
import contextlib, io, json, sys
from lightning_lora.cli.main import main
for call in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        assert main(call) == 0, call
    print(call[0], [name for name in ("lightning", "pytorch_lightning", "lightning_fabric") if name in sys.modules])
    if call[0].startswith("--"):  # the parser alone
        assert not [name for name in sys.modules if name.startswith("lightning_lora.cli.") and name.split(".")[2] in
                    ("inspect", "merge", "diff", "extract", "plan", "convert", "config_model")], sys.modules.keys()
"""


@pytest.mark.slow
def test_no_command_imports_lightning(done):
    folder, _ = done
    made = {"merge": "alone", "extract": "alone2", "export": "alone3"}  # where the fixture wrote is taken
    calls = [["--help"], ["--version"], ["inspect", "run.ckpt"]]
    for name in (name for name in CALLS if name != "error"):
        calls.append(
            [made.get(name, part) if part in ("out", "extracted", "exported") else part for part in CALLS[name]]
        )
    calls.append(["import", "alone3", "alone.ckpt", "--inner", ""])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    finished = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(calls)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.splitlines() == [f"{call[0]} []" for call in calls]


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and __version__ in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_every_option(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text and command_options.PARSERS[name][1] in " ".join(text.split())
    assert all(
        re.search(rf"{option}\b[^\n]*\n? +\S+ \S+", text) for option in re.findall(r"^  (--\w+)", text, re.MULTILINE)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "import"])
def test_json_is_json(here, capsys, name):
    call = [part for part in CALLS[name] if part != "--json"]
    assert main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == name and found["total"] and all(layer["name"] for layer in found["layers"])


def test_an_error_is_json_too(here, capsys):
    assert main(["inspect", "none", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["command"] == "inspect" and err == f"lightning-lora inspect: {json.loads(out)['error']}\n"


@pytest.mark.slow
def test_a_checkpoint_is_an_adapter(here, capsys):
    torch.manual_seed(0)
    save_file(BoringModel().state_dict(), here / "boring.safetensors")
    run = ModelCheckpoint(dirpath=here / "runs", filename="run", every_n_epochs=1)
    torch.manual_seed(0)
    module = BoringModel()
    arguments = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0, **QUIET}
    Trainer(accelerator="cpu", callbacks=[LoRACallback(r=2, targets=["layer"]), run], **arguments).fit(module)
    assert main(["merge", "boring.safetensors", "runs/run.ckpt", "merged.safetensors"]) == 0
    merged = load_file(here / "merged.safetensors")
    assert all(torch.equal(value, merged[key]) for key, value in module.state_dict().items())
    assert main(["diff", "runs/run.ckpt", "runs/run.ckpt"]) == 0
    assert "updates that differ: 0 of 1" in capsys.readouterr().out


def refuse_constant(name):
    raise AssertionError(name)


def test_json_without_nan(here, capsys):
    A, B = attention_pairs()[Q]
    write_adapter(here / "bad", {Q: (A * float("nan"), B)})
    assert main(["inspect", "bad", "--json"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=refuse_constant)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (["inspect", "base"], "has no file `adapter_config.json`"),
        (["inspect", "none"], "does not exist"),
        (["merge", "none", "adapter", "out"], "does not exist: give a .safetensors file or a directory"),
        (["merge", "base", "adapter", "tuned"], "exists: choose another name, or give --overwrite"),
        (["merge", "base", "adapter", "base", "--overwrite"], "must be apart"),
        (["diff", "base", "adapter"], "is an adapter and `base` is a model"),
        (["extract", "base", "base", "out"], "must be apart|no chosen layer that differs"),
        (["plan", "base", "--targets", "k_proj"], "matches no module"),
        (["plan", "none"], "does not exist"),
        (["merge", "base", "run.ckpt", "out"], "has no tensor `layer.weight`"),
        (["import", "run.ckpt", "again.ckpt"], "`run.ckpt` is a file, and DIR must be a PEFT directory"),
        (["import", "none", "again.ckpt"], "`none` does not exist: give a PEFT directory"),
        (["export", "adapter/adapter_model.safetensors", "out"], "is no checkpoint: CKPT must be the .ckpt of a run"),
        (["export", "adapter", "out"], "is no checkpoint: CKPT must be the .ckpt of a run"),
        (["export", "none", "out"], "`none` does not exist: give the .ckpt of a run"),
        (["merge", "run.ckpt", "adapter", "out"], "is a checkpoint of PyTorch or Lightning"),
        (["plan", "run.ckpt"], "are shown by `lightning-lora inspect CKPT`"),
    ],
)
def test_errors(here, capsys, call, match):
    before = listing(here)
    assert main(call) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"lightning-lora {call[0]}: ") and re.search(match, err)
    assert listing(here) == before


def test_a_cut_file(here, capsys):
    shard = next((here / "base").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-9])
    assert main(["merge", "base", "adapter", "out"]) == 1
    assert "is not a whole safetensors file" in capsys.readouterr().err
    assert not (here / "out").exists()


def test_interrupted(here, capsys, monkeypatch):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "inspect", interrupt)
    assert main(["inspect", "adapter"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.slow
def test_a_bar_where_somebody_watches(here, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    made = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    assert main(["merge", "base", "adapter", "out"]) == 0
    assert made == [], "stderr is no terminal"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(command_line, "PATIENCE", 0)
    assert main(["merge", "base", "adapter", "out2"]) == 0
    assert made[0].n == made[0].total == sum(value.nbytes for value in base_tensors(torch.bfloat16).values())
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["merge", "base", "adapter", "out3"]) == 0


def test_the_script_is_declared():
    assert 'lightning-lora = "lightning_lora.cli.main:main"' in (ROOT / "pyproject.toml").read_text()
