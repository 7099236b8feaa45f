"""The benchmark of speed: every section at small shapes, and what its numbers rest on."""

from __future__ import annotations

import datetime
import gc
import importlib
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"
MODEL_ROWS = ["bound", "full fine-tuning", "peft, bf16 adapters", "lightning_lora"]
BOTH_PEFT = ["bound", "full fine-tuning", "peft, fp32 adapters", "peft, bf16 adapters", "lightning_lora"]
LAYERS = ["Linear 64 -> 64, 64 rows", "Linear 64 -> 224", "Linear 64 -> 224, dropout 0.1", "Linear 224 -> 64, bias"]
SEVERAL = [f"lightning_lora, {what}" for what in ("one adapter", "one of several chosen", "2 adapters, mixed")]
ROWS = {
    "bert": MODEL_ROWS,
    "qwen": MODEL_ROWS,
    "checkpointing": MODEL_ROWS,
    "resnet": MODEL_ROWS,
    "vit": [*MODEL_ROWS, 'lightning_lora, targets="qv"'],
    "vit-compiled": [*MODEL_ROWS, 'lightning_lora, targets="qv"'],
    "dropout": MODEL_ROWS,
    "ranks": [*BOTH_PEFT, *BOTH_PEFT],
    "seven_b": MODEL_ROWS,
    "embedding": ["frozen", "peft, bf16 adapters", "peft, fp32 adapters", "lightning_lora"],
    "llama": [*BOTH_PEFT, *MODEL_ROWS],
    "llama-compiled": MODEL_ROWS,
    "mixed": [
        "bound",
        "full fine-tuning",
        "peft, fp32 adapters",
        "lightning_lora",
        'lightning_lora, base_dtype="bf16"',
    ],
    "layers": [*LAYERS, "Conv2d 64 -> 128, 3 x 3, 2 images of 14 x 14"],
    "several": [*SEVERAL, "bound", "full fine-tuning", "peft, bf16 adapters"],
    "several-long": [*SEVERAL, "bound", "full fine-tuning", "peft, bf16 adapters"],
    "several-inference": [*SEVERAL, "bound", "peft, 8 adapters, mixed"],
    "several-host": SEVERAL,
    "several-paths": ["64, 64, 2, 2", "64, 64, 2, 2"],
    "small": [
        *("bound", "full fine-tuning", "peft, fp32 adapters", "lightning_lora"),
        *("bound", "full fine-tuning", "lightning_lora") * 2,
    ],
    "fit": ["without a callback", "lightning_lora"],
    "fit-7b": ["without a callback", "lightning_lora"],
    "injection": ["peft", "lightning_lora"],
    "inference": ["base", "lightning_lora"],
    "host": ["plain", "checkpointed", "dropout 0.1"],
    "merge": ["peft", "lightning_lora"],
    "files": ["lightning-lora merge", "peft merge_and_unload"],
}
FAST = ("several-host", "injection", "inference", "host", "merge")


class SmallResNet(nn.Module):
    """Convolutions under timm's names."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2)
        self.fc = nn.Linear(8, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(images).relu()).mean((2, 3)))


class SmallViT(nn.Module):
    """A patch embedding and a block under timm's names."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 16, 16)
        self.blocks = nn.Sequential(SmallViTBlock())
        self.head = nn.Linear(16, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch_embed(images).flatten(2).mT).mean(1))


class SmallViTBlock(nn.Module):
    """Attention with a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(16), SmallViTAttention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm1(x))


class SmallViTAttention(nn.Module):
    """Query, key and value from one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


def timm_stub() -> ModuleType:
    timm = ModuleType("timm")
    kinds = {"resnet50": SmallResNet, "vit_large_patch16_224": SmallViT}
    timm.create_model = lambda name, *, num_classes, **shapes: kinds[name](num_classes)
    return timm


