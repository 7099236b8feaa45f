"""Remedies of messages of the command `lightning-lora`, and of the model files that it reads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    LoRACallback,
    load_adapter,
    load_from_checkpoint,
    merge_lora,
    save_adapter,
)
from lightning_lora.cli.main import COMMANDS
from lightning_lora.cli.options import make_parser
from tests.helpers.models import Lit, Net, net
from tests.helpers.on_disk import attention_pairs, base_tensors, pair, values, write_adapter, write_base
from tests.helpers.remedies.case import Expected, fit, fit_to_file, outputs, remedy

CONVERT = "cli/convert.py"
IMPORT = "cli/import_directory.py"
MERGE = "cli/merge.py"
MATCH = "cli/base_match.py"


def command(*arguments: object) -> None:
    """Run a command; its error is raised."""
    given = make_parser().parse_args([str(argument) for argument in arguments])
    COMMANDS[str(given.command)](given[str(given.command)])


def files(folder: Path) -> tuple[Path, Path]:
    """A base and an adapter of it."""
    base = write_base(folder / "base", base_tensors())
    return base, write_adapter(folder / "adapter", attention_pairs())


def checkpoint(folder: Path, **arguments: object) -> tuple[nn.Module, str]:
    module = Lit()
    return module, fit_to_file(folder, LoRACallback(merge=False, **arguments), module=module)


def not_there(message: Expected, folder: Path, *call: object) -> None:
    """`call` with a path that does not exist gives the message, and works with the last argument."""
    *first, path = call
    with message:
        command(*first, folder / "nothing")
    command(*first, path)


@remedy(
    "cli/inspect.py", "`{}` does not exist", "nothing`", "give a PEFT directory, a .safetensors file or a .ckpt file"
)
def inspect_what_is_there(message: Expected, folder: Path) -> None:
    _, adapter = files(folder)
    _, path = checkpoint(folder / "run")
    for given in (adapter, adapter / "adapter_model.safetensors", path):
        not_there(message, folder, "inspect", given)


@remedy("cli/diff.py", "`{}` does not exist", "nothing`", "give a model or a PEFT directory")
def compare_what_is_there(message: Expected, folder: Path) -> None:
    for given in files(folder):
        not_there(message, folder, "diff", given, given)


@remedy(
    "cli/diff.py", "`{}` is an adapter and `{}` is a model", "adapter`", "base`", "give two of a kind", "merge it and"
)
def compare_two_of_a_kind(message: Expected, folder: Path) -> None:
    base, adapter = files(folder)
    with message:
        command("diff", adapter, base)
    command("diff", adapter, adapter)
    command("merge", base, adapter, folder / "merged")
    command("diff", base, folder / "merged")


@remedy(CONVERT, "`{}` does not exist", "nothing`", "give the .ckpt of a run with LoRACallback")
def export_a_checkpoint(message: Expected, folder: Path) -> None:
    _, path = checkpoint(folder)
    with message:
        command("export", folder / "nothing", folder / "out")
    command("export", path, folder / "out")


@remedy(CONVERT, "`{}` is no checkpoint", "CKPT must be the .ckpt", "`lightning-lora inspect PATH`")
def a_directory_needs_no_export(message: Expected, folder: Path) -> None:
    _, adapter = files(folder)
    with message:
        command("export", adapter, folder / "out")
    command("inspect", adapter)


@remedy(IMPORT, "`{}` is a file, and DIR must be", "`lightning-lora export CKPT DIR`")
def a_checkpoint_needs_no_import(message: Expected, folder: Path) -> None:
    trained, path = checkpoint(folder)
    with message:
        command("import", path, folder / "again.ckpt")
    command("export", path, folder / "directory")
    load_adapter(model := net(), folder / "directory")
    assert torch.equal(outputs(model), outputs(trained))


@remedy(
    IMPORT, "`{}` does not record its base and configuration", "LoRACallback(init_from=...)", "load_adapter(model, "
)
def a_directory_of_peft(message: Expected, folder: Path) -> None:
    directory = of_peft(folder / "peft")
    with message:
        command("import", directory, folder / "run.ckpt")
    module = fit(LoRACallback(r=2, targets=["q"], init_from=str(directory), merge=False))
    assert module.net.layers[0].q.lora.default.B.any()
    assert load_adapter(net(), directory) == ["layers.0.q", "layers.1.q"]


def of_peft(directory: Path) -> Path:
    """What peft writes, made without it."""
    pairs = {f"layers.{index}.q": (values(2, 16, seed=index), values(16, 2, seed=index + 5)) for index in (0, 1)}
    return write_adapter(directory, pairs, r=2, lora_alpha=2)


@remedy(
    CONVERT, "`{}` is adapted and lies outside of `inner={}`", "`net.layers.1.q`", "`inner='net.layers.0'`", "name a"
)
def a_module_that_holds_all(message: Expected, folder: Path) -> None:
    _, path = checkpoint(folder, targets=["q"])
    with message:
        command("export", path, folder / "out", "--inner", "net.layers.0")
    command("export", path, folder / "out", "--inner", "net")


@remedy(
    CONVERT,
    "Export it from the module",
    "the module can place",
    "save_adapter(load_from_checkpoint(YourModule, path), ",
)
def what_the_module_exports(message: Expected, folder: Path) -> None:
    trained, path = checkpoint(folder, also_train=["head"])
    with message:
        command("export", path, folder / "out")
    save_adapter(load_from_checkpoint(Lit, path), folder / "out")
    load_adapter(module := Lit(), folder / "out")
    torch.testing.assert_close(outputs(module), outputs(trained))


@remedy(
    IMPORT, "`{}` holds more than pairs of plain layers", "`head.bias`", "load_adapter(model, directory)", "init_from"
)
def what_the_module_imports(message: Expected, folder: Path) -> None:
    trained, _ = checkpoint(folder, also_train=["head"])
    save_adapter(trained, folder / "out")
    with message:
        command("import", folder / "out", folder / "again.ckpt")
    load_adapter(module := Lit(), folder / "out")
    torch.testing.assert_close(outputs(module), outputs(trained))
    fit(LoRACallback(also_train=["head"], init_from=str(folder / "out")))


@remedy(
    "cli/base_values.py",
    "The adapter was trained on another base",
    "has other values",
    "Give the base it was trained on",
)
def the_base_of_the_adapter(message: Expected, folder: Path) -> None:
    base, other = write_lit(folder / "base"), net()
    nn.init.ones_(other.layers[0].q.weight)
    save_file(other.state_dict(), folder / "other.safetensors")
    _, path = checkpoint(folder)
    with message:
        command("merge", folder / "other.safetensors", path, folder / "out.safetensors")
    command("merge", base, path, folder / "out.safetensors")


def write_lit(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(net().state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


@remedy(MERGE, "`{}` overflows {} when delta is added", "overflows F16", "give the base in fp32 or bf16")
def a_base_of_a_wider_dtype(message: Expected, folder: Path) -> None:
    pairs = {name: (300 * A, 300 * B) for name, (A, B) in attention_pairs().items()}
    adapter = write_adapter(folder / "adapter", pairs)
    half = write_base(folder / "half", base_tensors(torch.float16))
    with message:
        command("merge", half, adapter, folder / "out")
    for dtype in (torch.float32, torch.bfloat16):
        command("merge", write_base(folder / str(dtype), base_tensors(dtype)), adapter, folder / f"out {dtype}")


@remedy(MERGE, "`{}` of the adapter overflows {}", "`lm_head.weight`", "F16", "give the base in fp32 or bf16")
def a_head_of_a_wider_dtype(message: Expected, folder: Path) -> None:
    head = {"lm_head.weight": 1e6 * values(20, 8)}
    adapter = write_adapter(folder / "adapter", attention_pairs(), head, modules_to_save=["lm_head"])
    half = write_base(folder / "half", base_tensors(torch.float16))
    with message:
        command("merge", half, adapter, folder / "out")
    for dtype in (torch.float32, torch.bfloat16):
        command("merge", write_base(folder / str(dtype), base_tensors(dtype)), adapter, folder / f"out {dtype}")


@remedy(MATCH, "`{}` is named by `target_modules`", "`model.layers.1.self_attn.q_proj`", "Save the adapter again")
def an_adapter_that_is_whole(message: Expected, folder: Path) -> None:
    base, pairs = write_base(folder / "base", base_tensors()), attention_pairs()
    some = {name: value for name, value in pairs.items() if ".1." not in name}
    with message:
        command("merge", base, write_adapter(folder / "cut", some, target_modules=["q_proj", "v_proj"]), folder / "out")
    command("merge", base, write_adapter(folder / "again", pairs, target_modules=["q_proj", "v_proj"]), folder / "out")


@remedy(MATCH, "`{}` of the adapter may be `{}.{}`", "`a.q` or `b.q` of the base", "give a base with that part alone")
def a_base_with_one_part(message: Expected, folder: Path) -> None:
    adapter = write_adapter(folder / "adapter", {"q": pair(8, 8)})
    both = write_base(folder / "both", {"a.q.weight": values(8, 8), "b.q.weight": values(8, 8)})
    alone = write_base(folder / "alone", {"a.q.weight": values(8, 8), "a.q.bias": values(8)})
    with message:
        command("merge", both, adapter, folder / "out")
    command("merge", alone, adapter, folder / "out")
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(8, 8)}), "b": nn.ModuleDict({"q": nn.Linear(8, 8)})})
    load_adapter(model, adapter, inner="a")
    assert set(merge_lora(model)) == {"a.q"}


@remedy(
    MATCH,
    "`{}` is of {}, whose few bits",
    "`model.layers.0.self_attn.q_proj.weight`",
    "Give the base in full precision that was quantized",
)
def a_base_in_full_precision(message: Expected, folder: Path) -> None:
    _, adapter = files(folder)
    tensors = base_tensors()
    few = {name: value.to(torch.int8) if "q_proj" in name else value for name, value in tensors.items()}
    with message:
        command("merge", write_base(folder / "few", few), adapter, folder / "out")
    command("merge", folder / "base", adapter, folder / "out")


@remedy(MATCH, "`{}` is square, and no layer near it shows", "`h.q.weight`", "by load_adapter and merge_lora")
def a_square_weight_in_the_module(message: Expected, folder: Path) -> None:
    adapter = write_adapter(folder / "adapter", {"h.q": pair(8, 8)}, fan_in_fan_out=True)
    near = {"h.a.weight": values(4, 8), "h.a.bias": values(4), "h.b.weight": values(8, 4), "h.b.bias": values(4)}
    base = write_base(folder / "base", {**near, "h.q.weight": values(8, 8), "h.q.bias": values(8)})
    with message:
        command("merge", base, adapter, folder / "out")
    import transformers

    model = nn.ModuleDict({"h": nn.ModuleDict({"q": transformers.pytorch_utils.Conv1D(8, 8)})})
    load_adapter(model, adapter)
    assert set(merge_lora(model)) == {"h.q"}


@remedy(MATCH, "`{}` is in the adapter in full, of shape {}", "`lm_head.weight`", "Resize the base's first")
def a_base_that_is_resized(message: Expected, folder: Path) -> None:
    head = {"lm_head.weight": values(24, 8)}
    adapter = write_adapter(folder / "adapter", attention_pairs(), head, modules_to_save=["lm_head"])
    tensors = base_tensors()
    with message:
        command("merge", write_base(folder / "base", tensors), adapter, folder / "out")
    resized = torch.cat([tensors["lm_head.weight"], torch.zeros(4, 8)])
    command("merge", write_base(folder / "resized", {**tensors, "lm_head.weight": resized}), adapter, folder / "out")


@remedy(
    MATCH,
    "Make them two tensors in the base first",
    "`tie_word_embeddings=False`",
    "give the head a copy of its weight",
)
def a_base_that_is_untied(message: Expected, folder: Path) -> None:
    adapter = write_adapter(folder / "adapter", {"lm_head": pair(20, 8)})
    tensors = base_tensors()
    tied = {name: value for name, value in tensors.items() if not name.startswith("lm_head")}
    with message:
        command(
            "merge", write_base(folder / "tied", tied, config={"tie_word_embeddings": True}), adapter, folder / "out"
        )
    tied["lm_head.weight"] = tied["model.embed_tokens.weight"].clone()
    command(
        "merge", write_base(folder / "untied", tied, config={"tie_word_embeddings": False}), adapter, folder / "out"
    )


@remedy(
    "cli/main.py",
    "`{}` is a checkpoint of PyTorch",
    "last.ckpt`",
    "`lightning-lora merge BASE CKPT OUT`",
    "export CKPT",
)
def where_checkpoints_are_taken(message: Expected, folder: Path) -> None:
    base = write_lit(folder / "base")
    trained, path = checkpoint(folder)
    with message:
        command("plan", path)
    command("inspect", path)
    command("export", path, folder / "directory")
    command("merge", base, path, folder / "out.safetensors")
    (plain := Net()).load_state_dict(load_file(folder / "out.safetensors"))
    torch.testing.assert_close(outputs(plain), outputs(trained))


def configuration(message: Expected, folder: Path, **changes: object) -> None:
    """A config.json that transformers cannot build, and the safetensors file or the directory with it in its place."""
    import transformers

    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=20)
    base = write_base(folder / "base", base_tensors(), config={**config.to_dict(), **changes})
    with message:
        command("plan", base / "config.json")
    command("plan", base / "model.safetensors")
    command("plan", base)


@remedy(
    "cli/config_model.py",
    "`{}` has the `model_type` {}",
    "config.json` has",
    "Give its safetensors file or the directory",
)
def a_model_type_that_is_unknown(message: Expected, folder: Path) -> None:
    configuration(message, folder, model_type="unheard-of")


@remedy("cli/config_model.py", "`{}` has {} in `architectures`, which transformers", "Give its safetensors file or the")
def an_architecture_that_is_unknown(message: Expected, folder: Path) -> None:
    configuration(message, folder, architectures=["UnheardOfForCausalLM"])
