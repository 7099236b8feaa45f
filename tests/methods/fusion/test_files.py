"""Trained bottlenecks in checkpoints: what is read, and what is refused by its path."""

from __future__ import annotations

import pytest
import torch

from lightning_lora.methods.bottleneck.config import BottleneckConfig
from lightning_lora.methods.bottleneck.method import BottleneckMethod
from lightning_lora.methods.fusion.files import read, read_all
from lightning_lora.model.fingerprint import fingerprint
from tests.helpers import models


def write(path, placement="pfeiffer", change=None, **arguments):
    """A checkpoint as a run writes it; ``change`` takes and gives it."""
    model = models.net()
    method = BottleneckMethod(BottleneckConfig(placement=placement, **{"size": 3, **arguments}))
    method.complete(model)
    recorded = {"method": "bottleneck", "config": method.config.to_dict(), "base": fingerprint(model)}
    checkpoint = {"state_dict": method.state(model), "lightning_lora": recorded}
    torch.save(checkpoint if change is None else change(checkpoint), path)
    return path


def test_read(tmp_path):
    trained = read(str(write(tmp_path / "fr.ckpt", name="fr")))
    assert (trained.config.name, trained.config.size) == ("fr", 3)
    assert trained.at("layers.0.mlp").keys() == {"down", "down_bias", "up", "up_bias"}
    trained.check_base(fingerprint(models.net()))


def test_a_directory_with_one_checkpoint(tmp_path):
    write(tmp_path / "fr.ckpt")
    assert read(str(tmp_path)).path == tmp_path / "fr.ckpt"
    write(tmp_path / "de.ckpt")
    with pytest.raises(ValueError, match=r"names the directory '.*', which must hold one checkpoint .* but it holds 2"):
        read(str(tmp_path))


def test_names(tmp_path):
    paths = [str(write(tmp_path / f"{name}.ckpt", name=name)) for name in ("fr", "de")]
    assert list(read_all(paths)) == ["fr", "de"]
    assert list(read_all({"x": paths[0], "y": paths[0]})) == ["x", "y"]
    with pytest.raises(ValueError, match=r"has 2 files with the names \['fr', 'fr'\], which must differ"):
        read_all([paths[0], paths[0]])


@pytest.mark.parametrize(
    ("key", "value"), [("placement", "houlsby"), ("size", 4), ("activation", "relu"), ("scale", 2.0)]
)
def test_others_are_refused_by_name(tmp_path, key, value):
    adapters = {"fr": str(write(tmp_path / "fr.ckpt")), "de": str(write(tmp_path / "de.ckpt", **{key: value}))}
    with pytest.raises(ValueError, match=f"bottlenecks of one kind, but 'de' has {key}={value!r} and 'fr' has {key}="):
        read_all(adapters)


def recorded(**changes):
    return lambda checkpoint: {**checkpoint, "lightning_lora": {**checkpoint["lightning_lora"], **changes}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda checkpoint: {"state_dict": {}}, "which is no checkpoint of AdapterCallback"),
        (lambda checkpoint: [1], "which is no checkpoint of AdapterCallback"),
        (recorded(method="lora"), "which is no checkpoint of AdapterCallback (its method is 'lora')"),
        (recorded(base=3), "its fingerprint is damaged"),
        (recorded(config={"size": 0}), "`size` must be at least 1"),
    ],
)
def test_other_files(tmp_path, change, words):
    path = write(tmp_path / "x.ckpt", change=change)
    with pytest.raises(ValueError) as raised:
        read(str(path))
    assert words in str(raised.value)
    assert f"`adapters` names '{path}'" in str(raised.value)


def test_no_file_and_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`adapters` names '.*no\.ckpt', where there is no file"):
        read(str(tmp_path / "no.ckpt"))
    whole = write(tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"`adapters` names '.*half\.ckpt', which cannot be read"):
        read(str(tmp_path / "half.ckpt"))


def test_another_base(tmp_path):
    trained = read(str(write(tmp_path / "fr.ckpt")))
    other = models.net()
    other.head.weight.data += 1
    with pytest.raises(
        ValueError, match=r"fr\.ckpt', which was trained on another base: `head.weight` has other values"
    ):
        trained.check_base(fingerprint(other))
    with pytest.raises(ValueError, match=r"holds no bottleneck for `layers.7.mlp`"):
        trained.at("layers.7.mlp")
