"""The unrolled network is the integer one, spike by spike; and what would not be."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import spikeformers as sf
from spikeformers.deploy.fuse import fuse
from spikeformers.deploy.unroll import RULES, UNROLLED, BinarySpikes, HalfEvenIF, HalfUpIF, IFNeuron, summed, unroll
from spikeformers.neurons import IELIF, ILIF, LIF, NILIF, Neuron, set_steps, streaming

LEVELS = (1, 2, 4, 8)
INTEGER = ("i_lif", "ni_lif", "ie_lif")
PYRAMID = {"dims": (8, 8, 8, 16), "blocks": (1, 0, 0, 1, 0), "strides": (2, 2, 1, 1, 1), "heads": 4}
NAMES = {
    "meta": ("meta_spikeformer_15m", PYRAMID),
    "qsd": ("qsd_transformer_t", PYRAMID | {"layer_scale": 1.0}),
    "spikformer": ("spikformer_cifar_4_256", {"dim": 16, "depth": 1, "heads": 2, "steps": 1}),
}
FLOAT64 = 1e-12  # sums in another order, of numbers around 1, a few layers deep


def build(kind: str, **overrides) -> nn.Module:
    """A small network in float64 whose batch norms look trained and whose weights fill all 53 bits."""
    name, sizes = NAMES[kind]
    model = sf.create_model(name, num_classes=5, **(sizes | overrides)).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 1.5)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, 0.3, 0.5)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data *= 1 + 1e-3 * torch.rand_like(module.weight)
    return model.eval()


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, dtype=torch.float64)


@torch.no_grad()
def assert_the_same(model: nn.Module, unrolled: nn.Module, images: torch.Tensor, *, tolerance: float = FLOAT64) -> None:
    """Every neuron's spikes are zeros and ones that add up to the integer model's counts; logits are equal."""
    with sf.record(model) as wanted:
        logits = model(images)
    with sf.record(unrolled) as got:
        assert (unrolled(images) - logits).abs().max() <= tolerance
    assert wanted.keys() == got.keys()
    fired = 0
    for name, spikes in got.items():
        neuron = unrolled.get_submodule(name)
        assert spikes.max() <= 1
        assert torch.equal(summed(spikes, levels=neuron.levels, steps=neuron.steps), wanted[name]), name
        fired += int(spikes.sum())
    assert fired > 0


# One neuron.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", [ILIF, NILIF, IELIF])
def test_virtual_spikes_add_up_to_the_counts_for_every_current_and_come_first(kind, levels, dtype):
    ties = torch.arange(-2, levels + 3, dtype=dtype) - 0.5
    lower, upper = torch.nextafter(ties, ties - 1), torch.nextafter(ties, ties + 1)
    h = torch.cat([ties, lower, upper, ties + 0.5, torch.randn(500, dtype=dtype) * levels])
    neuron = kind(levels=levels)
    current = h / getattr(neuron, "gain", 1.0)  # exact: the gain is a power of two
    spikes = unroll(neuron)(current)
    assert spikes.planes.unique().tolist() == [0, 1]
    assert torch.equal(spikes.numbers(), neuron(current))
    assert torch.equal(spikes.counts(), neuron.counts(neuron(current)).to(dtype))
    assert torch.equal(spikes.planes.sort(0, descending=True).values, spikes.planes)


def test_halves_go_up_in_ie_lif_and_to_even_in_the_others():
    h = torch.tensor([0.5, 1.5, 2.5, 3.5])
    up, even = unroll(IELIF(levels=4, gain=1.0))(h), unroll(ILIF(levels=4))(h)
    assert up.counts().tolist() == [1, 2, 3, 4]
    assert even.counts().tolist() == [0, 2, 2, 4]
    # By hand for 1.5: it fires at 1.5, is left with 0.5 and one spike, and a second one makes the count even.
    assert even.planes[:, 1].tolist() == [1, 1, 0, 0]


def test_recorded_spikes_stand_in_the_order_of_time():
    neuron = unroll(ILIF(levels=2, steps=2))
    current = torch.tensor([[0.0], [1.0], [2.0], [1.0]])  # T=2 steps of B=2
    with sf.record(neuron) as spikes:
        neuron(current)
    recorded = spikes[""]
    assert recorded.dtype == torch.uint8
    assert recorded.flatten().tolist() == [0, 1, 0, 0, 1, 1, 1, 0]  # t=0: d=0, d=1; t=1: d=0, d=1
    assert summed(recorded, levels=2, steps=2).flatten().tolist() == [0, 1, 2, 1]
    with pytest.raises(ValueError, match="not a multiple of steps=3 x levels=2"):
        summed(recorded, levels=2, steps=3)


@pytest.mark.parametrize("kind", [ILIF, IELIF])
def test_a_membrane_is_carried_between_real_steps_as_before(kind):
    neuron = kind(levels=4, steps=3, decay=0.5)
    current = torch.randn(6, 50)
    spikes = unroll(neuron)(current)
    assert torch.equal(spikes.numbers(), neuron(current))
    assert not torch.equal(spikes.numbers(), kind(levels=4, steps=3)(current))


# One product.


def thermometer(counts: torch.Tensor, levels: int, unit: float = 1.0) -> BinarySpikes:
    planes = torch.stack([(counts > step).to(torch.float64) for step in range(levels)])
    return BinarySpikes(planes, unit)


@pytest.fixture
def counts() -> torch.Tensor:
    return torch.randint(0, 5, (3, 4, 6, 6)).double()


def test_a_layer_adds_its_bias_once_and_only_ever_sees_zeros_and_ones(counts):
    seen = []

    def conv2d(x, *rest):
        seen.append(x.unique().tolist())
        return F.conv2d(x, *rest)

    conv, spikes = nn.Conv2d(4, 8, 3, padding=1, stride=2).double(), thermometer(counts, 4, 0.25)
    wanted = conv(counts / 4)
    y = RULES["conv2d"](conv2d, (spikes, conv.weight, conv.bias, 2, 1), {})
    torch.testing.assert_close(y, wanted, rtol=0, atol=FLOAT64)
    assert seen == [[0, 1]] * 4
    torch.testing.assert_close(conv(spikes), wanted, rtol=0, atol=FLOAT64)
    named = {"weight": conv.weight, "bias": conv.bias, "stride": 2, "padding": 1}
    torch.testing.assert_close(F.conv2d(spikes, **named), wanted, rtol=0, atol=FLOAT64)
    linear, up = nn.Linear(6, 2).double(), nn.ConvTranspose2d(4, 2, 2, 2).double()
    for layer in (linear, up):
        torch.testing.assert_close(layer(spikes), layer(counts / 4), rtol=0, atol=FLOAT64)


def test_products_of_spikes_keep_every_cross_term_and_equal_steps_alone_do_not():
    q, k = torch.tensor([[2.0]]), torch.tensor([[3.0]])
    left, right = thermometer(q, 4), thermometer(k, 4)
    assert (left @ right).item() == 6
    assert sum((one @ other).item() for one, other in zip(left.planes, right.planes, strict=True)) == 2
    assert (left @ left).item() == 4  # one object on both sides
    assert torch.einsum("ij,jk->ik", left, right).item() == 6
    assert torch.bmm(left[None], k[None].double()).item() == 6


def test_softmax_attention_adds_up_spiking_values(counts):
    q, k = torch.randn(2, 3, 4, 6, 6, dtype=torch.float64)
    wanted = F.scaled_dot_product_attention(q, k, counts / 4)
    got = F.scaled_dot_product_attention(q, k, thermometer(counts, 4, 0.25))
    torch.testing.assert_close(got, wanted, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("heads", [1, 4])  # width 16 against 9 tokens, and 4: both orders of Q K^T V
def test_attention_needs_the_counts_of_all_steps_before_it_multiplies(heads):
    attention = sf.create_model("qsd_transformer_t", dims=(8, 8, 8, 16), blocks=(0, 0, 0, 1, 0), heads=heads, bits=0)
    attention = attention.stage3.block0.attn.double().eval()
    q, k, v = (torch.randint(0, 5, (2, heads, 16 // heads, 9)).double() for _ in range(3))
    spikes = [thermometer(operand, 4, 0.25) for operand in (q, k, v)]
    wanted = attention.attn(attention.mix(q / 4, k / 4, v / 4))
    unrolled = unroll(attention)
    assert torch.equal(unrolled.attn(unrolled.mix(*spikes)).numbers(), wanted)
    steps = zip(*(each.planes for each in spikes), strict=True)
    step_by_step = sum(attention.mix(*planes) for planes in steps) / 4**3
    assert not torch.equal(attention.attn(step_by_step), wanted)


def test_without_the_barrier_a_neuron_fires_otherwise():
    first, second = torch.tensor([1.0]), torch.tensor([3.0])
    current = 3 * first - second  # weights 3 and -1: nothing is left to fire
    neuron = unroll(ILIF(levels=4))
    assert neuron(current).counts().item() == 0
    membrane, fired = torch.zeros(1), 0
    for one, other in zip(thermometer(first, 4).planes, thermometer(second, 4).planes, strict=True):
        membrane = membrane + 3 * one - other
        fired += (spike := (membrane > 0.5).double()).item()
        membrane = membrane - spike
    assert fired > 0


def test_moves_joins_sums_masks_and_complements_are_spikes_again(counts):
    spikes, other = thermometer(counts, 4, 0.25), thermometer(counts.flip(0), 4, 0.25)
    binary = thermometer(counts.clamp(max=1), 1)
    pairs = {
        "reshape": (spikes.reshape(3, 4, -1), counts.reshape(3, 4, -1) / 4),
        "heads": (spikes.flatten(2).unflatten(1, (2, -1)).mT, counts.flatten(2).unflatten(1, (2, -1)).mT / 4),
        "getitem": (spikes[1:, :, 2], counts[1:, :, 2] / 4),
        "chunk": (spikes.chunk(2, 1)[1], counts.chunk(2, 1)[1] / 4),
        "cat": (torch.cat([spikes, spikes + other], 1), torch.cat([counts, counts + counts.flip(0)], 1) / 4),
        "sew": (spikes + other, (counts + counts.flip(0)) / 4),
        "mask": (spikes * other, counts * counts.flip(0) / 16),
        "mask itself": (spikes * spikes, counts**2 / 16),
        "broadcast": (spikes * other[:, :, :1, :1], counts * counts.flip(0)[:, :, :1, :1] / 16),
        "iand": ((1 - binary) * spikes, (counts == 0) * counts / 4),
        "complement": (2 - spikes, 2 - counts / 4),
        "dropout": (nn.Dropout().eval()(spikes), counts / 4),
        "float32": (spikes.float(), (counts / 4).float()),
        "pool": (F.max_pool2d(spikes, 3, 2, 1), F.max_pool2d(counts / 4, 3, 2, 1)),
        "pool of a sum": (
            F.max_pool2d(spikes + other, 3, 2, 1),
            F.max_pool2d((counts + counts.flip(0)) / 4, 3, 2, 1),
        ),
    }
    for name, (got, wanted) in pairs.items():
        assert isinstance(got, BinarySpikes), name
        assert got.shape == wanted.shape, name
        assert set(got.planes.unique().tolist()) <= {0, 1}, name
        assert torch.equal(got.numbers(), wanted), name


def test_everything_else_is_numbers_and_no_spikes(counts):
    spikes, finer = thermometer(counts, 4, 0.25), thermometer(counts, 4, 0.5)
    results = {
        "mean": (spikes.mean((2, 3)), (counts / 4).mean((2, 3))),
        "turned": (spikes * -0.5, counts / -8),
        "membrane": (spikes + counts, counts / 4 + counts),
        "units differ": (spikes + finer, counts / 4 + counts / 2),
        "units differ in cat": (torch.cat([spikes, finer]), torch.cat([counts / 4, counts / 2])),
        "below zero": (0.5 - spikes, 0.5 - counts / 4),
        "average": (F.avg_pool2d(spikes, 2), F.avg_pool2d(counts / 4, 2)),
        "integers": (spikes.to(torch.int64), (counts / 4).long()),
        "norm": (nn.BatchNorm2d(4).double().eval()(spikes), nn.BatchNorm2d(4).double().eval()(counts / 4)),
    }
    for name, (got, wanted) in results.items():
        assert not isinstance(got, BinarySpikes), name
        assert torch.equal(got, wanted), name


@pytest.mark.parametrize("scaled", [lambda s: s * 4.0, lambda s: 4 * s, lambda s: torch.mul(s, 4.0)])
def test_a_number_times_spikes_is_spikes_worth_as_many_times_as_much(counts, scaled):
    spikes = scaled(thermometer(counts, 4, 0.25))
    assert isinstance(spikes, BinarySpikes)
    assert spikes.unit == 1.0
    assert spikes.planes.unique().tolist() == [0, 1]
    assert torch.equal(spikes.numbers(), counts)


def test_real_numbers_times_spikes_are_added_up_spike_by_spike(counts):
    spikes, seen = thermometer(counts, 4, 0.25), []
    real = torch.randn(3, 4, 6, 6, dtype=torch.float64)

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.extend(each for each in args if isinstance(each, torch.Tensor) and each is not real)
            return function(*args, **(kwargs or {}))

    with Seen():
        products = RULES["mul"](torch.mul, (real, spikes), {})
    assert not isinstance(products, BinarySpikes)
    torch.testing.assert_close(products, real * counts / 4, rtol=0, atol=FLOAT64)
    binary = [each for each in seen if each.shape == real.shape and bool(((each == 0) | (each == 1)).all())]
    assert len(binary) == 4


def test_what_would_go_wrong_unseen_is_refused(counts):
    spikes = thermometer(counts, 4)
    with pytest.raises(ValueError, match="in place"):
        spikes[0] = 0
    with pytest.raises(ValueError, match="in place"):
        spikes += 1
    with pytest.raises(ValueError, match="in place"):
        F.relu(spikes, inplace=True)
    with pytest.raises(ValueError, match="matmul"):
        torch.addmm(torch.zeros(6, 6).double(), spikes[0, 0], spikes[0, 0])
    with pytest.raises(ValueError, match="softmax"):
        F.scaled_dot_product_attention(spikes, counts, counts)
    with pytest.raises(TypeError, match="numbers"), torch._C.DisableTorchFunctionSubclass():
        torch.relu(spikes)


# Whole networks.


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("attention", ["sdsa1", "sdsa2", "sdsa3", "sdsa4"])
def test_an_unrolled_meta_spikeformer_is_the_integer_one(pictures, attention, levels):
    for neuron in INTEGER:
        model = build("meta", neuron=neuron, levels=levels, attention=attention)
        assert_the_same(model, unroll(model), pictures)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("shortcut", ["sew", "vs"])
@pytest.mark.parametrize("stem", ["meta", "spikformer"])
def test_shortcuts_between_spikes_unroll_too(pictures, stem, shortcut, levels):
    for neuron in INTEGER:
        model = build(stem, neuron=neuron, levels=levels, shortcut=shortcut)
        assert_the_same(model, unroll(model), pictures)


@pytest.mark.parametrize(
    "variant",
    [
        {"stem": "sps", "shortcut": "iand", "neuron": "i_lif", "levels": 1},
        {"stem": "scs", "shortcut": "iand", "neuron": "lif", "steps": 2},
        {"stem": "scs", "neuron": "ie_lif", "steps": 2},
        {"attention": "relu", "neuron": "ie_lif"},
        {"attention": "ssa_learnable", "neuron": "i_lif", "levels": 8},
    ],
    ids=str,
)
def test_an_unrolled_spikformer_is_the_integer_one(pictures, variant):
    model = build("spikformer", **variant)
    assert_the_same(model, unroll(model), pictures)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("levels", LEVELS)
def test_an_unrolled_qsd_transformer_is_the_integer_one_whatever_its_weights(pictures, levels, bits):
    model = build("qsd", levels=levels, bits=bits)
    assert_the_same(model, unroll(model), pictures)
    if bits:
        packed = sf.quantize.convert(copy.deepcopy(model))
        assert_the_same(packed, unroll(packed), pictures)
        folded = sf.quantize.fold(packed)
        assert_the_same(folded, unroll(folded), pictures)


@pytest.mark.parametrize("neuron", ["lif", "i_lif", "ie_lif_leaky"])
def test_real_steps_stay_and_stream(neuron):
    model = build("meta", neuron=neuron, steps=3)
    unrolled, clip = unroll(model), torch.randn(3, 2, 3, 16, 16, dtype=torch.float64)
    assert_the_same(model, unrolled, clip)
    logits = unrolled(clip)
    with streaming(unrolled):
        for frame in clip:
            streamed = unrolled(frame)
    assert (streamed - logits).abs().max() <= FLOAT64
    assert_the_same(set_steps(model, 2), set_steps(unrolled, 2), clip[:2])


@pytest.mark.parametrize("stem", ["meta", "qsd"])
def test_merging_and_unrolling_commute_and_leave_few_layers_without_spikes(pictures, stem):
    model = build(stem, neuron="ie_lif")
    unrolled = unroll(fuse(model))
    assert_the_same(model, unrolled, pictures)
    assert_the_same(model, fuse(unroll(model)), pictures)
    assert unspiked(unrolled, pictures) == {"stage1a.down.conv", "stage1a.block0.sep_conv.pw2"}


def unspiked(unrolled: nn.Module, images: torch.Tensor) -> set[str]:
    """Convolutions and linear layers that did not see binary spikes."""
    found = set()
    for name, module in unrolled.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: None if isinstance(args[0], BinarySpikes) else found.add(name)
            )
    unrolled(images)
    return found


@pytest.mark.parametrize(
    ("stem", "variant"),
    [
        ("qsd", {}),
        ("meta", {"neuron": "ni_lif", "attention": "sdsa1", "shortcut": "sew"}),
        ("meta", {"neuron": "lif", "attention": "sdsa2", "steps": 2}),
        ("spikformer", {"neuron": "i_lif", "levels": 1, "shortcut": "iand"}),
        ("spikformer", {"neuron": "ie_lif"}),
    ],
    ids=str,
)
def test_energy_is_that_of_the_integer_model_and_the_same_layers_see_spikes(pictures, stem, variant):
    model = build(stem, **variant)
    unrolled = unroll(model)
    wanted, got = (sf.energy.measure(each, pictures, convention="as_executed") for each in (model, unrolled))
    assert [(layer.name, layer.sops, layer.rate) for layer in got.layers] == [
        (layer.name, layer.sops, layer.rate) for layer in wanted.layers
    ]
    assert (got.total_mj, got.spikes_per_image, got.firing_rate) == (
        wanted.total_mj,
        wanted.spikes_per_image,
        wanted.firing_rate,
    )
    assert unspiked(unrolled, pictures) == {
        layer.name for layer in wanted.layers if layer.rate is None and layer.kind in ("conv", "linear")
    }


def test_packed_integer_weights_give_equal_sums_in_float32_layer_by_layer(pictures):
    model = sf.quantize.convert(build("qsd").float())
    unrolled, checked = unroll(model), []

    def compare(layer, args):
        (spikes,) = args
        if not isinstance(spikes, BinarySpikes):
            return
        weight = layer.integers().float()
        if isinstance(layer, nn.Linear):
            sums, wanted = F.linear(ones(spikes), weight), F.linear(spikes.counts(), weight)
        else:
            shape = (weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
            sums, wanted = F.conv2d(ones(spikes), *shape), F.conv2d(spikes.counts(), *shape)
        assert torch.equal(sums, wanted)  # whole numbers below 2^24
        checked.append(layer)

    def ones(spikes):
        return BinarySpikes(spikes.planes, 1.0)

    for module in unrolled.modules():
        if isinstance(module, sf.quantize.PackedLayer):
            module.register_forward_pre_hook(compare)
    with torch.no_grad():
        unrolled(pictures.float())
    assert len(checked) >= 10


def test_with_power_of_two_step_sizes_a_network_unrolls_without_any_rounding_in_float32(pictures):
    model = sf.quantize.convert(build("qsd").float())
    for layer in model.modules():
        if isinstance(layer, sf.quantize.PackedLayer):
            layer.alpha, layer.unpacked = torch.full_like(layer.alpha, 0.125), None
            if layer.bias is not None:
                layer.bias.data.mul_(64).round_().div_(64)
    assert_the_same(model, unroll(model), pictures.float(), tolerance=0)


def test_an_exact_network_unrolls_without_any_rounding_in_float32(pictures):
    model = build("qsd", bits=0, layer_scale=0.0).float()
    model = sf.quantize.prepare(model, bits=4, exact=True).eval()
    assert_the_same(model, unroll(model), pictures.float(), tolerance=0)


def test_no_spike_depends_on_the_batch(pictures):
    unrolled = unroll(build("qsd"))
    with torch.no_grad(), sf.record(unrolled) as both:
        logits = unrolled(pictures)
    both = dict(both)
    for index in range(2):
        with torch.no_grad(), sf.record(unrolled) as one:
            assert (unrolled(pictures[index : index + 1]) - logits[index]).abs().max() <= FLOAT64
        assert all(torch.equal(one[name], spikes[index::2]) for name, spikes in both.items())


# The copy.


def test_the_model_stays_as_it_is_and_the_copy_is_in_eval_mode(pictures):
    model = build("meta", neuron="i_lif").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unrolled = unroll(torch.compile(model, backend="eager"))
    assert not any(module.training for module in unrolled.modules())
    assert model.training
    assert not any(isinstance(module, IFNeuron) for module in model.modules())
    assert unrolled.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert_the_same(model.eval(), unroll(unrolled), pictures)


def test_networks_without_neurons_or_with_unknown_ones_are_refused_and_yours_can_be_added(monkeypatch):
    class Own(ILIF):
        def charge(self, current, membrane):
            return super().charge(2 * current, membrane)

    with pytest.raises(ValueError, match="nothing to unroll"):
        unroll(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="not Own"):
        unroll(Own())
    monkeypatch.setitem(UNROLLED, Own, type("OwnIF", (HalfEvenIF, Own), {}))
    current = torch.randn(100)
    assert torch.equal(unroll(Own())(current).numbers(), Own()(current))


def test_neurons_become_what_the_table_says():
    kinds = [type(unroll(kind())) for kind in (LIF, ILIF, NILIF, IELIF)]
    assert kinds == [UNROLLED[LIF], HalfEvenIF, HalfEvenIF, HalfUpIF]
    assert all(issubclass(kind, Neuron) for kind in kinds)
