"""Checkpoints of runs as PEFT directories and back, judged by peft's outputs and by Lightning's own tests."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    apply_lora,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
    use_adapters,
)
from lightning_lora.cli.convert import export_checkpoint
from lightning_lora.cli.import_directory import import_directory
from tests.helpers.models import Lit, checkpoints, data, net, trainer
from tests.helpers.several import callback_of, fill, opened_by_peft, outputs, outputs_in_peft

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
X = data(5).dataset.tensors[0]
IDS = torch.arange(24).view(2, 12) % 20


def gpt2(**kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=16, **kwargs)
        return transformers.GPT2LMHeadModel(config).eval()


class Language(Lit):
    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.model = gpt2()

    def training_step(self, batch, index):
        return self.model(input_ids=IDS, labels=IDS).loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.model(input_ids=IDS, labels=IDS).loss)


def fit(folder, cls=Lit, **lora):
    module, files = cls(), checkpoints(folder / "files")
    trainer(LoRACallback(**{"r": 4, "merge": False, **lora}), files, max_epochs=1).fit(module, data(), data(1))
    return module.eval(), files.last_model_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora", [{}, {"alpha": 2, "rank_pattern": {"q": 2}}, {"rslora": True, "alpha_pattern": {"v": 3}}]
)
def test_peft_gives_what_was_trained(tmp_path, lora):
    module, path = fit(tmp_path, **lora)
    found = export_checkpoint(path, tmp_path / "out")
    assert found.inner == "net" and len(found.layers) == 8 and "layers.0.q" in found.layers
    model = peft.PeftModel.from_pretrained(net(), str(tmp_path / "out")).eval()
    torch.testing.assert_close(model(X), module(X))
    assert not torch.allclose(model(X), net()(X), atol=1e-2)


@pytest.mark.slow
def test_turned_maps_and_embeddings(tmp_path):
    module, path = fit(tmp_path, Language, targets=["c_attn", "c_fc", "wte"])
    export_checkpoint(path, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(gpt2(tie_word_embeddings=False), str(tmp_path / "out")).eval()
    model.base_model.model.lm_head.weight = nn.Parameter(module.model.lm_head.weight.detach())
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=IDS).logits, module.model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5
        )


class FromDisk(Language):
    """A language model that was loaded by its name, next to something else that is frozen."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = transformers.GPT2LMHeadModel.from_pretrained(base)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)


@pytest.mark.slow
def test_the_auto_class_of_peft_loads_what_a_run_trained(tmp_path):
    gpt2().save_pretrained(tmp_path / "base")
    module, path = fit(tmp_path, partial(FromDisk, str(tmp_path / "base")), targets=["c_attn"])
    exported = export_checkpoint(path, tmp_path / "out")
    assert exported.inner == "model" and exported.layers == [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]
    save_adapter(module, tmp_path / "by-the-module")
    texts = [(tmp_path / name / "adapter_config.json").read_text() for name in ("out", "by-the-module")]
    assert texts[0] == texts[1] and json.loads(texts[0])["task_type"] == "CAUSAL_LM"
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "out")).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, module.model(input_ids=IDS).logits)


def test_a_model_of_no_library_has_no_task(tmp_path):
    _, path = fit(tmp_path)
    export_checkpoint(path, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert values["task_type"] is None and values["base_model_name_or_path"] is None and "auto_mapping" not in values


@pytest.mark.parametrize(
    "entry",
    [
        {"task_type": "MYSTERY"},
        {"auto_mapping": {"base_model_class": "Popen", "parent_library": "subprocess"}},
        {"auto_mapping": {"base_model_class": "a b", "parent_library": "transformers"}},
        {"base_model_name_or_path": "a\x1b[2J"},
        {"revision": "main"},
        3,
    ],
)
def test_classes_that_a_file_cannot_record_are_refused(tmp_path, entry):
    _, path = fit(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lightning_lora"]["peft_classes"] = {"net": entry}
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="what it records of the classes of transformers is damaged"):
        export_checkpoint(path, tmp_path / "out")


@pytest.mark.slow
def test_and_back(tmp_path):
    module, path = fit(tmp_path)
    export_checkpoint(path, tmp_path / "out")
    import_directory(tmp_path / "out", tmp_path / "back.ckpt")
    assert torch.equal(load_from_checkpoint(Lit, tmp_path / "back.ckpt").eval()(X), module(X))
    one, other = (
        trainer(LoRACallback(r=4)).test(Lit(), data(2), ckpt_path=file, verbose=False)
        for file in (path, tmp_path / "back.ckpt")
    )
    assert one == other
    first, again = (torch.load(file, weights_only=True) for file in (path, tmp_path / "back.ckpt"))
    assert (
        first["global_step"] == again["global_step"]
        and first["lightning_lora"]["base"] == again["lightning_lora"]["base"]
    )


@pytest.mark.slow
def test_what_a_run_exported_goes_back_too(tmp_path):
    module, _ = fit(tmp_path, export=str(tmp_path / "out"))
    import_directory(tmp_path / "out", tmp_path / "back.ckpt")
    assert torch.equal(load_from_checkpoint(Lit, tmp_path / "back.ckpt").eval()(X), module(X))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "lora", "words"),
    [
        (Lit, {"also_train": ["head"]}, "holds `net.head.weight`, trained in addition to the adapters"),
        (Lit, {"bias": "lora_only"}, "holds `net.layers.0.q.bias`, trained in addition to the adapters"),
        (Language, {"targets": "qv"}, "lora.default.q.A`, a slice or a stack of a layer"),
    ],
)
def test_what_takes_the_module(tmp_path, cls, lora, words):
    _, path = fit(tmp_path, cls, **lora)
    with pytest.raises(ValueError, match=re.escape(words)):
        export_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def image(conv):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), conv(), nn.Flatten(), Scaled(8, 3))


