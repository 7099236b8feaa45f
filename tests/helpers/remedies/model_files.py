"""Remedies of messages about the files of a model: shards, their index, damaged files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.on_disk import attention_pairs, base_tensors, write_adapter, write_base
from tests.helpers.remedies.case import Expected, remedy
from tests.helpers.remedies.command_line import command, files, not_there

WEIGHTS = "files/weights.py"


@remedy(WEIGHTS, "`{}` does not exist", "nothing`", "give a .safetensors file or a directory with one")
def weights_that_are_there(message: Expected, folder: Path) -> None:
    base, _ = files(folder)
    for given in (base, base / "model.safetensors"):
        not_there(message, folder, "plan", given)


@remedy(WEIGHTS, "`{}` has no .safetensors file", "base`", "`save_pretrained`, which writes safetensors")
def weights_in_safetensors(message: Expected, folder: Path) -> None:
    _, adapter = files(folder)
    torch.save(base_tensors(), folder / "base" / "pytorch_model.bin")
    (folder / "base" / "model.safetensors").unlink()
    with message:
        command("merge", folder / "base", adapter, folder / "out")
    save_file(base_tensors(), folder / "base" / "model.safetensors")
    command("merge", folder / "base", adapter, folder / "out")


@remedy(WEIGHTS, "`{}` has {} indices", "2 indices", "keep one of them")
def one_index(message: Expected, folder: Path) -> None:
    base = write_base(folder / "base", base_tensors(), 2)
    shutil.copy(base / "model.safetensors.index.json", base / "other.safetensors.index.json")
    with message:
        command("plan", base, "--targets", "qv")
    (base / "other.safetensors.index.json").unlink()
    read_all(base)


def read_all(base: Path) -> None:
    adapter = write_adapter(base.with_name("pairs"), attention_pairs())
    command("merge", base, adapter, base.with_name("out"))
    assert {name for file in base.with_name("out").glob("*.safetensors") for name in load_file(file)} == {
        *base_tensors()
    }


@remedy(WEIGHTS, "`{}` has {} safetensors files and no", "2 safetensors files", "give one of the files")
def one_file_of_two(message: Expected, folder: Path) -> None:
    base, adapter = files(folder)
    shutil.copy(base / "model.safetensors", base / "other.safetensors")
    (base / "model.safetensors").rename(base / "first.safetensors")
    with message:
        command("merge", base, adapter, folder / "out")
    command("merge", base / "other.safetensors", adapter, folder / "out.safetensors")


@remedy(WEIGHTS, "`{}` names {}, which is not there", "model-00002-of-00002.safetensors", "fetch the missing file")
def the_missing_file(message: Expected, folder: Path) -> None:
    base = write_base(folder / "base", base_tensors(), 2)
    shard = base / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    with message:
        command("plan", base)
    shard.write_bytes(content)
    read_all(base)


@remedy(WEIGHTS, "`{}` says that {} holds {}", "`lm_head.weight`", "Fetch them again")
def files_that_belong_together(message: Expected, folder: Path) -> None:
    base = write_base(folder / "base", base_tensors(), 2)
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = content["weight_map"]
    wrong = {**places, "lm_head.weight": places["model.norm.weight"], "model.norm.weight": places["lm_head.weight"]}
    wrong |= {"lm_head.weight": next(file for file in set(places.values()) if file != places["lm_head.weight"])}
    index.write_text(json.dumps({**content, "weight_map": wrong}))
    with message:
        command("plan", base)
    index.write_text(json.dumps(content))
    read_all(base)


@remedy(WEIGHTS, "`{}` is in {} and in {}", "`lm_head.weight`", "keep one of the two")
def a_tensor_in_one_file(message: Expected, folder: Path) -> None:
    base = write_base(folder / "base", base_tensors(), 2)
    first, second = sorted(base.glob("*.safetensors"))
    both, alone = (load_file(file) for file in (first, second))
    name = "lm_head.weight"
    whole = base_tensors()[name]
    save_file({**both, name: whole}, first, {"format": "pt"})
    save_file({**alone, name: whole}, second, {"format": "pt"})
    with message:
        command("plan", base)
    content = json.loads((base / "model.safetensors.index.json").read_text())
    holder = first if content["weight_map"][name] == first.name else second
    for file, tensors in ((first, both), (second, alone)):
        kept = {key: value for key, value in tensors.items() if key != name}
        save_file({**kept, **({name: whole} if file == holder else {})}, file, {"format": "pt"})
    read_all(base)


@remedy("files/json_files.py", "`{}` is damaged or truncated", "adapter_config.json`", "copy or download it again")
def a_configuration_that_is_copied_again(message: Expected, folder: Path) -> None:
    copied_again(message, files(folder)[1], "adapter_config.json")


@remedy(
    "files/safetensors.py", "`{}` is not a whole safetensors file", "adapter_model.safetensors`", "Copy or download it"
)
def a_file_that_is_copied_again(message: Expected, folder: Path) -> None:
    copied_again(message, files(folder)[1], "adapter_model.safetensors")


def copied_again(message: Expected, adapter: Path, name: str) -> None:
    content = (adapter / name).read_bytes()
    (adapter / name).write_bytes(content[: len(content) // 2])
    with message:
        command("inspect", adapter)
    (adapter / name).write_bytes(content)
    command("inspect", adapter)