@pytest.fixture
def speed(monkeypatch) -> ModuleType:
    """The script as a module; timm has a stand-in where it is not installed."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    if importlib.util.find_spec("timm") is None:
        monkeypatch.setitem(sys.modules, "timm", timm_stub())
    return importlib.import_module("speed")


@pytest.fixture
def section(speed) -> Callable[[str], ModuleType]:
    """A module of the sections, by its name."""
    return lambda name: importlib.import_module(f"speed_sections.{name}")


def result(speed: ModuleType, folder: Path, *words: str) -> str:
    assert speed.main([*words, "--tiny", "--out", str(folder / "speed")]) == 0
    return (folder / f"speed_{datetime.date.today()}.md").read_text()


def test_every_section_is_tested(speed):
    assert list(ROWS) == list(speed.SECTIONS)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]
)
def test_a_section(speed, tmp_path, name):
    text = result(speed, tmp_path, "--sections", name)
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| [^|]", line)]
    rows = [cells for cells in table if re.search(r"\d", " ".join(cells[1:]))]
    assert [cells[0] for cells in rows] == ROWS[name]
    for cells in rows:
        for cell in cells[1:]:
            assert cell == "yes" or float(cell.rstrip("x").replace(",", "")) >= 0 or name == "embedding"
    bars = [line for line in text.splitlines() if line.startswith("Bar: ")]
    assert bars
    for bar in bars:
        assert re.fullmatch(
            r"Bar: lightning_lora.*: at (least|most) \S+( \(aim \S+\))?\. Measured -?\d+\.\d+: "
            r"(met|met, the aim too|MISSED)\.",
            bar,
        )
    assert "Not measured" not in text and "Error" not in text


@pytest.mark.slow
def test_a_second_call_appends(speed, tmp_path):
    first = result(speed, tmp_path, "--sections", "merge")
    both = result(speed, tmp_path, "--sections", "injection", "host")
    assert both.startswith(first) and both.count("torch 2.") == 2
    assert "`python examples/benchmarks/speed.py --sections injection host --tiny`" in both
    headings = [line.split(",")[0] for line in both.splitlines() if line.startswith("## ")]
    assert [heading.split()[1] for heading in headings] == ["Merge", "Injection", "Host"]


def test_a_package_that_is_missing_is_named_and_the_rest_runs(speed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "speed_sections.images", raising=False)
    text = result(speed, tmp_path, "--sections", "resnet", "injection")
    assert "Not run: timm is not installed." in text and "Injection" in text


def test_a_section_that_fails_is_reported_and_the_rest_runs(speed, section, tmp_path, monkeypatch, capsys):
    def broken(settings: Any) -> list[str]:
        raise RuntimeError("no such | device")

    monkeypatch.setattr(section("merging"), "merge", broken)
    assert speed.main(["--sections", "merge", "injection", "--tiny"]) == 1
    text = capsys.readouterr().out
    assert "FAILED: RuntimeError: no such / device" in text and "Injection" in text


@pytest.mark.slow
def test_a_row_that_fails_leaves_the_others(section):
    rows, settings = section("rows"), section("settings")

    def broken() -> Any:
        raise ValueError("not adapted")

    measured = rows.measure({"bound": lambda: list, "broken": broken}, settings.Windows(2, 1), settings.Settings())
    assert measured["bound"].ms > 0
    assert measured["broken"].failure == "ValueError: not adapted"


@pytest.mark.slow
def test_rows_that_do_not_fit_together_are_measured_alone(section):
    """A model that is still referenced while the next one starts would fail the second time too."""
    rows, settings = section("rows"), section("settings")
    models: list[weakref.ref] = []

    def start() -> Callable[[], object]:
        gc.collect()
        if any(model() is not None for model in models):
            raise torch.cuda.OutOfMemoryError("out of memory")
        model = nn.Linear(2, 2)
        models.append(weakref.ref(model))
        return lambda: model(torch.ones(2))

    names = ("first", "second", "third")
    measured = rows.measure(dict.fromkeys(names, start), settings.Windows(2, 1), settings.Settings())
    assert list(measured) == list(names) and len(models) == 4
    assert all(row.ms > 0 and not row.failure for row in measured.values())


def test_windows_are_in_turns_and_the_median_counts(section, monkeypatch):
    timing, settings = section("timing"), section("settings")
    calls: list[str] = []
    clock = iter([0, 1, 0, 5, 0, 3, 0, 5, 0, 20, 0, 5])  # start and end of each window
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert timing.in_turns(steps, settings.Windows(3, 2)) == {"a": 1500, "b": 2500}
    assert "".join(calls) == "aabb" * 3


def test_bars_say_what_was_asked_and_measured(section):
    bars = section("bars")
    assert bars.at_least("speed", 0.845, 0.84, 0.9) == "Bar: speed: at least 0.84 (aim 0.9). Measured 0.845: met."
    assert bars.at_least("speed", 0.9, 0.84, 0.9).endswith("Measured 0.900: met, the aim too.")
    assert bars.at_most("time", 1.3, 1.12) == "Bar: time: at most 1.12. Measured 1.300: MISSED."
    assert bars.at_most("time", float("nan"), 1.12) == "Bar: time: at most 1.12. Not measured."


def test_the_faster_of_peft_and_full_is_the_bar(section, monkeypatch):
    comparison, Row = section("comparison"), section("rows").Row
    monkeypatch.setattr(comparison, "CUDA", True)
    rows = {
        "bound": Row(ms=8, peak=1),
        "full fine-tuning": Row(ms=12, peak=4),
        "peft, bf16 adapters": Row(ms=11, peak=2),
        "lightning_lora": Row(ms=10, peak=3),
    }
    assert comparison.share(rows, "lightning_lora") == 0.8
    faster, memory = comparison.never_slower(rows, "lightning_lora")
    assert faster == "Bar: lightning_lora, speed over that of peft, bf16 adapters: at least 1. Measured 1.100: met."
    assert memory == "Bar: lightning_lora, peak GiB, as full fine-tuning: at most 4. Measured 3.000: met."
    rows["peft, bf16 adapters"] = Row(failure="too old")
    assert "over that of full fine-tuning" in comparison.never_slower(rows, "lightning_lora")[0]


def test_compute_is_passed_where_the_signature_has_it(section):
    settings = section("settings")

    def with_sides(model: nn.Module, config: object, *, compute: str = "auto") -> None: ...

    def without_sides(model: nn.Module, config: object) -> None: ...

    assert settings.compute_argument("weights", with_sides) == {"compute": "weights"}
    assert settings.compute_argument("auto", without_sides) == {}
    with pytest.raises(ValueError, match=r"`--compute weights` needs .* without_sides takes `compute`.* Leave"):
        settings.compute_argument("weights", without_sides)
    assert settings.Settings(computes=("auto",)).names() == ["lightning_lora"]
    both = settings.Settings(computes=("activations", "weights"))
    assert both.names(", q and v") == ["lightning_lora (activations), q and v", "lightning_lora (weights), q and v"]
    assert [make() for make in both.ours(str.upper).values()] == ["ACTIVATIONS", "WEIGHTS"]


def test_the_gradient_flows_through_the_frozen_base(section):
    """In the bound, all of the backward pass runs but the gradients of weights."""
    adapters, decoders = section("adapters"), section("decoders")
    model = adapters.frozen_but(decoders.llama("tiny"), decoders.first_norm)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "model.layers.0.input_layernorm.weight"
    ]
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert decoders.first_norm(model).grad.count_nonzero() > 0


def test_the_models_have_the_sizes_of_those_they_are_named_after(section, monkeypatch):
    monkeypatch.setattr(section("training"), "DEVICE", torch.device("meta"))
    monkeypatch.setattr(section("settings"), "CUDA", True)
    decoders, full = section("decoders"), section("settings").Settings()
    models = [
        decoders.llama("1.1 B"),
        decoders.llama("7 B"),
        decoders.qwen("0.5 B"),
        section("language").bert_model(full),
    ]
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    assert sizes == [1_104_218_112, 6_738_415_616, 494_032_768, 109_483_778]


class BreaksWhenAsked(nn.Module):
    """A model whose graph breaks in a module of it."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.inner = BreaksInside(breaks)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


