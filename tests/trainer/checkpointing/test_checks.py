"""What a checkpoint of a run may hold: each part that is wrong is named before the module is touched."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_lora import LoRACallback, load_from_checkpoint
from tests.helpers.models import Lit, checkpoints, data, trainer
from tests.helpers.oracles import same_bits, snapshot

A, B = (f"net.layers.0.q.lora.default.{letter}" for letter in "AB")
Normed = partial(Lit, batch_norm=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The file of a run whose BatchNorm moved."""
    files = checkpoints(tmp_path_factory.mktemp("run"))
    trainer(LoRACallback(r=2, merge=False), files, max_epochs=1).fit(Normed(), data(), data(1))
    return Path(files.last_model_path)


def changed(written, path, change):
    checkpoint = torch.load(written, weights_only=True)
    change(checkpoint, checkpoint["state_dict"], checkpoint["lightning_lora"])
    torch.save(checkpoint, path)
    return path


def put(where: str, key: str, value: object):
    def change(checkpoint, state, facts):
        {"state": state, "facts": facts, "checkpoint": checkpoint}[where][key] = (
            value(state) if callable(value) else value
        )

    return change


def lose(where: str, key: str):
    return lambda checkpoint, state, facts: {"state": state, "facts": facts}[where].pop(key)


def random_states(key: str, index: int, value: object):
    def change(checkpoint, state, facts):
        (states,) = facts["random_states"]
        states[key] = [*states[key][:index], value, *states[key][index + 1 :]]

    return change


WRONG = {
    "complex A": (put("state", A, lambda s: s[A].to(torch.complex64)), rf"`{A}` is a torch.complex64 of shape"),
    "integer B": (put("state", B, lambda s: s[B].long()), rf"`{B}` is a torch.int64 of shape .*, and must be a matrix"),
    "no tensor": (put("state", A, 3), rf"`{A}` is a int"),
    "NaN": (put("state", A, lambda s: s[A] / 0 * 0), rf"`{A}` holds NaN or infinity: the training that wrote it"),
    "overflow": (put("state", B, lambda s: s[B].double() + 1e300), rf"`{B}` has values that the model's torch.float32"),
    "another shape": (put("state", A, lambda s: s[A].T.contiguous()), rf"`{A}` has shape \(16, 2\)"),
    "a complex buffer": (
        put("state", "net.bn.running_var", lambda s: s["net.bn.running_var"].to(torch.complex64)),
        r"`net.bn.running_var` is of torch.complex64 in the file",
    ),
    "a buffer is missing": (lose("state", "net.bn.running_mean"), "it lacks `net.bn.running_mean`, other than when"),
    "an adapter is missing": (lose("state", A), rf"it lacks `{A}`"),
    "a name with control characters": (put("state", "a\x1b[2J", torch.ones(1)), r"`a\\x1b\[2J` is no name of a weight"),
    "a long name": (put("state", "a" * 5000, torch.ones(1)), r"`a{150}...` is no name of a weight"),
    "a name that is none": (put("state", 3, torch.ones(1)), r"`3` is no name of a weight"),
    "no state": (put("checkpoint", "state_dict", [1]), "its weights are no dict"),
    "no facts": (put("checkpoint", "lightning_lora", 3), "does not say what adapter it holds"),
    "no configuration": (put("facts", "config", [3]), "its configuration is missing"),
    "no fingerprint": (put("facts", "base", {"a": 3}), "the fingerprint of its base is missing or damaged"),
    "a rate of no run": (put("facts", "run", {"lr_scale": "much"}), "its `lr_scale` is `much`"),
    "a random state": (put("facts", "random_states", [{"numpy": 3}]), "its random state is damaged"),
    "outside of the random state": (random_states("numpy", 2, 10**6), "its random state is damaged"),
    "a short random state": (random_states("python", 1, [1, 2]), "its random state is damaged"),
    "a huge rank": (
        lambda checkpoint, state, facts: facts["config"].update(r=60_000_000),
        r"needs [\d,]{10,} numbers, and the file holds",
    ),
    "a slow pattern": (
        lambda checkpoint, state, facts: facts["config"].update(targets=["re:(a+)+$"]),
        "a repeat without a bound inside another",
    ),
    "a repeat beyond all bounds": (
        lambda checkpoint, state, facts: facts["config"].update(targets=["re:a{99999999999}"]),
        "repetition number is too large",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_each_part_that_is_wrong_is_named_in_a_short_error(tmp_path, written, change, words):
    path = changed(written, tmp_path / "a.ckpt", change)
    with pytest.raises(ValueError, match=words) as caught:
        load_from_checkpoint(Lit, path)
    assert len(str(caught.value)) < 1000 + 2 * len(str(path)) and str(caught.value).isprintable()


@pytest.mark.parametrize("case", ["NaN", "a complex buffer", "outside of the random state", "a buffer is missing"])
def test_the_module_of_a_run_stays_as_it_was(tmp_path, written, case):
    change, words = WRONG[case]
    module = Normed()
    before = snapshot(module)
    with pytest.raises(ValueError, match=words):
        trainer(LoRACallback(r=2), max_epochs=2).fit(
            module, data(), ckpt_path=changed(written, tmp_path / "a.ckpt", change)
        )
    after = module.state_dict()
    assert all(same_bits(after[key], value) for key, value in before.items())


def test_what_another_writer_could_have_changed_is_read(tmp_path, written):
    def change(checkpoint, state, facts):
        state[A] = state[A].to(torch.bfloat16)  # by hand, to make the file smaller
        facts["random_states"][0]["python"] = list(random.getstate())
        del facts["entries"]

    module = load_from_checkpoint(Lit, changed(written, tmp_path / "a.ckpt", change))
    expected = torch.load(written, weights_only=True)["state_dict"][A].to(torch.bfloat16)
    assert torch.equal(module.state_dict()[A], expected.float())
