"""LSQ by hand, against straight-through autograd in float64, and inside layers that are copied, loaded and trained."""

import copy
import math
import pickle

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.func import functional_call

from spikeformers.quantize import LSQLayer, fake_quantize, prepare
from spikeformers.quantize.lsq import integer_range
from spikeformers.train.optimise import build_optimizer
from spikeformers.train.recipe import Optim

LAYERS = [
    (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 7, 6)),
    (lambda: nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3, padding_mode="reflect", bias=False), (2, 3, 6, 6)),
    (lambda: nn.Conv1d(4, 5, 1), (2, 4, 9)),
    (lambda: nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular", bias=False), (3, 4, 5)),
    (lambda: nn.Linear(5, 3), (2, 4, 5)),
    (lambda: nn.Linear(5, 3, bias=False), (5,)),
]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def small() -> nn.Sequential:
    """A network with every kind of layer."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Flatten(2),
        nn.Conv1d(4, 6, 1, bias=False),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )


def straight_through(weight: Tensor, alpha: Tensor, offset: Tensor, *, bits: int) -> Tensor:
    """The definition, with autograd doing the calculus: rounding has slope 1, outside the range v has none."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    g = 1 / math.sqrt(weight.numel() * high)
    shape = (-1, *[1] * (weight.ndim - 1))
    alpha, offset = ((step * g + (step - step * g).detach()).view(shape) for step in (alpha, offset))
    v = (weight - offset) / alpha
    v = torch.where(v < low, low, torch.where(v > high, high, v))  # at the very ends v stays: a slope of 1
    return (v + (v.round() - v).detach()) * alpha + offset


def test_two_bits_by_hand():
    v = [-2.5, -2.0, -1.5, -0.5, 0.25, 0.5, 0.75, 1.0, 1.5]  # integers -2..1; halves go to even; both ends are inside
    weight = (torch.tensor(v, dtype=torch.float64) * 0.5).requires_grad_()
    alpha = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    q = fake_quantize(weight, alpha, None, bits=2)
    assert q.tolist() == [-1, -1, -1, 0, 0, 0, 0.5, 0.5, 0.5]
    q.backward(torch.arange(1.0, 10.0, dtype=torch.float64))
    assert weight.grad.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 0]
    # 1 (-2) + 2 (0) + 3 (-1/2) + 4 (1/2) + 5 (-1/4) + 6 (-1/2) + 7 (1/4) + 8 (0) + 9 (1) = 5, times 1/sqrt(9 * 1)
    assert alpha.grad.item() == pytest.approx(5 / 3, abs=1e-15)


