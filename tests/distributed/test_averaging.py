"""Averages over the ranks, of one process: when they are made, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora.distributed.averaging import GradientAveraging


@pytest.fixture
def replicas(tmp_path, monkeypatch):
    """Of three parameters, in a group of one process; the sizes of the buckets so far are in `made`."""
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    made: list[int] = []
    reduce = distributed.all_reduce
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: made.append(len(tensor)) or reduce(tensor))
    found = GradientAveraging([nn.Parameter(torch.ones(n)) for n in (2, 3, 4)])
    found.made = made
    yield found
    found.close()
    distributed.destroy_process_group()


def test_one_bucket_for_each_backward_and_what_has_no_gradient_keeps_none(replicas):
    first, second, third = replicas.parameters
    (2 * first).sum().backward()
    (first.sum() + 3 * second.sum()).backward()
    assert replicas.made == [12, 12]  # nine numbers, and whether each of the three has a gradient
    assert first.grad.tolist() == [3, 3] and second.grad.tolist() == [3, 3, 3] and third.grad is None


def test_a_backward_that_reaches_none_of_them(replicas):
    other = nn.Parameter(torch.ones(1))
    loss = other.sum()
    loss.register_hook(replicas.queue)
    loss.backward()
    assert replicas.made == [12] and all(parameter.grad is None for parameter in replicas.parameters)


def test_a_pause_averages_later(replicas):
    with replicas.pause():
        replicas.parameters[0].sum().backward()
    assert replicas.made == []
    replicas.parameters[0].sum().backward()
    assert replicas.made == [12] and replicas.parameters[0].grad.tolist() == [2, 2]


def test_after_a_backward_that_failed(replicas):
    def fail(gradient):
        raise RuntimeError("planned failure")

    loss = replicas.parameters[0].sum() * 1
    loss.register_hook(replicas.queue)
    loss.register_hook(fail)
    with pytest.raises(RuntimeError, match="planned"):
        loss.backward()
    replicas.parameters[1].sum().backward()
    assert replicas.made == [12]


def test_reentrant_checkpointing(replicas):
    x = torch.ones(2, requires_grad=True)
    y = checkpoint(lambda x: x * replicas.parameters[0], x, use_reentrant=True)
    (y.sum() + replicas.parameters[1].sum()).backward()
    assert replicas.made and replicas.parameters[0].grad.tolist() == [1, 1]


def test_nothing_is_left_on_the_parameters(replicas):
    replicas.close()
    replicas.parameters[0].sum().backward()
    assert replicas.made == []
