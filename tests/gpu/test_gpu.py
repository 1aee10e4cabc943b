"""What only a device can show: spikes as on the CPU, training in bfloat16, one compiled graph, energy, integers."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import spikeformers as sf
from spikeformers import energy
from spikeformers.backbones.meta_spikeformer import ANN_TWIN
from spikeformers.deploy import integer
from spikeformers.deploy.counts import IntegerConv
from spikeformers.distill import FineGrainedDistillation
from spikeformers.layers import fuse_norms
from spikeformers.neurons import IELIF, ILIF, LIF, NILIF, ATan, Rectangle, build_neuron
from spikeformers.pretrain import MAE
from spikeformers.quantize import convert, fake_quantize, prepare
from spikeformers.train.tasks import Classification

pytestmark = pytest.mark.gpu

KERNEL_NEURONS = {
    "lif": LIF,
    "lif_soft": partial(LIF, v_reset=None, detach_reset=False, surrogate=ATan()),
    "lif_rest": partial(LIF, v_reset=0.25, tau=3.0, threshold=0.7, decay_input=False, surrogate=Rectangle()),
    "i_lif": ILIF,
    "ni_lif_decay": partial(NILIF, decay=0.5),
    "ie_lif_decay": partial(IELIF, decay=0.9),
}


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture(params=["cuda", "mps"])
def device(request) -> str:
    """Each kind of device in turn; Apple's has no float64."""
    if not {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}[request.param]():
        pytest.skip(f"no {request.param} device")
    return request.param


def tiny(**overrides) -> nn.Module:
    sizes = {"dims": (8, 16, 24, 32), "blocks": (1, 1, 1, 1, 1), "num_classes": 5, "neuron": "i_lif"}
    return sf.create_model("meta_spikeformer_15m", **(sizes | overrides))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["lif", "i_lif", "ie_lif", "ni_lif"])
def test_neurons_and_their_gradients_equal_those_of_the_cpu(cuda, name, steps):
    neuron = build_neuron(name, steps=steps)
    here = (3 * torch.randn(8, 3, 5, dtype=torch.float64)).requires_grad_()
    there = here.detach().to(cuda).requires_grad_()
    weights = torch.randn(8, 3, 5, dtype=torch.float64)
    spikes, found = neuron(here), neuron(there)
    (spikes * weights).sum().backward()
    (found * weights.to(cuda)).sum().backward()
    assert torch.equal(found.cpu(), spikes)
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-12, atol=1e-12)  # the two exp() round differently


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("neuron", "steps"), [("i_lif", 1), ("lif", 2)])
def test_a_training_step_is_finite_and_changes_every_layer(cuda, neuron, steps, autocast):
    model = tiny(neuron=neuron, steps=steps).to(cuda, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    images = torch.randn(8, 3, 32, 32).to(cuda, memory_format=torch.channels_last)
    labels = torch.randint(5, (8,)).to(cuda)
    before = copy.deepcopy(model.state_dict())
    with torch.autocast(cuda, torch.bfloat16, enabled=autocast):
        loss = Classification(smoothing=0.1).loss(model, images, labels, epoch=0)
    loss.backward()
    optimizer.step()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert not torch.equal(parameter, before[name]), name


def test_lif_over_four_steps_compiles_to_one_graph(cuda, unchecked):
    neuron = LIF(steps=4)
    # float64: a compiler may contract a multiplication and an addition, which in float32 could tip a spike
    eager = (3 * torch.randn(8, 16, 7, dtype=torch.float64)).to(cuda).requires_grad_()
    fused = eager.detach().clone().requires_grad_()
    spikes, found = neuron(eager), torch.compile(neuron, fullgraph=True)(fused)
    spikes.sum().backward()
    found.sum().backward()
    assert torch.equal(found, spikes)
    torch.testing.assert_close(fused.grad, eager.grad, rtol=1e-9, atol=1e-12)


def test_energy_is_that_of_the_cpu(device):
    dtype, tolerance = (torch.float64, 1e-9) if device == "cuda" else (torch.float32, 0.05)  # float32 tips spikes
    model, images = tiny().to(dtype), torch.randn(5, 3, 32, 32, dtype=dtype)
    model.train()(images)
    wanted = energy.measure(model, images)
    found = energy.measure(model.to(device), images)
    assert found.image_mj == pytest.approx(wanted.image_mj, rel=tolerance)
    assert found.ann_mj == pytest.approx(wanted.ann_mj)
    assert found.firing_rate == pytest.approx(wanted.firing_rate, rel=tolerance)


def test_the_engine_of_a_model_on_a_device_is_that_of_the_model_on_the_cpu(device):
    model, images = tiny().eval(), torch.randn(5, 3, 32, 32)
    wanted = integer(model, images)(images)
    model.to(device)
    engine = integer(model, images.to(device))
    assert next(model.parameters()).device.type == device
    assert engine.device.type == "cpu"
    assert torch.equal(engine(images.to(device)), wanted)
    assert engine.compare(model, images).total == 5


def test_integer_layers_give_the_same_numbers_on_a_device(cuda):
    layer = IntegerConv.of(nn.Conv2d(16, 32, 3, padding=1), unit=1.0, max_count=4, neuron=ILIF(levels=4))
    counts = torch.randint(0, 5, (3, 16, 9, 9), dtype=torch.uint8)
    assert torch.equal(copy.deepcopy(layer).to(cuda)(counts.to(cuda)).cpu(), layer(counts))


def test_an_engine_runs_on_a_device_by_its_readable_path(cuda):
    images = torch.randn(5, 3, 32, 32)
    engine = integer(tiny(), images).to(cuda)
    logits = engine(images)
    assert logits.device.type == "cuda"
    assert logits.shape == (5, 5)
    assert torch.isfinite(logits).all()
    assert not any(layer.primitive for layer in engine.report().layers)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stem", ["sps", "scs"])
def test_masked_pre_training_takes_a_finite_step(device, stem, autocast):
    encoder = sf.create_model("spikformer_v2_8_384", dim=32, depth=2, heads=4, patch_size=4, num_classes=5, stem=stem)
    mae = MAE(encoder, image_size=32, decoder_dim=32, decoder_depth=1).to(device)
    images = torch.randn(8, 3, 32, 32).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = mae.loss(images, mae(images))
    loss.backward()
    assert loss.dtype == torch.float32
    grads = {name: each.grad for name, each in mae.named_parameters() if not name.startswith("encoder.head")}
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads.values())


