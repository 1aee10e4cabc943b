"""LSQ against the authors' quantised weights, gradients and outputs; integers equal, the rest to the last roundings."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spikeformers.quantize import fake_quantize, prepare

REFERENCE = load_file(Path(__file__).parent / "lsq.safetensors")
CASES = sorted({key.rsplit("/", 1)[0] for key in REFERENCE})
TIES = [case for case in CASES if case.endswith("ties")]
ROUNDING = {"fp32": 2.0**-24, "fp64": 2.0**-53}


def values(case: str) -> dict[str, Tensor]:
    return {key.rsplit("/", 1)[1]: value for key, value in REFERENCE.items() if key.startswith(f"{case}/")}


def bits_of(case: str) -> int:
    return int(case.split("_b")[1][0])


def steps(alpha: Tensor, weight: Tensor) -> Tensor:
    return alpha.view(-1, *[1] * (weight.ndim - 1))


def gradients(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantised weight, gradient of the weight and of the step sizes, for the loss sum(w_q * upstream)."""
    stored = values(case)
    weight, alpha = (stored[name].clone().requires_grad_() for name in ("weight", "alpha"))
    quantized = fake_quantize(weight, alpha, None, bits=bits_of(case))
    quantized.backward(stored["upstream"])
    return quantized.detach(), weight.grad, alpha.grad


def layer_of(case: str) -> nn.Module:
    """The layer of `case`, prepared."""
    stored = values(case)
    weight, kind = stored["weight"], case.split("/")[1]
    out, inside = weight.shape[:2]
    same = {"padding": weight.shape[-1] // 2 if stored["x"].shape[-1] == stored["y"].shape[-1] else 0, "bias": False}
    if kind.startswith("linear"):
        layer = nn.Linear(inside, out, bias=False)
    elif kind.startswith("conv1d"):
        layer = nn.Conv1d(inside, out, 1, bias=False)
    elif kind.startswith("dwconv"):
        layer = nn.Conv2d(out, out, 3, groups=out, **same)
    else:
        layer = nn.Conv2d(inside, out, 3, **same)
    layer = layer.to(weight.dtype)
    layer.load_state_dict({"weight": weight})
    return prepare(layer, bits=bits_of(case))


def test_the_reference_has_both_precisions_all_layers_bits_and_kinds():
    names = {
        f"{precision}/{name}_b{bits}_{kind}"
        for precision in ROUNDING
        for bits in (2, 3, 4)
        for name, kind in (
            ("conv2d", "pc"),
            ("dwconv", "pc"),
            ("conv1d", "pc"),
            ("linear", "pc"),
            ("conv2d", "init"),
            ("linear", "ties"),
        )
    }
    assert set(CASES) == names


@pytest.mark.parametrize("case", CASES)
def test_quantised_weights_are_the_authors_integers_times_step_sizes(case):
    stored, bits = values(case), bits_of(case)
    quantized, _, _ = gradients(case)
    alpha = steps(stored["alpha"], stored["weight"])
    assert torch.equal((quantized / alpha).round().to(torch.int8), stored["w_int"])
    assert torch.equal(quantized, stored["w_int"] * alpha)
    # The authors write a rounding as (round(v) - v) + v: up to two roundings of the size of the range's end, in steps.
    assert ((quantized - stored["w_q"]).abs() <= 2 * ROUNDING[case[:4]] * 2 ** (bits - 1) * alpha).all()


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_authors(case):
    stored, unit = values(case), ROUNDING[case[:4]]
    _, grad_weight, grad_alpha = gradients(case)
    # Theirs is divided and multiplied by the step size: two roundings. Which are zero is exact.
    assert torch.equal(grad_weight == 0, stored["grad_weight"] == 0)
    torch.testing.assert_close(grad_weight, stored["grad_weight"], rtol=4 * unit, atol=0)
    # A sum of up to 39 terms |upstream| (|q| + |v|) < 3 * 16, times g < 1/2, in another order.
    torch.testing.assert_close(grad_alpha, stored["grad_alpha"], rtol=0, atol=16 * unit)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_scale_counts_all_weights(case):
    stored, bits = values(case), bits_of(case)
    largest = 2 ** (bits - 1) - 1
    g = 1 / math.sqrt(stored["weight"].numel() * largest)
    assert stored["g"].item() == pytest.approx(g, rel=1e-15)  # float64
    # With v beyond the range only, the gradient of a step size is g * sum(upstream * Qp): nothing hides the factor.
    weight = torch.full_like(stored["weight"], 1e3)
    alpha = stored["alpha"].clone().requires_grad_()
    fake_quantize(weight, alpha, None, bits=bits).backward(torch.ones_like(weight))
    expected = torch.full_like(alpha, g * largest * weight[0].numel())
    torch.testing.assert_close(alpha.grad, expected, rtol=4 * ROUNDING[case[:4]], atol=0)  # g is rounded, then products


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("init")])
def test_step_sizes_start_where_the_authors_first_training_step_puts_them(case):
    alpha = layer_of(case).alpha
    assert len(alpha.unique()) == 1
    # A mean of 135 weights, a root and a quotient: sums in another order.
    torch.testing.assert_close(alpha.detach(), values(case)["alpha"], rtol=8 * ROUNDING[case[:4]], atol=0)


@pytest.mark.parametrize("case", CASES)
def test_outputs_of_layers_are_the_authors(case):
    stored, layer = values(case), layer_of(case)
    layer.load_state_dict({"weight": stored["weight"], "alpha": stored["alpha"]})
    y = layer(stored["x"])
    assert y.shape == stored["y"].shape
    difference = (stored["y"] - y).detach().transpose(0, 1).flatten(1)
    if case.endswith("init") or (case.split("/")[1].startswith(("conv1d", "linear")) and case not in TIES):
        assert difference.shape[1] > 1
        difference -= difference.mean(1, keepdim=True)  # these layers had random biases, which are not stored
    # Sums of up to 39 products, each below 8 in size, in another order, of weights two roundings apart.
    assert difference.abs().max() <= 32 * ROUNDING[case[:4]]


@pytest.mark.parametrize("case", TIES)
def test_ties_go_to_even_and_ends_of_the_range_pass_gradients_whatever_the_version_of_torch(case):
    stored, bits = values(case), bits_of(case)
    v = (stored["weight"] / steps(stored["alpha"], stored["weight"])).double()  # step sizes are powers of two: exact
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    halves, ends = (v % 1) == 0.5, (v == low) | (v == high)
    assert halves.any()
    assert (v == low).any()
    assert (v == high).any()
    quantized, grad_weight, grad_alpha = gradients(case)
    inside = halves & (v > low) & (v < high)
    assert ((stored["w_int"][inside] % 2) == 0).all()
    assert torch.equal(quantized, stored["w_q"])  # dyadic numbers: no rounding
    assert torch.equal(grad_weight, stored["grad_weight"])
    # The same code of theirs under torch 2.15 passes none there, and nothing else differs.
    later = stored["grad_weight_torch2.15"]
    assert (later[ends] == 0).all()
    assert (grad_weight[ends] != 0).all()
    assert torch.equal(grad_weight[~ends], later[~ends])
    unit = ROUNDING[case[:4]]
    torch.testing.assert_close(grad_alpha, stored["grad_alpha"], rtol=0, atol=16 * unit)  # as above
    # What it takes away from the step size: v * upstream at the ends, which here is no rounding.
    assert ((grad_alpha - stored["grad_alpha_torch2.15"]).abs() > 1e-3).all()
