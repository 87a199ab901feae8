import copy
import logging
import shutil
from functools import partial

import pytest
import torch
from torch import nn

from nst_det.engine import compilation
from nst_det.engine.compilation import compiled
from nst_det.engine.keys import COMPILE_MODES
from nst_det.errors import UserError
from nst_det.models import create_model, feature_levels, forward_outputs

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def with_backend(monkeypatch, backend):
    """Compile by another backend than inductor, which takes no mode."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode, dynamic: compile_(function, backend=backend))


def test_off_is_the_function_itself():
    assert compiled(forward_outputs, "off", CPU, "a network") is forward_outputs


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_layer_equals_the_layer():
    """By the real compiler, which takes seconds."""
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    other, images = copy.deepcopy(layer), torch.randn(2, 3, 8, 8)
    function, found = compiled(layer.forward, "default", CPU, "a layer"), []
    for call, module in ((other, other), (function, layer)):
        call(images).square().sum().backward()
        found.append([call(images), *(p.grad for p in module.parameters()), *module.buffers()])
    assert function._compiled is not None
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_two_graphs_whatever_its_weights(captured_graphs, training):
    """The second is its head, since the embedding is read by a hook; outputs, gradients and statistics are equal."""
    function = compiled(forward_outputs, "default", CPU, "a network")
    for _ in range(2):
        network = create_model("nst_resnet10_w32", 3, False).train(training)
        levels = {name: info for name, info in feature_levels(network).items() if name in ("res3", "res4")}
        other, found = copy.deepcopy(network), []
        for images in torch.randn(2, 2, 3, 32, 32):
            for call, model in ((forward_outputs, other), (function, network)):
                outputs = call(model, images, levels)
                (outputs.logits.square().sum() + outputs.maps["res3"].square().mean()).backward()
                found.append([*outputs.tensors(), *(p.grad for p in model.parameters()), *model.buffers()])
        for ours, wanted in zip(found[1::2], found[::2]):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=0)
        assert network.state_dict().keys() == other.state_dict().keys()
    assert len(captured_graphs) == 2
    assert function._compiled is not None


def test_what_cannot_be_compiled_runs_as_it_is_after_one_line(monkeypatch, caplog):
    def backend(graph, inputs):
        raise FileNotFoundError("no compiler here")

    with_backend(monkeypatch, backend)
    layer = nn.Linear(2, 2)
    function = compiled(layer.forward, "default", CPU, "the student's network")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(function(torch.ones(1, 2)), layer(torch.ones(1, 2)))
    (line,) = (record.getMessage() for record in caplog.records if record.name == compilation.__name__)
    assert "the student's network" in line
    assert "no compiler here" in line


def test_statistics_move_once_where_the_second_graph_cannot_be_compiled(monkeypatch):
    compiled_graphs = []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        if len(compiled_graphs) == 2:
            raise FileNotFoundError("no compiler here")
        return graph.forward

    with_backend(monkeypatch, backend)
    network = create_model("nst_resnet10_w32", 3, False).train()
    other, images = copy.deepcopy(network), torch.randn(2, 3, 32, 32)
    function = compiled(forward_outputs, "default", CPU, "a network")
    for _ in range(2):
        outputs, wanted = function(network, images, {}), forward_outputs(other, images, {})
        assert torch.equal(outputs.logits, wanted.logits)
        assert all(map(torch.equal, network.buffers(), other.buffers()))
    assert len(compiled_graphs) == 2


def test_a_fault_of_the_network_itself_is_raised(monkeypatch):
    with_backend(monkeypatch, "eager")
    with pytest.raises(RuntimeError, match="shape"):
        compiled(nn.Linear(2, 2).forward, "default", CPU, "a network")(torch.ones(1, 3))


def test_a_fault_of_the_gpu_is_not_taken_for_one_of_the_compiler(monkeypatch, caplog):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, mode, dynamic: full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        compiled(nn.Linear(2, 2).forward, "default", CPU, "a network")(torch.ones(1, 2))
    assert not caplog.records


def test_it_runs_compiled_only_when_it_may(monkeypatch):
    with_backend(monkeypatch, "eager")
    layer, called = nn.Linear(2, 2), []
    function = compiled(layer.forward, "default", CPU, "a network", lambda: layer.training)
    monkeypatch.setattr(function, "function", partial(called.append))
    for training in (True, False):
        layer.train(training)
        function(torch.ones(1, 2))
        assert len(called) == (not training)


def test_a_copy_of_what_is_compiled_is_refused(monkeypatch):
    with_backend(monkeypatch, "eager")
    layer = nn.Linear(2, 2)
    layer.forward = compiled(layer.forward, "default", CPU, "a network")
    assert set(layer.state_dict()) == {"weight", "bias"}
    with pytest.raises(TypeError, match="before it is compiled"):
        copy.deepcopy(layer)


@pytest.mark.parametrize("mode", COMPILE_MODES)
def test_cuda_graphs_are_refused_on_a_cpu(mode):
    compilation.check_compile(mode, GPU)
    if mode in ("off", "default"):
        compilation.check_compile(mode, CPU)
    else:
        with pytest.raises(UserError, match=f"SOLVER.COMPILE {mode}"):
            compilation.check_compile(mode, CPU)
