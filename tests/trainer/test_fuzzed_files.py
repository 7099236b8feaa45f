"""Files with random damage, and files that somebody changed with care: one clear error, or all of what the file holds.

`FUZZ_SECONDS=3600 FUZZ_SEED=7 python -m pytest -s tests/trainer/test_fuzzed_files.py` runs for an hour and counts.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import struct
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_lora import LoRACallback, LoRAConfig, apply_lora, save_adapter
from lightning_lora.cli.inspect import inspect_files
from lightning_lora.methods.lora import LoRAMethod
from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.trainer.checkpointing.init_and_export import start_from
from tests.helpers.models import Lit, checkpoints, data, trainer
from tests.helpers.oracles import same_bits, snapshot, train_by_hand

SECONDS = float(os.environ.get("FUZZ_SECONDS", 0))
SEED = int(os.environ.get("FUZZ_SEED", 0))
CASES = 400
CONFIG = LoRAConfig(r=2, targets="attn")
WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
STRANGE = [
    None,
    True,
    -1,
    0,
    1e999,
    10**9,
    2**70,
    "",
    "a\x1b[2J",
    "re:(a+)+$",
    "(a+)+$",
    "x" * 9999,
    [],
    {},
    [[]],
    {"a": 1},
]


def fresh() -> Lit:
    return Lit(batch_norm=True)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A folder with a run's checkpoint and a PEFT directory."""
    folder = tmp_path_factory.mktemp("sound")
    files, module = checkpoints(folder), fresh()
    trainer(LoRACallback(r=2, merge=False), files, max_epochs=1).fit(module, data(), data(1))
    shutil.copy(files.last_model_path, folder / "run.ckpt")
    other = fresh()
    apply_lora(other, CONFIG)
    train_by_hand(other)
    save_adapter(other, folder / "directory")
    return folder


