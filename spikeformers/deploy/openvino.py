"""OpenVINO as the second backend of the integer engine: the same graph, from its ONNX form "qdq", compiled for the CPU.

OpenVINO turns QuantizeLinear and DequantizeLinear around a convolution into one of uint8 counts and int8 weights, with
scale, bias, clip and rounding behind it. Un-spiked layers, membranes and attention stay float32. Layers that read
spikes give the engine's numbers bit by bit; float layers sum in another order, so that a count whose current lies
within rounding of a threshold may flip, unless the network was prepared with exact=True.
"""

import copy
import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_structure, tree_unflatten

from spikeformers.deploy.agreement import Agreement, IntegerReport, compare
from spikeformers.deploy.counts import CountNeuron
from spikeformers.deploy.onnx import onnx_graph
from spikeformers.deploy.outputs import named_outputs
from spikeformers.deploy.runtime import IntegerModel

EIGHT_BITS = ("u8", "i8")


class OpenVINOModel(nn.Module):
    """`engine` in OpenVINO: images [B, C, H, W] or clips [T, B, C, H, W] -> what the engine gives, float32, CPU.

    B is free, other sizes are those of `images`. It takes as many threads as torch has when it is called. deepcopy and
    pickle work; weights and T lie in the graph, so there is no state_dict, and `set_steps` finds nothing to set.
    Raises ImportError without the extra "openvino".
    """

    def __init__(self, engine: IntegerModel, images: Tensor) -> None:
        super().__init__()
        _core()
        self.axis = images.ndim - 4  # of the batch
        self.sizes = [size for axis, size in enumerate(images.shape) if axis != self.axis]
        self.graph = onnx_graph(engine, images, form="qdq", listen=True).SerializeToString()
        given = engine(images.narrow(self.axis, 0, 1))
        self.outputs, self.form = list(named_outputs(given)), tree_structure(given)
        self.layers = engine.report().layers
        self.net = _echoes(engine)
        self.compiled: dict[tuple[bool, bool, int], Any] = {}
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        sizes = [size for axis, size in enumerate(images.shape) if axis != self.axis]
        if sizes != self.sizes:
            wanted = [*self.sizes[: self.axis], "B", *self.sizes[self.axis :]]
            raise ValueError(
                f"this graph takes {wanted} (B any number), got {list(images.shape)}: build one for this size with "
                'sf.deploy.integer(model, images, backend="openvino")'
            )
        echoes = {name: echo for name, echo in self.net.named_modules() if isinstance(echo, Echo)}
        listen = any(echo._forward_hooks for echo in echoes.values())
        run = self._compiled(listen=listen, alone=images.shape[self.axis] == 1)
        given = run([images.detach().to("cpu", torch.float32).contiguous().numpy()], share_inputs=True)
        if listen:
            for name, echo in echoes.items():
                echo(torch.from_numpy(given[name]))
        return tree_unflatten([torch.from_numpy(given[name]) for name in self.outputs], self.form)

    @property
    def device(self) -> torch.device:
        """Where logits come from."""
        return torch.device("cpu")

    def report(self) -> IntegerReport:
        """Path, bits and bytes of every convolution and linear layer.

        `primitive`: of layers that read spikes, whether OpenVINO runs them, all of them, in 8 bits.
        """
        fed = sum(layer.spike_fed for layer in self.layers)
        all_eight = self.eight_bit_convolutions() >= fed
        return IntegerReport(tuple(replace(layer, primitive=layer.spike_fed and all_eight) for layer in self.layers))

    def compare(self, model: nn.Module, images: Tensor | Iterable) -> Agreement:
        """As `IntegerModel.compare`. It runs the same layers in a graph that gives all counts as well."""
        return compare(self, model, images)

    def eight_bit_convolutions(self) -> int:
        """How many convolutions OpenVINO runs on uint8 or int8; linear layers on spikes are such too."""
        nodes = self._compiled(listen=False, alone=True).get_runtime_model().get_ops()
        told = [{key: value.astype(str) for key, value in node.get_rt_info().items()} for node in nodes]
        kinds = ("Convolution", "GroupConvolution")
        return sum(each.get("layerType") in kinds and each["runtimePrecision"] in EIGHT_BITS for each in told)

    def _compiled(self, *, listen: bool, alone: bool) -> Any:
        """The graph for the threads that torch has now, with the counts of its neurons or without them.

        `alone`: for a single image, which spares a graph of fixed sizes some bookkeeping, 3 % of a small network.
        """
        key = (listen, alone, torch.get_num_threads())
        if key not in self.compiled:
            core = _core()
            import openvino

            graph = core.read_model(self.graph)
            if not listen:
                graph = openvino.Model(graph.get_results()[: len(self.outputs)], graph.get_parameters())
            if alone:
                graph.reshape([*self.sizes[: self.axis], 1, *self.sizes[self.axis :]])
            settings = {
                "INFERENCE_NUM_THREADS": key[-1],
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",  # else un-spiked layers may run in bfloat16
            }
            self.compiled[key] = core.compile_model(graph, "CPU", settings)
        return self.compiled[key]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"compiled": {}}  # a compiled graph belongs to this process and cannot be copied


class Echo(CountNeuron):
    """A neuron that repeats the counts that OpenVINO computed, for hooks to hear."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _echoes(engine: IntegerModel) -> nn.Module:
    """A tree of modules in which every neuron of `engine` stands in its place and nothing else does anything."""
    tree = nn.Module()
    for name, neuron in engine.net.named_modules():
        if isinstance(neuron, CountNeuron):
            echo = copy.copy(neuron)
            echo.__class__, echo._modules = Echo, {}
            parent = tree
            for part in name.split(".")[:-1]:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            parent.add_module(name.rpartition(".")[2], echo)
    return tree


@functools.cache
def _core() -> Any:
    """OpenVINO's runtime, one for the process and for good. Raises ImportError without the extra.

    Each has a signal stack that it gives the thread. Of two that go in the order they came, the second gives back the
    one of the first, which is gone: the next signal, Ctrl-C say, then ends the process (OpenVINO 2026.4).
    """
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            'backend="openvino" needs the extra "openvino": pip install "spikeformers[openvino]"'
        ) from error
    return openvino.Core()
