"""Where sums are computed: threads, a device that may fail, and memory that is used again."""

import threading
import time

import pytest
import torch

from lightning_lora.ops.workspace import Workspace

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_are_in_the_order_of_the_items(threads):
    assert Workspace().map(lambda item: item * item, range(50), CPU) == [item * item for item in range(50)]
    assert Workspace().map(lambda item: item, [], CPU) == []


def test_on_a_cpu_every_thread_of_torch_works(threads):
    together = threading.Barrier(threads, timeout=60)  # it breaks where fewer come
    workspace = Workspace()
    for _ in range(2):
        used = workspace.map(lambda _: (together.wait(), threading.get_ident())[1], range(threads), CPU)
        assert len(set(used)) == threads


def test_after_an_error_the_other_threads_take_no_more_items(threads):
    own, called = threading.get_ident(), []

    def function(item):
        called.append(item)
        if threading.get_ident() == own:
            raise ValueError("own")
        time.sleep(0.001)

    with pytest.raises(ValueError, match="own"):
        Workspace().map(function, range(1000), CPU)
    assert len(called) < 900


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_an_error_in_another_thread_is_raised(threads):
    own, together = threading.get_ident(), threading.Barrier(threads, timeout=60)

    def function(_):
        together.wait()
        if threading.get_ident() != own:
            raise ValueError("another")

    with pytest.raises(ValueError, match="another"):
        Workspace().map(function, range(threads), CPU)


def test_within_a_thread_torch_uses_no_others_and_everywhere_else_as_many_as_before(threads):
    workspace, seen = Workspace(), []
    within = workspace.map(lambda _: torch.get_num_threads(), range(4 * threads), CPU)
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert set(within) == {1}
    assert [torch.get_num_threads(), *seen] == [threads, threads]


def test_between_sums_in_the_workspace_torch_keeps_one_thread(threads):
    workspace = Workspace()
    for _ in range(2):
        with workspace:
            workspace.map(lambda item: item, range(4), CPU)
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == threads


def test_an_interrupt_on_entry_leaves_torch_its_threads(threads, monkeypatch):
    workspace, plain = Workspace(), torch.set_num_threads

    def interrupted(count):
        plain(count)
        monkeypatch.setattr(torch, "set_num_threads", plain)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "set_num_threads", interrupted)
    with pytest.raises(KeyboardInterrupt), workspace:
        pass
    assert torch.get_num_threads() == threads
    with workspace, workspace:
        pass
    assert torch.get_num_threads() == threads


def test_elsewhere_than_on_a_cpu_nothing_is_called_in_a_thread(threads):
    own = threading.get_ident()
    assert set(Workspace().map(lambda _: threading.get_ident(), range(5), torch.device("meta"))) == {own}


def test_no_memory_is_used_by_two_at_a_time(threads):
    together, workspace = threading.Barrier(threads, timeout=60), Workspace()

    def address(_):
        together.wait()
        return workspace.memory("a", torch.empty(3), torch.float64).data_ptr()

    assert len(set(workspace.map(address, range(threads), CPU))) == threads


@pytest.mark.parametrize("inference", [False, True])
def test_gradients_are_not_recorded_and_inference_mode_is_that_of_the_caller(threads, inference):
    with torch.inference_mode(inference):
        modes = Workspace().map(lambda _: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()), range(6), CPU)
    assert set(modes) == {(False, inference)}


def test_an_error_is_raised_and_the_threads_work_again(threads):
    workspace = Workspace()
    with pytest.raises(ZeroDivisionError):
        workspace.map(lambda item: 1 // item, range(8), CPU)
    assert workspace.map(lambda item: item, range(8), CPU) == list(range(8))


def test_memory_of_a_name_is_used_again():
    workspace = Workspace()
    large = workspace.memory("a", torch.empty(3, 4), torch.float64)
    assert (large.shape, large.dtype, large.is_contiguous()) == ((3, 4), torch.float64, True)
    for shape, dtype in [((2, 2), torch.float32), ((5,), torch.int16), ((3, 4), torch.float64)]:
        again = workspace.memory("a", torch.empty(shape), dtype)
        assert (again.shape, again.dtype, again.data_ptr()) == (shape, dtype, large.data_ptr())
    assert workspace.memory("b", torch.empty(3, 4), torch.float64).data_ptr() != large.data_ptr()
    larger = workspace.memory("a", torch.empty(30, 4), torch.float64)
    small = workspace.memory("a", torch.empty(3, 4), torch.float64)
    assert small.data_ptr() == larger.data_ptr() != large.data_ptr()


def test_only_a_cast_copies():
    tensor, workspace = torch.arange(6.0).view(2, 3), Workspace()
    assert workspace.cast("a", tensor, torch.float32) is tensor
    assert workspace.cast("a", tensor, torch.float64).tolist() == tensor.tolist()


def fail(workspace):
    if workspace.device is not None:
        raise torch.OutOfMemoryError
    return "on the device of the tensors"


def test_what_a_device_without_fp64_holds_is_computed_on_the_cpu(monkeypatch):
    monkeypatch.setattr("lightning_lora.ops.workspace.WITHOUT_FP64", ("meta",))
    assert Workspace(torch.device("meta")).bring(torch.ones(2)).device == CPU
    tensor = torch.ones(2)
    assert Workspace().bring(tensor) is tensor


def test_a_device_that_fails_is_given_up():
    workspace = Workspace(torch.device("meta"))
    assert workspace.bring(torch.ones(2)).is_meta
    assert workspace.compute(lambda own: own.device) == torch.device("meta")
    assert workspace.compute(fail) == "on the device of the tensors"
    assert not workspace.bring(torch.ones(2)).is_meta
    assert workspace.compute(lambda own: own.device) is None


def test_an_error_without_a_device_is_raised():
    calls = []

    def wrong(workspace):
        calls.append(workspace.device)
        raise RuntimeError("shapes")

    for device in (None, torch.device("meta")):
        with pytest.raises(RuntimeError, match="shapes"):
            Workspace(device).compute(wrong)
    assert calls == [None, torch.device("meta"), None]
