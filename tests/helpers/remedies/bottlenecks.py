"""Remedies of messages about bottleneck adapters and their fusion."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import AdapterCallback, BottleneckConfig, FusionConfig, adapt, remove_adapted
from tests.helpers.models import Encoder, LitEncoder, data, trainer
from tests.helpers.remedies.case import Expected, remedy

CONFIG, PLACES, SITES = "methods/bottleneck/config.py", "methods/bottleneck/places.py", "methods/bottleneck/sites.py"
FILES = "methods/fusion/files.py"
X = torch.randn(2, 16)


class Blocks(nn.Module):
    """One block; ``way`` says how the layers of its MLP are called."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layers, self.way = Encoder().layers, way

    def forward(self, x):
        block = self.layers[0]
        x = x + block.attn(x)
        if self.way == "last layer alone":
            return x + block.mlp.fc2(torch.relu(nn.functional.linear(x, block.mlp.fc1.weight)))
        hidden = checkpoint(block.mlp.fc1, x, use_reentrant=True) if self.way == "checkpointed" else block.mlp.fc1(x)
        return x + block.mlp.fc2(torch.relu(hidden))


class Wide(nn.TransformerEncoderLayer):
    """A block whose output is not what its MLP gives."""

    def forward(self, *args, **kwargs):
        y = super().forward(*args, **kwargs)
        return torch.cat([y, y], -1)


class InDict(nn.TransformerEncoderLayer):
    def forward(self, *args, **kwargs):
        return {"y": super().forward(*args, **kwargs)}


@remedy(CONFIG, "`size` must be at least 1", "but got 0", "leave the callback out")
def a_bottleneck_of_no_size(message: Expected, folder: Path) -> None:
    with message:
        AdapterCallback(0)
    trainer(max_epochs=1, limit_train_batches=1).fit(LitEncoder(), data())


@remedy(PLACES, "`{}` was called, but not the first layer", "`layers.0.mlp.fc2`", "placement='pfeiffer'")
def an_mlp_whose_last_layer_alone_is_called(message: Expected, folder: Path) -> None:
    adapt(model := Blocks("last layer alone"), BottleneckConfig(2, "parallel"))
    with message:
        model(torch.randn(1, 4, 16))
    remove_adapted(model)
    adapt(model, BottleneckConfig(2, "pfeiffer"))
    model(torch.randn(1, 4, 16))


@remedy(PLACES, "A part of the MLP", "`layers.0.mlp.fc2`", "Checkpoint the whole block", "placement='pfeiffer'")
def an_mlp_of_which_a_part_is_checkpointed(message: Expected, folder: Path) -> None:
    x = torch.randn(1, 4, 16, requires_grad=True)
    adapt(model := Blocks("checkpointed"), BottleneckConfig(2, "parallel"))
    with message:
        model(x)
    model.way = "whole"
    checkpoint(model, x, use_reentrant=True).sum().backward()
    remove_adapted(model)
    model.way = "checkpointed"
    adapt(model, BottleneckConfig(2, "pfeiffer"))
    model(x).sum().backward()


@remedy(PLACES, "What was added to `{}`", "`layers.1` acts on 16 features", "exclude=['layers.1']")
def a_block_of_more_features(message: Expected, folder: Path) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 8), Wide(16, 2, 8)])})
    adapt(model, BottleneckConfig(2, "block"))
    with message:
        nn.Sequential(*model["layers"])(X)
    remove_adapted(model)
    adapt(model, BottleneckConfig(2, "block", exclude=["layers.1"]))
    nn.Sequential(*model["layers"])(X)


@remedy(PLACES, "The output of `{}` must be a tensor", "`layers.1`", "got a dict", "exclude=['layers.1']")
def a_block_that_gives_a_dict(message: Expected, folder: Path) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 8), InDict(16, 2, 8)])})
    adapt(model, BottleneckConfig(2, "block"))
    with message:
        nn.Sequential(*model["layers"])(X)
    remove_adapted(model)
    adapt(model, BottleneckConfig(2, "block", exclude=["layers.1"]))
    nn.Sequential(*model["layers"])(X)


@remedy(SITES, "Take placement={}", "found no attention in ModuleDict", "Take placement='pfeiffer'")
def a_placement_for_a_model_without_attention(message: Expected, folder: Path) -> None:
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))})
    with message:
        adapt(model, BottleneckConfig(2))
    assert adapt(model, BottleneckConfig(2, "pfeiffer")) == ["mlp.2"]


def write(path: Path, model: nn.Module | None = None, **arguments: object) -> str:
    """A checkpoint of a short run over ``model``, or an encoder."""
    callback = AdapterCallback(2, "pfeiffer", liveness=False, **arguments)
    runner = trainer(callback, max_epochs=1, limit_train_batches=1, enable_checkpointing=False)

    class Saving(type(LitEncoder())):
        def on_train_end(self):
            self.trainer.save_checkpoint(path)

    module = Saving()
    if model is not None:
        module.net = model
    runner.fit(module, data())
    return str(path)


@remedy(FILES, "`adapters` names {}, which holds no bottleneck", "`net.layers.1.mlp.fc2`", "exclude=['net.layers.1.mlp")
def a_place_without_a_bottleneck(message: Expected, folder: Path) -> None:
    paths = {"some": write(folder / "some.ckpt", exclude=["layers.1"]), "all": write(folder / "all.ckpt")}
    paths = {"all": paths["all"], "some": paths["some"]}
    with message:
        adapt(LitEncoder(), FusionConfig(paths))
    assert adapt(LitEncoder(), FusionConfig(paths, exclude=["net.layers.1.mlp.fc2"])) == ["net.layers.0.mlp.fc2"]


@remedy(FILES, "`adapters` names {}, which was trained on another base", "has other values", "Load the base it was")
def bottlenecks_of_another_base(message: Expected, folder: Path) -> None:
    path, other = write(folder / "a.ckpt"), LitEncoder()
    other.net.embed.weight.data += 1
    with message:
        adapt(other, FusionConfig([path]))
    other.load_state_dict(LitEncoder().state_dict())
    adapt(other, FusionConfig([path]))


@remedy(FILES, "`adapters` has {} files with the names", "['default', 'default']", "adapters={'first': PATH")
def bottlenecks_of_one_name(message: Expected, folder: Path) -> None:
    paths = [write(folder / "a.ckpt"), write(folder / "b.ckpt")]
    with message:
        adapt(LitEncoder(), FusionConfig(paths))
    adapt(LitEncoder(), FusionConfig({"first": paths[0], "second": paths[1]}))


@remedy(FILES, "`adapters` names the directory {}", "holds 2", "Name a file.")
def a_directory_of_several_checkpoints(message: Expected, folder: Path) -> None:
    path, _ = write(folder / "a.ckpt"), write(folder / "b.ckpt")
    with message:
        adapt(LitEncoder(), FusionConfig([str(folder)]))
    adapt(LitEncoder(), FusionConfig([path]))


class Note:
    """An object of the user's own."""


@remedy(FILES, "`adapters` names {}, which holds an object of", "Note", "torch.load(PATH, weights_only=False)")
def a_checkpoint_with_an_object(message: Expected, folder: Path) -> None:
    path, new_path = write(folder / "a.ckpt"), str(folder / "new.ckpt")
    torch.save({**torch.load(path), "note": Note()}, path)
    with message:
        adapt(LitEncoder(), FusionConfig([path]))
    torch.save({key: torch.load(path, weights_only=False)[key] for key in ("state_dict", "lightning_lora")}, new_path)
    adapt(LitEncoder(), FusionConfig([new_path]))