def test_a_masked_encoder_gives_the_tokens_of_the_cpu(cuda):
    encoder = sf.create_model("spikformer_v2_8_384", dim=32, depth=2, heads=4, patch_size=4, num_classes=5)
    mae, images = MAE(encoder, image_size=32).double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    visible = mae.draw_mask(images)
    wanted, places = copy.deepcopy(mae).encode(images, visible)
    found, there = mae.to(cuda).encode(images.to(cuda), visible.to(cuda))
    assert torch.equal(there.cpu(), places)
    assert torch.equal(found.cpu(), wanted)  # counts: float64 rounds no spike away


@pytest.mark.parametrize("offset", [False, True])
def test_low_bit_weights_and_their_gradients_equal_those_of_the_cpu(cuda, offset):
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    steps = [torch.rand(6, dtype=torch.float64) + 0.1, *([torch.rand(6, dtype=torch.float64)] if offset else [])]
    upstream = torch.randn_like(weight)
    results = []
    for place in ("cpu", cuda):
        leaves = [each.detach().to(place).requires_grad_() for each in (weight, *steps)]
        quantized = fake_quantize(leaves[0], leaves[1], leaves[2] if offset else None, bits=4)
        quantized.backward(upstream.to(place))
        results.append([quantized.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-12, atol=1e-12)  # sums over a channel in another order


def test_a_packed_network_equals_the_prepared_one(cuda):
    model = tiny(neuron="ie_lif").to(cuda)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, device=cuda)
    model.double().train()(images)
    prepare(model.eval(), bits=4)
    with sf.record(model) as before:
        logits = model(images)
    convert(model)
    with sf.record(model) as after:
        packed = model(images)
    assert all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(packed, logits, rtol=1e-12, atol=1e-12)  # CUDA's batch norm rounds its parts otherwise


