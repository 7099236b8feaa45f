"""Reading what torch.save wrote: legitimate files as torch reads them, hostile ones not at all."""

from __future__ import annotations

import collections
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora.files.pickles import ObjectRefusedError
from lightning_lora.files.torch_files import read_torch_file


class Plain:
    """A class that no file of plain data may name."""

    def __eq__(self, other):
        return type(self) is type(other)

    __hash__ = None


def optimizer_state():
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


LEGITIMATE = {
    "state dict": lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict(),
    "optimizer": optimizer_state,
    "random state": lambda: {"python": random.getstate(), "torch": torch.get_rng_state()},
    "plain data": lambda: {"a": [1, 2.5, None, True, "ü", 2**70, -3], "b": (1, (2, 3)), (1, 2): {3: {}}},
    "bytes and sets": lambda: {"a": b"\x00\xff", "b": bytearray(b"x"), "c": {1, "x"}, "d": 1 + 2j},
    "torch's": lambda: [torch.Size([1, 2]), torch.device("cpu"), torch.float32, torch.strided],
    "collections": lambda: [collections.OrderedDict(a=1), collections.Counter("aab")],
    "views": lambda: [(x := torch.arange(12.0).view(3, 4)).t(), x[1:, ::2], torch.ones(1).expand(5), torch.ones(0, 3)],
    "dtypes": lambda: [torch.ones(3, dtype=d) for d in (torch.bfloat16, torch.bool, torch.complex64, torch.uint16)],
    "small floats": lambda: [torch.ones(2).to(torch.float8_e4m3fn)],
    "parameters": lambda: nn.ParameterList([torch.ones(2)]).state_dict(keep_vars=True),
    "shared": lambda: [tensor := torch.ones(2), tensor, [tensor]],
}


@pytest.mark.parametrize("make", LEGITIMATE.values(), ids=LEGITIMATE)
def test_legitimate_files_are_read_as_torch_reads_them(tmp_path, make):
    torch.save(make(), path := tmp_path / "a.pt")
    assert repr(read_torch_file(path, True)) == repr(torch.load(path, weights_only=True))


def test_objects_are_read_from_trusted_files_and_where_the_user_allowed_their_class(tmp_path):
    torch.save({"a": Plain()}, path := tmp_path / "a.pt")
    with pytest.raises(ObjectRefusedError, match=r"test_torch_files.Plain"):
        read_torch_file(path, True)
    assert read_torch_file(path, False) == {"a": Plain()}
    with torch.serialization.safe_globals([Plain]):
        assert read_torch_file(path, True) == {"a": Plain()}


def nested(depth, share):
    value: list[object] = []
    for _ in range(depth):
        value = [value, value] if share else [value]
    return value


def in_itself():
    value: list[object] = []
    value.append(value)
    return value


HOSTILE = {
    "expanded": (lambda: torch.ones(1).expand(1 << 30), "repeats few values more often"),
    "shared lists": (lambda: nested(60, True), "nested too deeply"),
    "deep": (lambda: nested(200, False), "nested too deeply"),
    "in itself": (in_itself, "holds itself"),
    "keys of one hash": (lambda: {k * (2**61 - 1): 0 for k in range(10_002)}, "keys of a dict that are no strings"),
    "members of one hash": (lambda: {k * (2**61 - 1) for k in range(10_002)}, "keys of a dict that are no strings"),
    "sparse": (lambda: torch.ones(2).to_sparse(), "_rebuild_sparse_tensor"),
    "meta": (lambda: torch.ones(2, device="meta"), "_rebuild_meta_tensor"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "words"), HOSTILE.values(), ids=HOSTILE)
def test_values_that_cost_more_than_they_take_in_the_file_are_refused(tmp_path, make, words):
    torch.save(make(), path := tmp_path / "a.pt")
    with pytest.raises(ValueError, match=words):
        read_torch_file(path, True)


def test_a_pickle_of_a_million_empty_lists_is_refused(tmp_path, monkeypatch):
    torch.save([[] for _ in range(20)], path := tmp_path / "a.pt")
    assert read_torch_file(path, True) == [[]] * 20
    monkeypatch.setattr("lightning_lora.files.pickles.MOST_CONTAINERS", 20)
    with pytest.raises(ValueError, match="its pickle has more than 20 lists, dicts and tensors"):
        read_torch_file(path, True)


def with_pickle(path: Path, change) -> None:
    """Write the archive again with another pickle in it."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"K\x07K\x05\x86", number(10**9) + b"K\x05\x86", "is larger than its record"),  # torch allocates 20 GB
        (b"K#", number(10**9), "is of another size than its record"),  # torch reads memory that is not the file's
        (b"FloatStorage", b"DoubleStorage", "is of another size than its record"),
        (b"K\x07K\x05\x86", number(2**32 - 1) + b"K\x05\x86", "a shape that no tensor has"),
        (b"_rebuild_tensor_v2", b"_rebuild_tensor_v9", "_rebuild_tensor_v9"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n", b"c__builtin__\nbytearray\n", "its pickle is damaged"),
        (b"}q\x00", b"}q\x00" + b"(" * 10, "its pickle is damaged"),
        (b"}q\x00", b"}q\x00" + b"0", "the operation POP"),
        (b"}q\x00", b"}q\x00" + b"B\xff\xff\xff\x7f", "pickle|expected"),
    ],
)
def test_changed_pickles_are_refused_before_torch_sees_them(tmp_path, old, new, words):
    torch.save({"a": torch.ones(7, 5)}, path := tmp_path / "a.pt")
    with_pickle(path, lambda text: text.replace(old, new, 1))
    assert new in zipfile.ZipFile(path).read("a/data.pkl")
    with pytest.raises(ValueError, match=words):
        read_torch_file(path, True)


def test_a_call_that_makes_many_zeros_is_refused(tmp_path):
    torch.save({}, path := tmp_path / "a.pt")
    for call in (b"c__builtin__\nbytearray\n" + number(2**31 - 1) + b"\x85R.", pickle.dumps(bytes(3), 2)):
        with_pickle(path, lambda text, call=call: b"\x80\x02" + call.removeprefix(b"\x80\x02"))
        if b"bytearray" in call:
            with pytest.raises(ValueError, match="its pickle is damaged"):
                read_torch_file(path, True)
        else:
            assert read_torch_file(path, True) == bytes(3)


def test_a_flipped_bit_is_found_whoever_trusts_the_file(tmp_path):
    torch.save({"a": torch.zeros(1000)}, path := tmp_path / "a.pt")
    whole = path.read_bytes()
    at = whole.index(bytes(4000)) + 2000
    path.write_bytes(whole[:at] + b"\x01" + whole[at + 1 :])
    for weights_only in (True, False):
        with pytest.raises(ValueError, match="`data/0` has other bytes than were written"):
            read_torch_file(path, weights_only)