class BreaksInside(nn.Module):
    """Where the graph breaks."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        return x * 2


@pytest.mark.slow
@pytest.mark.parametrize("apart", [True, False])
def test_a_compiled_model_keeps_its_graph_beside_one_that_breaks(section, apart):
    """With ``torch.compile`` alone it does not: the reason for a cache of its own."""
    training, rows = section("training"), section("rows")
    torch._dynamo.reset()
    whole, broken = (
        training.compile_apart(model) if apart else torch.compile(model, backend="aot_eager")
        for model in (BreaksWhenAsked(False), BreaksWhenAsked(True))
    )
    x = torch.ones(3)
    assert torch.equal(whole(x), 2 * x + 1) and torch.equal(broken(x), 2 * x + 1)
    rows.counters.clear()
    whole(x)
    assert (rows.counters["stats"]["unique_graphs"] == 0) is apart
    torch._dynamo.reset()


def test_ops_for_gpus_run_on_the_cpu_inside_the_block_alone(section):
    host = section("host")
    limited = [importlib.import_module(name) for name in host.OPS_FOR_GPUS]
    limited = [module for module in limited if hasattr(module, "DEVICES")]
    before = [module.DEVICES for module in limited]
    with host.paths_of_gpus() as forced:
        assert forced == [module.__name__ for module in limited]
        assert all("cpu" in module.DEVICES for module in limited)
    assert [module.DEVICES for module in limited] == before