def module_of(make):
    class Image(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()

    return Image


class Attending(Lit):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.attn = nn.MultiheadAttention(16, 2)

    def forward(self, x):
        return self.net(self.attn(x, x, x)[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:peft 0.21 adds the update")
def test_an_attention_takes_the_module(tmp_path):
    _, path = fit(tmp_path, Attending, targets=["out_proj"])
    with pytest.raises(
        ValueError, match=r"`attn.out_proj` is a projection of an nn.MultiheadAttention\. Export it from"
    ):
        export_checkpoint(path, tmp_path / "out")
    save_adapter(load_from_checkpoint(Attending, path), tmp_path / "out")  # as the error says
    with pytest.raises(ValueError, match=r"only the module can place `attn.out_proj`\. Load it by"):
        import_directory(tmp_path / "out", tmp_path / "back.ckpt")


def test_a_convolution(tmp_path):
    def plain():
        return image(lambda: nn.Conv2d(1, 2, 3))

    module, path = fit(tmp_path, module_of(plain), r=1, targets=["1"])
    export_checkpoint(path, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(plain(), str(tmp_path / "out")).eval()
    torch.testing.assert_close(model(X), module(X))


@pytest.mark.parametrize(
    ("make", "target", "words"),
    [
        (lambda: image(lambda: nn.Conv2d(1, 2, 3, dilation=1, groups=1, padding_mode="reflect")), "1", "padding_mode"),
        (lambda: image(lambda: nn.Conv2d(1, 2, 3)), "3", "is a Scaled with its own forward"),
    ],
)
def test_what_peft_would_compute_otherwise_is_refused(tmp_path, make, target, words):
    _, path = fit(tmp_path, module_of(make), r=1, targets=[target])
    with pytest.raises(ValueError, match=re.escape(words)):
        export_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_square_maps_without_a_bias_are_what_the_run_saw(tmp_path):
    def named():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.ModuleDict({"embed": nn.Linear(16, 16, bias=False), "head": nn.Linear(16, 3)})

    class Named(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net = named()

        def forward(self, x):
            return self.net["head"](self.net["embed"](x))

    module, path = fit(tmp_path, Named, targets=["embed"])
    export_checkpoint(path, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(named(), str(tmp_path / "out")).base_model.model
    torch.testing.assert_close(model["head"](model["embed"](X)), module(X))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(tmp_path, value):
    _, path = fit(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["state_dict"].values()))[0, 0] = value
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="must hold finite numbers: its training failed"):
        export_checkpoint(path, tmp_path / "out")


@pytest.mark.slow
def test_places_that_are_taken(tmp_path):
    _, path = fit(tmp_path)
    export_checkpoint(path, tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists: choose another name, or give --overwrite"):
        export_checkpoint(path, tmp_path / "out")
    export_checkpoint(path, tmp_path / "out", overwrite=True)
    with pytest.raises(FileExistsError, match="exists"):
        import_directory(tmp_path / "out", Path(path))


@pytest.mark.slow
def test_inner(tmp_path):
    module, path = fit(tmp_path)
    with pytest.raises(ValueError, match=re.escape("lies outside of `inner='net.head'`")):
        export_checkpoint(path, tmp_path / "out", "net.head")
    assert export_checkpoint(path, tmp_path / "out", "").layers[0] == "net.layers.0.q"
    model = peft.PeftModel.from_pretrained(nn.ModuleDict({"net": net()}), str(tmp_path / "out"))
    torch.testing.assert_close(model.base_model.model["net"].eval()(X), module(X))


def test_a_directory_of_pefts_says_too_little(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q"])
    peft.get_peft_model(net(), config).save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match=re.escape("start from it by LoRACallback(init_from=...)")):
        import_directory(tmp_path / "peft", tmp_path / "back.ckpt")
    assert not (tmp_path / "back.ckpt").exists()


@pytest.mark.slow
def test_several_adapters_go_into_sub_directories(tmp_path):
    """Those that trained, and one that was kept; or the one that is asked for."""
    apply_lora(module := Lit(), LoRAConfig(r=2, alpha=6, targets=["q", "v"], name="fr"))
    fill(module)
    config = LoRAConfig(targets=["q", "mlp"], adapters={"de": {"r": 3, "rslora": True}, "es": {"targets": ["o"]}})
    files = checkpoints(tmp_path / "files")
    settings = {"max_epochs": 1, "limit_train_batches": 2}
    trainer(callback_of(config, {"fr": 1.0}), files, **settings).fit(module, data(), data(1))
    exported = export_checkpoint(Path(files.last_model_path), tmp_path / "out")
    assert (exported.inner, exported.adapters) == ("net", ["de", "es", "fr"])
    theirs = opened_by_peft(net(), {name: tmp_path / "out" / name for name in exported.adapters})
    for name in exported.adapters:
        with use_adapters(module, name):
            torch.testing.assert_close(outputs_in_peft(theirs, name, X), outputs(module, X))
        alone = export_checkpoint(Path(files.last_model_path), tmp_path / name, name=name)
        assert alone.adapters == []
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "out" / name / file).read_bytes()
    loaded = Lit()
    load_adapter(loaded, tmp_path / "out")
    save_adapter(loaded, tmp_path / "again")
    by_path = (load_file(tmp_path / place / "de" / "adapter_model.safetensors") for place in ("out", "again"))
    assert len({str({key: value.tolist() for key, value in tensors.items()}) for tensors in by_path}) == 1
    with pytest.raises(ValueError, match=r"`--name` must be that of an adapter in .* got 'ds'. It holds `es`, `de`"):
        export_checkpoint(Path(files.last_model_path), tmp_path / "more", name="ds")
