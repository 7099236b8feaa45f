"""After a merge nothing of LoRA is in the model: as a state dict, an exported program or an ONNX file."""

from __future__ import annotations

import pytest
import torch

from lightning_lora import LoRACallback
from tests.helpers.models import Lit, data, net, trainer

X = data(5).dataset.tensors[0][:4]


@pytest.fixture(scope="module")
def merged():
    module = Lit()
    trainer(LoRACallback(r=4)).fit(module, data())
    return module.eval()


def test_the_state_dict_loads_into_the_plain_model(merged):
    plain = net()
    plain.load_state_dict(merged.net.state_dict(), strict=True)
    assert torch.equal(plain(X), merged(X))
    assert not torch.equal(net()(X), merged(X))


def operations(program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_the_exported_program_is_the_plain_one(merged):
    program, plain = (torch.export.export(model.eval(), (X,)) for model in (merged.net, net()))
    assert operations(program) == operations(plain)
    assert set(program.state_dict) == set(plain.state_dict)
    torch.testing.assert_close(program.module()(X), merged(X))


@pytest.mark.slow
def test_the_onnx_file_is_the_plain_one(merged, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    graphs = []
    for name, model in (("merged", merged.net), ("plain", net())):
        torch.onnx.export(model.eval(), (X,), tmp_path / f"{name}.onnx", dynamo=True, verbose=False)
        graphs.append(onnx.load(tmp_path / f"{name}.onnx").graph)
    kinds = [[node.op_type for node in graph.node] for graph in graphs]
    names = [sorted(tensor.name for tensor in graph.initializer) for graph in graphs]
    assert kinds[0] == kinds[1] and names[0] == names[1]
    assert not any("lora" in name for name in names[0])


def test_the_merged_layer_costs_what_the_plain_layer_costs(merged):
    counted = []
    for model in (merged.net, net()):
        with torch.profiler.profile() as profile:
            model(X)
        counted.append(sorted((event.key, event.count) for event in profile.key_averages() if "aten" in event.key))
    assert counted[0] == counted[1]