def damage(rng: random.Random, content: bytes) -> bytes:
    """Bits flipped, or a part cut, repeated, moved or overwritten."""
    kind, changed = rng.randrange(6), bytearray(content)
    start = rng.randrange(len(changed) or 1)
    stop = min(len(changed), start + rng.choice([1, 4, 64, 4096]))
    if kind == 0:
        for _ in range(rng.choice([1, 1, 8])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[start:]
    elif kind == 2:
        del changed[start:stop]
    elif kind == 3:
        changed[start:start] = changed[start:stop]
    elif kind == 4:
        changed[start:stop] = rng.randbytes(stop - start)
    else:
        there = rng.randrange(len(changed))
        changed[there : there + stop - start] = changed[start:stop]
    return bytes(changed)


def archive_changed(rng: random.Random, content: bytes) -> bytes:
    """Another archive with right checksums: the pickle changed, or records swapped, lost, repeated or cut."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in records if name.endswith("data.pkl"))
    kind, (one, other) = rng.randrange(8), rng.sample(sorted(records), 2)
    if kind < 4:
        records[pickled] = damage(rng, records[pickled])
    elif kind == 4:
        records[one], records[other] = records[other], records[one]
    elif kind == 5:
        del records[one]
    elif kind == 6:
        records[one] = damage(rng, records[one] or b"0")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if kind == 7 else zipfile.ZIP_STORED) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return buffer.getvalue()


def value_changed(rng: random.Random, value: object) -> object:
    """The same data with one value somewhere in it replaced, lost or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        others = {k: v for k, v in value.items() if k != key}
        choice = rng.random()
        if choice < 0.1:
            return others
        if choice < 0.2:
            return {**others, str(rng.choice(STRANGE)): value[key]}
        return {**value, key: value_changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return [*value[:place], value_changed(rng, value[place]), *value[place + 1 :]]
    if isinstance(value, torch.Tensor) and rng.random() < 0.9:
        changes = [
            value * float("nan"),
            value.to(torch.complex64),
            value.long(),
            value.flatten()[:0],
            value.double() * 1e300,
        ]
        return rng.choice([*changes, torch.zeros((), dtype=value.dtype).expand(value.shape)])
    return rng.choice(STRANGE)


def entry_changed(rng: random.Random, content: bytes) -> bytes:
    """A checkpoint that torch.save wrote, with another value somewhere."""
    checkpoint = torch.load(io.BytesIO(content), weights_only=True)
    key = rng.choice(["state_dict", "lightning_lora", "lightning_lora"])
    checkpoint[key] = value_changed(rng, checkpoint[key])
    torch.save(checkpoint, buffer := io.BytesIO())
    return buffer.getvalue()


def json_changed(rng: random.Random, content: bytes) -> bytes:
    """JSON with another value somewhere, a key twice, or deep nesting."""
    kind = rng.randrange(8)
    if kind == 0:
        return content.rstrip()[:-1] + b', "r": 3, "r": 2}'
    if kind == 1:
        return b'{"a": ' * 5000 + b"1" + b"}" * 5000
    return json.dumps(value_changed(rng, json.loads(content))).encode()


def header_changed(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header."""
    (size,) = struct.unpack_from("<Q", content)
    header = json_changed(rng, content[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


CHANGES: dict[str, list[Callable[[random.Random, bytes], bytes]]] = {
    "run.ckpt": [damage, archive_changed, entry_changed],
    f"directory/{WEIGHTS}": [damage, header_changed],
    f"directory/{ADAPTER_CONFIG}": [damage, json_changed],
}


class Target:
    """A module with adapters, into which files are loaded."""

    def __init__(self) -> None:
        self.module = fresh()
        apply_lora(self.module, CONFIG)
        train_by_hand(self.module)
        self.base, self.before = fingerprint(self.module), snapshot(self.module)

    def load(self, path: Path) -> str:
        """Load what is at `path`, and check that it was loaded as a whole or not at all."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of another base, where the header lost it
                start_from(self.module, str(path), LoRAMethod(CONFIG), self.base)
        except (ValueError, FileNotFoundError) as error:
            check_words(error)
            assert all(same_bits(value, self.before[key]) for key, value in self.module.state_dict().items())
            return "refused"
        state = self.module.state_dict()
        for key, value in values_in(path).items():
            expected = value.to(state[key].dtype)
            torch.testing.assert_close(state[key], expected, rtol=0, atol=0, equal_nan=True)  # a buffer may hold NaN
        self.module.load_state_dict(self.before)
        return "loaded"


def values_in(path: Path) -> dict[str, torch.Tensor]:
    """The values that must be in the module, read by the libraries; of a directory A alone, as B may be scaled."""
    if path.is_file():
        return torch.load(path, "cpu", weights_only=True)["state_dict"]
    tensors = load_file(path / WEIGHTS)
    ends = ("base_model.model.", ".lora_A.weight")
    return {
        f"net.{key.removeprefix(ends[0]).removesuffix(ends[1])}.lora.default.A": value
        for key, value in tensors.items()
        if key.endswith(ends[1])
    }


def inspected(path: Path) -> str:
    """What the command that only looks at a file says."""
    try:
        inspect_files(path)
    except (ValueError, FileNotFoundError) as error:
        check_words(error)
        return "refused"
    return "read"


def check_words(error: Exception) -> None:
    assert len(str(error)) < 2000, str(error)[:300]
    assert str(error).replace("\n", "").isprintable(), repr(error)


@pytest.mark.slow
def test_damaged_and_changed_files_give_one_clear_error_or_load_as_a_whole(sound, tmp_path):
    target, counts, slowest = Target(), Counter(), (0.0, "")
    start, number = time.monotonic(), 0
    while number < CASES or time.monotonic() - start < SECONDS:
        rng = random.Random(f"{SEED}/{number}")
        name = rng.choice(list(CHANGES))
        change = rng.choice(CHANGES[name])
        path = tmp_path / name.partition("/")[0]
        if name.startswith("directory"):
            shutil.copytree(sound / "directory", path, dirs_exist_ok=True)
        (tmp_path / name).write_bytes(change(rng, (sound / name).read_bytes()))
        began = time.monotonic()
        try:
            results = target.load(path), inspected(path)
        except BaseException:
            print(f"case {SEED}/{number}: {name}, {change.__name__}")
            raise
        slowest = max(slowest, (time.monotonic() - began, f"{number} {name} {change.__name__}"))
        counts[(name, change.__name__, *results)] += 1
        number += 1
    for case, count in sorted(counts.items()):
        print(*case, count)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    print(f"{number} files, slowest {slowest[0]:.2f} s ({slowest[1]}), peak {peak} MB")
    assert {key[2] for key in counts} == {"refused", "loaded"}


def test_the_sound_files_load(sound):
    target = Target()
    assert [target.load(sound / name) for name in ("run.ckpt", "directory")] == ["loaded"] * 2