def test_a_student_learns_from_its_twin(cuda):
    student, twin = tiny(neuron="ie_lif").to(cuda), tiny(**ANN_TWIN).to(cuda)
    prepare(student, bits=4)
    distillation = FineGrainedDistillation(student, twin)
    images = torch.randn(4, 3, 64, 64, device=cuda)
    with torch.autocast("cuda", torch.bfloat16), distillation.watch():
        student(images)
    loss = distillation.loss(images)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(each.grad).all() for each in student.parameters() if each.grad is not None)
    assert any(each.grad.any() for name, each in student.named_parameters() if name.endswith("q_conv.pw1.weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("build", KERNEL_NEURONS.values(), ids=KERNEL_NEURONS)
def test_a_triton_kernel_gives_the_spikes_and_gradients_of_the_loop(cuda, build, steps, dtype):
    neuron = build(steps=steps)
    x = (torch.randn(steps * 3, 5, 7, 9, device=cuda) * 3).to(dtype).to(memory_format=torch.channels_last)
    upstream = torch.randn(x.shape, device=cuda).to(dtype)
    results = []
    for run in (neuron, neuron.loop):
        leaf = x.clone().requires_grad_()
        spikes = run(leaf)
        spikes.backward(upstream)
        results.append((spikes.detach(), leaf.grad))
    (spikes, grad), (wanted, wanted_grad) = results
    assert torch.equal(spikes, wanted)
    assert spikes.any()
    tolerance = 1e-12 if dtype == torch.float64 else max(1e-5, torch.finfo(dtype).eps)  # one rounding apart
    torch.testing.assert_close(grad, wanted_grad, rtol=tolerance, atol=tolerance)


def test_norm_and_residual_inside_a_kernel_equal_those_in_front(cuda):
    lif, neuron = pytest.importorskip("spikeformers.kernels.lif"), LIF(steps=2)
    leaves = [torch.randn(6, 5, 4, 3), torch.rand(5) + 0.5, torch.randn(5), torch.randn(6, 5, 4, 3)]
    leaves = [leaf.to(cuda).requires_grad_() for leaf in leaves]
    current, scale, shift, residual = leaves
    upstream = torch.randn_like(current)
    wanted = neuron.loop(current * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) + residual)
    found = lif.lif(current, form=neuron.form(), steps=2, scale=scale, shift=shift, residual=residual)
    assert torch.equal(found, wanted)
    for one, other in zip(*(torch.autograd.grad(each, leaves, upstream) for each in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # sums over a channel in another order


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("neuron", "steps"), [("lif", 4), ("i_lif", 1), ("ie_lif_leaky", 2)])
def test_a_network_whose_neurons_take_the_norms_trains_to_the_same_numbers(cuda, neuron, steps, layout):
    pytest.importorskip("triton")
    plain = tiny(neuron=neuron, steps=steps).to(cuda, torch.float64, memory_format=layout)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, device=cuda).to(memory_format=layout)
    twin, results = copy.deepcopy(plain), []
    assert len(fuse_norms(twin, images)) == 3 * 2 + 2 * 4  # in each conv block two; in the others q, k, v and the MLP
    for model in (twin, plain):
        for _ in range(2):
            logits = model(images)
            logits.square().sum().backward()
        results.append([logits.detach(), *(each.grad for each in model.parameters()), *model.buffers()])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)  # y differs in its last bit


@pytest.mark.parametrize("neuron", ["lif", "i_lif"])
def test_a_norm_taken_by_a_neuron_leaves_less_memory_for_backward_also_in_bfloat16(cuda, neuron):
    pytest.importorskip("triton")
    plain = tiny(dims=(32, 64, 96, 128), neuron=neuron, steps=2).to(cuda, memory_format=torch.channels_last)
    images = torch.randn(8, 3, 128, 128, device=cuda).to(memory_format=torch.channels_last)
    twin, kept = copy.deepcopy(plain), []
    fuse_norms(twin, images)
    for model in (plain, twin):
        with torch.autocast(cuda, torch.bfloat16):
            model(images)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            logits = model(images)
        kept.append(torch.cuda.memory_allocated() - before)
        logits.square().sum().backward()
        assert all(torch.isfinite(each.grad).all() for each in model.parameters())
        del logits
    assert kept[1] < (0.9 if neuron == "lif" else 1.01) * kept[0]


def milliseconds(run) -> float:
    """Median of twenty runs by the device's own clock."""
    times = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[5:])[10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_reach_four_fifths_of_the_bandwidth_of_a_copy(cuda, dtype):
    lif, integer = (pytest.importorskip(f"spikeformers.kernels.{name}") for name in ("lif", "integer"))
    x, upstream = (torch.randn(4 * 32, 256, 64, 64, device=cuda).to(dtype) for _ in range(2))
    one = x.numel() * x.element_size()
    copied = 2 * one / milliseconds(lambda: torch.empty_like(x).copy_(x))
    none, fired, staircase = (None, None, None), LIF(steps=4).form(), ILIF(levels=4).form()
    windows = integer.launch_forward(x, *none, form=staircase, steps=1)[1]
    runs = {
        "lif": (2 * one, lambda: lif.launch_forward(x, *none, form=fired, steps=4)),
        "lif backward": (3 * one, lambda: lif.launch_backward(upstream, x, *none, form=fired, steps=4)),
        "integer": (2 * one + x.numel(), lambda: integer.launch_forward(x, *none, form=staircase, steps=1)),
        "integer backward": (
            2 * one + x.numel(),
            lambda: integer.launch_backward(upstream, windows, form=staircase, steps=1, dtype=dtype),
        ),
    }
    shares = {name: moved / milliseconds(run) / copied for name, (moved, run) in runs.items()}
    assert min(shares.values()) >= 0.8, shares


@pytest.mark.parametrize("name", ["lif", "i_lif"])
def test_a_compiled_neuron_is_one_graph_with_the_kernel_in_it(cuda, name, unchecked):
    pytest.importorskip("triton")
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    neuron, x = build_neuron(name, steps=2), torch.randn(4, 16, device=cuda) * 3
    assert torch.equal(torch.compile(neuron, fullgraph=True, backend=backend)(x), neuron.loop(x))
    assert any("spikeformers" in target for target in seen), seen