def test_an_offset_by_hand():
    # v = (W - 1/4) / (1/2) = -3, -1, 1, 2: what is clipped hangs on the offset, the rest on the weight
    weight = torch.tensor([[-1.25, -0.25], [0.75, 1.25]], dtype=torch.float64, requires_grad=True)
    alpha, offset = (torch.full((2,), value, dtype=torch.float64, requires_grad=True) for value in (0.5, 0.25))
    q = fake_quantize(weight, alpha, offset, bits=2)
    assert q.tolist() == [[-0.75, -0.25], [0.75, 0.75]]
    q.backward(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    assert weight.grad.tolist() == [[0, 2], [3, 0]]
    assert offset.grad.tolist() == [0.5 * 1, 0.5 * 4]  # g = 1/sqrt(4 * 1)
    assert alpha.grad.tolist() == [0.5 * 1 * -2, 0.5 * 4 * 1]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_range_is_that_of_a_signed_integer(bits):
    low, high = integer_range(bits)
    assert (low, high) == (-(2**bits) // 2, 2**bits // 2 - 1)
    every = torch.arange(low - 2, high + 3, dtype=torch.float64)[None]
    q = fake_quantize(every, torch.ones(1, dtype=torch.float64), None, bits=bits)
    assert q[0].tolist() == [low, low, *range(low, high + 1), high, high]


@pytest.mark.parametrize("bits", [1, 0, 9, -4, 4.0, True, "4"])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be between 2 and 8, got {bits!r}"):
        fake_quantize(torch.ones(2, 2), torch.ones(2), None, bits=bits)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("shape", [(5, 4), (5, 2, 3, 3), (5,)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_gradients_of_weight_step_and_offset_are_those_of_straight_through_autograd(bits, shape, per_channel):
    count = 5 if per_channel else 1
    weight, alpha, offset = double(*shape), torch.rand(count, dtype=torch.float64) / 4 + 0.25, double(count) / 4
    low, high = integer_range(bits)
    alpha[0], offset[0] = 0.5, 0.25
    flat = weight.view(-1)
    flat[0], flat[-1] = low * 0.5 + 0.25, 1e3  # exactly on the lower end, and far outside
    if weight.ndim > 1:
        flat[1], flat[2] = high * 0.5 + 0.25, 1.0  # exactly on the upper end, and on a half
    upstream = double(*shape)
    found, expected = [], []
    for function, grads in ((fake_quantize, found), (straight_through, expected)):
        leaves = [each.clone().requires_grad_() for each in (weight, alpha, offset)]
        q = function(*leaves, bits=bits)
        q.backward(upstream)
        grads += [q, *(leaf.grad for leaf in leaves)]
    for a, b in zip(found, expected, strict=True):
        # float64 and sums of up to 90 terms below 1e3
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert all(each.abs().sum() > 0 for each in found)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_step_for_all_channels_is_equal_steps_in_each(bits):
    weight, upstream = double(6, 3, 3, 3), double(6, 3, 3, 3)
    grads = []
    for count in (1, 6):
        leaf, alpha, offset = weight.clone(), torch.full((count,), 0.3).double(), torch.full((count,), 0.1).double()
        for each in (leaf, alpha, offset):
            each.requires_grad_()
        q = fake_quantize(leaf, alpha, offset, bits=bits)
        q.backward(upstream)
        # the sum over channels is the gradient of what they share; float64, another order
        grads.append((q.detach(), leaf.grad, alpha.grad.sum(), offset.grad.sum()))
    for one, many in zip(*grads, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-13, atol=1e-13)


def test_eight_bits_leave_256_values_at_equal_distances():
    weight = torch.linspace(-2, 2, 4001, dtype=torch.float64)[None]
    q = fake_quantize(weight, torch.tensor([1 / 64], dtype=torch.float64), None, bits=8)
    assert torch.equal(q.unique(), torch.arange(-128, 128, dtype=torch.float64) / 64)
    assert (q - weight)[:, weight[0] < 127.5 / 64].abs().max() <= 1 / 128


def test_vmap_gives_what_the_loop_gives():
    weights, alphas = double(3, 4, 5), torch.rand(3, 4, dtype=torch.float64) + 0.1

    def loss(weight: Tensor, alpha: Tensor) -> Tensor:
        return fake_quantize(weight, alpha, None, bits=3).square().sum()

    batched = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(weights, alphas)
    looped = [torch.func.grad(loss, argnums=(0, 1))(*each) for each in zip(weights, alphas, strict=True)]
    for together, one_by_one in zip(batched, zip(*looped, strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(one_by_one), rtol=1e-13, atol=1e-13)  # order of sums


@pytest.mark.parametrize(("build", "shape"), LAYERS)
@pytest.mark.parametrize("options", [{}, {"per_channel": False}, {"offset": True}])
def test_a_layer_is_torchs_own_with_the_fake_quantised_weight(build, shape, options):
    plain, x = build(), torch.randn(shape)
    layer = prepare(copy.deepcopy(plain), bits=3, **options)
    with torch.no_grad():
        layer.alpha.mul_(0.4 * torch.rand_like(layer.alpha) + 0.2)  # small: some weights of every channel are clipped
        if layer.offset is not None:
            layer.offset.normal_(0, 0.05)
    q = fake_quantize(layer.weight, layer.alpha, layer.offset, bits=3)
    expected = functional_call(plain, {"weight": q}, x)
    assert isinstance(layer, LSQLayer)
    assert isinstance(layer, type(plain))
    assert torch.equal(layer(x), expected)
    assert not torch.equal(layer(x), plain(x))
    layer(x).sum().backward()
    assert all(each.grad.abs().sum() > 0 for each in layer.parameters())
    steps = layer.alpha.view(-1, *[1] * (layer.weight.ndim - 1))
    offset = 0 if layer.offset is None else layer.offset.view(steps.shape)
    integers = layer.integers()
    assert integers.dtype == torch.int8
    assert torch.equal(integers * steps + offset, q)
    assert set(integers.unique().tolist()) <= {-4, -3, -2, -1, 0, 1, 2, 3}


def test_a_layer_adds_nothing_to_a_state_but_its_step_sizes_and_keeps_the_very_weight():
    plain = nn.Conv2d(3, 5, 3)
    weight, bias = plain.weight, plain.bias
    layer = prepare(plain, bits=4)
    assert layer is plain
    assert layer.weight is weight
    assert layer.bias is bias
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == {
        "weight": (5, 3, 3, 3),
        "bias": (5,),
        "alpha": (5,),
    }
    assert list(prepare(nn.Linear(4, 3, bias=False), per_channel=False).state_dict()) == ["weight", "alpha"]
    assert set(prepare(nn.Linear(4, 3), offset=True).state_dict()) == {"weight", "bias", "alpha", "offset"}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_step_size_starts_at_twice_the_mean_weight_over_the_root_of_the_largest_integer(bits):
    layer = prepare(nn.Conv2d(3, 5, 3).double(), bits=bits, offset=True)
    expected = 2 * layer.weight.detach().abs().sum() / 135 / math.sqrt(2 ** (bits - 1) - 1)
    torch.testing.assert_close(layer.alpha.detach(), expected.expand(5), rtol=1e-14, atol=0)  # order of a sum
    assert layer.alpha.dtype == torch.float64
    assert layer.offset.tolist() == [0] * 5


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_pickles_are_equal_and_independent(copies):
    model = prepare(small(), bits=3, offset=True)
    x = torch.randn(2, 3, 4, 4)
    twin = copies(model)
    assert torch.equal(twin(x), model(x))
    assert [type(each) for each in twin.modules()] == [type(each) for each in model.modules()]
    with torch.no_grad():
        twin[0].alpha.mul_(2)
    assert not torch.equal(twin(x), model(x))


def test_a_saved_state_comes_back(tmp_path):
    first, second = prepare(small(), bits=3), prepare(small(), bits=3)
    with torch.no_grad():
        first[7].alpha.mul_(1.5)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(second.eval()(x), first.eval()(x))


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}])
def test_a_state_without_step_sizes_has_them_computed_from_its_own_weights(options):
    plain = small()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(10)
    model = prepare(small(), bits=4, offset=True)
    with torch.no_grad():
        for layer in (model[0], model[4], model[7]):
            layer.offset.fill_(3.0)
    found = model.load_state_dict(plain.state_dict(), **options)
    assert not found.missing_keys
    assert not found.unexpected_keys
    expected = prepare(copy.deepcopy(plain), bits=4, offset=True)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_step_sizes_follow_weights_that_are_assigned_to_another_device_or_precision():
    plain = small().double()
    with torch.device("meta"):
        model = prepare(small(), bits=4, offset=True)
    model.load_state_dict(plain.state_dict(), assign=True)
    x = double(2, 3, 4, 4)
    assert torch.equal(model(x), prepare(plain, bits=4, offset=True)(x))
    assert {each.dtype for each in model.parameters()} == {torch.float64}


def test_step_sizes_stay_the_same_parameters_when_a_state_without_them_is_loaded():
    model = prepare(nn.Linear(4, 3), bits=4)
    alpha = model.alpha  # an optimiser holds it
    model.load_state_dict(nn.Linear(4, 3).state_dict())
    assert model.alpha is alpha


def test_step_sizes_are_not_computed_where_a_state_has_some_or_lacks_the_weight():
    lsq, plus = prepare(nn.Linear(4, 3), bits=4), prepare(nn.Linear(4, 3), bits=4, offset=True)
    with torch.no_grad():
        lsq.alpha.fill_(0.125)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "offset"'):
        plus.load_state_dict(lsq.state_dict())
    assert plus.alpha.tolist() == [0.125] * 3
    with pytest.raises(RuntimeError, match="alpha"):
        plus.load_state_dict({"bias": torch.zeros(3)})
    assert plus.alpha.tolist() == [0.125] * 3


def test_a_missing_alpha_that_is_not_of_a_layer_stays_missing():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.alpha = nn.Parameter(torch.ones(2))

    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "alpha"'):
        prepare(Scaled()).load_state_dict({"layer.weight": torch.ones(2, 2), "layer.bias": torch.ones(2)})


@pytest.mark.parametrize("offset", [False, True])
def test_weights_of_zero_give_zero_and_finite_gradients(offset):
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    layer = prepare(layer, bits=2, offset=offset)
    y = layer(torch.randn(4, 3))
    assert torch.equal(y, layer.bias.expand(4, 2))
    y.sum().backward()
    assert all(each.grad.isfinite().all() for each in layer.parameters())
    assert layer.weight.grad.abs().sum() > 0
    layer.load_state_dict({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    usual = 1 / (2 * 3**0.5)  # mean |W| of torch's initialisation; Qp = 1
    torch.testing.assert_close(layer.alpha, torch.full((2,), 2 * usual))


def test_under_autocast_weights_are_rounded_in_float32():
    layer, x = prepare(nn.Linear(16, 8), bits=4), torch.randn(3, 16)
    q = layer.quantized_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.quantized_weight(), q)
        assert q.dtype == torch.float32
        assert layer(x).dtype == torch.bfloat16


def test_an_averaged_model_starts_as_the_model_and_averages_step_sizes():
    model = prepare(small(), bits=4).eval()
    ema = ModelEmaV3(model, decay=0.5)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(ema.module(x), model(x))
    before = model[0].alpha.detach().clone()
    with torch.no_grad():
        model[0].alpha.mul_(3)
    ema.update(model)
    torch.testing.assert_close(ema.module[0].alpha, 2 * before)
    assert ema.module(x).isfinite().all()


def test_compiles_to_one_graph_with_equal_outputs_and_gradients(unchecked):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    prepare(model, bits={"first": 4, "last": 2}, offset=True)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(compiled(x), model(x))
    for each in (compiled, model):
        each(x).square().sum().backward()
    for a, b in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_gradients_of_two_forward_passes_and_of_a_layer_that_is_used_twice_add_up():
    layer = prepare(nn.Linear(4, 4).double(), bits=3, offset=True)
    first, second = double(2, 4), double(3, 4)

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(layer.parameters())))

    separate = [a + b for a, b in zip(*(gradients(layer(x).square().sum()) for x in (first, second)), strict=True)]
    losses = [layer(x).square().sum() for x in (first, second)]  # both graphs alive, as with DDP and accumulation
    for a, b in zip(gradients(losses[0] + losses[1]), separate, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)  # order of sums
    twice = nn.Sequential(layer, nn.Tanh(), layer)
    q = fake_quantize(layer.weight, layer.alpha, layer.offset, bits=3)
    unrolled = torch.tanh(first @ q.T + layer.bias) @ q.T + layer.bias
    for a, b in zip(gradients(twice(first).sum()), gradients(unrolled.sum()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("name", "rate"), [("sgd", 0.05), ("adam", 0.01)])
def test_training_lowers_the_loss_and_moves_every_step_size(name, rate):
    model = prepare(small(), bits=2, offset=True)
    x, target = torch.randn(16, 3, 4, 4), torch.randint(0, 5, (16,))
    optimizer = build_optimizer(model, Optim(name=name, lr=rate))
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    after = dict(model.named_parameters())
    assert all((after[key] != value).any() for key, value in before.items())
    assert all((after[f"{layer}.alpha"] != before[f"{layer}.alpha"]).all() for layer in (0, 4, 7))


def test_step_sizes_and_offsets_are_not_decayed():
    model = prepare(small(), bits=4, offset=True)
    groups = build_optimizer(model, Optim(name="adamw", weight_decay=0.1)).param_groups
    decayed = {id(each) for group in groups if group["weight_decay"] for each in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert names == {"0.weight", "4.weight", "7.weight"}
