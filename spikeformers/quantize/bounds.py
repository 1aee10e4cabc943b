"""A proof that float32 evaluates a network exactly: bits of every sum, from one forward pass that follows formats.

A format says of which numbers a tensor consists: whole multiples of a grid, up to a bound. It follows from that of the
input, the integer weights and the operation, never from values that happen to be there, so what is proven for one image
holds for all of its size. Where a sum could pass 2^24 multiples of its grid, or no format is known, a ValueError names
the layer. Only operations of this package's networks are known.
Sums are exact in a library that multiplies and adds, not in one that transforms (Winograd, FFT) or shortens (TF32).
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from spikeformers.neurons import IELIF, ILIF, LIF, NILIF, Door, Neuron, TimeMean, temporal_modules
from spikeformers.quantize.exact import BIAS_GRID, EXACT_BITS, FixedPointDoor, FixedPointNorm, power_of_two

MOVES = {
    *("reshape", "view", "flatten", "unflatten", "permute", "transpose", "contiguous", "repeat", "expand", "squeeze"),
    *("unsqueeze", "chunk", "split", "unbind", "getitem", "get", "cat", "stack", "clone", "detach", "to", "float"),
    *("double", "max_pool2d", "pad", "movedim"),
}
NEW = {"new_ones", "new_zeros", "ones_like", "zeros_like"}  # do not read what they are given
FINEST = 60  # a constant finer than 2^-60 is none of ours
MARGIN = 2  # bits kept free where a mean, rounded once by its division, meets a threshold
SIDE = 64  # pixels of the image that stands for all, unless the network needs more


@dataclass(frozen=True)
class Numbers:
    """Whole multiples of `grid` / `over`, at most `bound` in size; `over` 1 where float32 holds them exactly."""

    grid: float
    bound: float
    over: int = 1

    @property
    def bits(self) -> float:
        """log2 of the largest multiple."""
        return math.log2(self.bound / self.grid * self.over) if self.bound else 0.0


Format = Numbers | str
"""Numbers, or why there is no format."""


@torch.no_grad()
def exact_bits(model: nn.Module, images: Tensor | None = None, *, any_weights: bool = False) -> dict[str, float]:
    """Bits that the largest sum of each module takes, of the 24 of float32, for images of this size.

    `images` [B, C, H, W] or a clip [T, B, C, H, W], whose values do not matter; None: one of 64 pixels a side. Layers
    do not mind the size, the products of attention and means over pixels do.  `any_weights`: for the largest weights
    that their bits allow, else for those that are there.
    Raises ValueError, naming the module, if float32 may round anywhere in `model.eval()`.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled graph would not hear the hooks
    images = _an_image(model) if images is None else images
    follow, mode = _Follow(any_weights=any_weights), model.training
    model.eval()
    try:
        with ExitStack() as stack:
            for name, module in model.named_modules():
                stack.enter_context(follow.listen(name, module))
            stack.enter_context(follow)
            model(images)
    finally:
        model.train(mode)
    return follow.bits


def _an_image(model: nn.Module) -> Tensor:
    doors = [module for module in temporal_modules(model).values() if isinstance(module, Door)]
    if not doors:
        raise ValueError(
            f"exact networks round images at a Door (spikeformers.neurons), and {type(model).__name__} has none"
        )
    side = max(SIDE, *(2 * stride for stride in getattr(getattr(model, "feature_info", None), "strides", (1,))))
    first = next(model.parameters())
    return first.new_zeros(1, doors[0].in_channels, side, side)


class _Follow(TorchFunctionMode):
    """Knows the format of every tensor that depends on the image."""

    def __init__(self, *, any_weights: bool) -> None:
        super().__init__()
        self.any_weights = any_weights
        self.formats = WeakTensorKeyDictionary()
        self.bits: dict[str, float] = {}
        self.names: list[str] = [""]
        self.inside = 0  # modules whose own functions are not looked at

    def listen(self, name: str, module: nn.Module) -> ExitStack:
        """Hooks on one module, removed when the stack is left."""
        rule = next((rule for kind, rule in MODULES.items() if isinstance(module, kind)), None)
        rule = _of_layer if hasattr(module, "quantized_weight") else rule

        def enter(_, inputs: tuple) -> None:
            self.names.append(name or type(module).__name__)
            self.inside += rule is not None

        def leave(_, inputs: tuple, output: object) -> None:
            self.inside -= rule is not None
            if rule is not None:
                given = self.format_of(inputs[0]) if inputs[0] in self.formats else "an input"
                self.put(output, rule(self, module, given))
            self.names.pop()

        stack = ExitStack()
        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(leave).remove)
        return stack

    def __torch_function__(self, func, types, args=(), kwargs=None):
        fresh = [each for each in tree_leaves((args, kwargs)) if self.known(each)]
        result = func(*args, **(kwargs or {}))
        if any(result is each for each in fresh):  # an operation in place, which is followed below
            self.put(result, self.formats[result][0])
        name = func.__name__.strip("_")
        if self.inside or name in NEW or not any(isinstance(each, Tensor) for each in tree_leaves(result)):
            return result
        operands = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if any(each in self.formats for each in operands):
            found = self.of(name, args, kwargs or {}, operands, result)
            for each in tree_leaves(result):
                self.put(each, found)
        return result

    def put(self, tensor: Tensor, found: Format) -> None:
        self.formats[tensor] = (found, tensor._version)

    def known(self, value: object) -> bool:
        """True for a tensor whose format is known, and that nobody has written to since."""
        return isinstance(value, Tensor) and value in self.formats and self.formats[value][1] == value._version

    def of(self, name: str, args: tuple, kwargs: dict, operands: list[Tensor], result: object) -> Format:
        """The format of what the function `name` gives."""
        known = [self.format_of(each) for each in operands]
        reason = next((each for each in known if isinstance(each, str)), None)
        if reason is not None:
            return reason
        if name in MOVES:
            padding = args[3] if name == "pad" and len(args) > 3 else kwargs.get("value")
            return _joined(known) if not padding else f"{name} with {padding}"
        if name in OPERATIONS and len({each.over for each in known}) == 1 and "alpha" not in kwargs:
            return OPERATIONS[name](self, args, result)
        return f"{name} in {self.names[-1]}"

    def format_of(self, value: object) -> Format:
        """Of a tensor or number; one that does not depend on the image is looked at."""
        if not isinstance(value, Tensor):
            value = torch.tensor(float(value), dtype=torch.float64)
        elif value in self.formats:
            return self.formats[value][0] if self.known(value) else "a tensor that was changed in place"
        value = value.detach().double()
        scaled = value
        for fraction in range(FINEST):
            if bool((scaled == scaled.round()).all()):
                return Numbers(2.0**-fraction, float(value.abs().max()))
            scaled = scaled * 2
        return f"numbers such as {float(value.flatten()[0]):g} in {self.names[-1]}"

    def fits(self, numbers: Numbers, *, limit: int = EXACT_BITS, cure: str = "") -> Numbers:
        """`numbers`. Raises ValueError if float32 does not hold all of them."""
        name = self.names[-1]
        self.bits[name] = max(self.bits.get(name, 0.0), numbers.bits)
        if numbers.bits > limit:
            raise ValueError(
                f"{name} is not exact in float32: its sums may take {numbers.bits:.1f} bits of {limit}{cure}"
            )
        return numbers

    def read(self, numbers: Format, *, divided: bool = False) -> Numbers:
        """The numbers that the present module is given. Raises ValueError if they are not known."""
        name = self.names[-1]
        if isinstance(numbers, str):
            raise ValueError(f"{name} cannot be exact in float32: it depends on {numbers}, which gives no fixed-point")
        if numbers.over != 1 and not divided:
            raise ValueError(
                f"{name} cannot be exact in float32: it reads a mean over {numbers.over} numbers, which is exact for a "
                "power of two only; choose image size and steps accordingly"
            )
        return numbers


def _joined(known: list[Numbers]) -> Format:
    if len({each.over for each in known}) > 1:
        return "means of different numbers side by side"
    return Numbers(min(each.grid for each in known), max(each.bound for each in known), known[0].over)


def _sum(follow: _Follow, args: tuple, _) -> Format:
    known = [follow.format_of(each) for each in args[:2]]
    reason = next((each for each in known if isinstance(each, str)), None)
    if reason is not None or len({each.over for each in known}) > 1:
        return reason or f"a mean and another number added in {follow.names[-1]}"
    return follow.fits(replace(_joined(known), bound=sum(each.bound for each in known)))


def _product(follow: _Follow, args: tuple, _) -> Format:
    return _multiplied(follow, args, terms=1)


def _matrix_product(follow: _Follow, args: tuple, _) -> Format:
    return _multiplied(follow, args, terms=args[0].shape[-1])


def _multiplied(follow: _Follow, args: tuple, *, terms: int) -> Format:
    one, other = (follow.format_of(each) for each in args[:2])
    if isinstance(one, str) or isinstance(other, str) or not one.over == other.over == 1:
        return one if isinstance(one, str) else other if isinstance(other, str) else "a product with a mean"
    numbers = Numbers(one.grid * other.grid, terms * one.bound * other.bound)
    return follow.fits(numbers, cure="; use smaller images or fewer levels" if terms > 1 else "")


def _quotient(follow: _Follow, args: tuple, _) -> Format:
    if isinstance(args[1], Tensor):
        return f"a division in {follow.names[-1]}"
    return _divided(follow.format_of(args[0]), float(args[1]))


def _divided(numbers: Format, divisor: float) -> Format:
    """By a power of two; by another whole number, float32 rounds once."""
    if isinstance(numbers, str):
        return numbers
    if math.frexp(divisor)[0] == 0.5:
        return replace(numbers, grid=numbers.grid / divisor, bound=numbers.bound / divisor)
    if divisor != int(divisor) or divisor < 1:
        return f"a division by {divisor:g}"
    return replace(numbers, bound=numbers.bound / divisor, over=numbers.over * int(divisor))


def _total(follow: _Follow, args: tuple, result: Tensor) -> Format:
    numbers = follow.format_of(args[0])
    terms = args[0].numel() // result.numel()
    return follow.fits(replace(numbers, bound=terms * numbers.bound), cure="; use smaller images")


def _mean(follow: _Follow, args: tuple, result: Tensor) -> Format:
    return _divided(_total(follow, args, result), args[0].numel() // result.numel())


OPERATIONS: dict[str, Callable[[_Follow, tuple, object], Format]] = {
    **dict.fromkeys(("add", "radd", "iadd", "sub", "rsub", "isub"), _sum),
    **dict.fromkeys(("mul", "rmul", "imul"), _product),
    **dict.fromkeys(("div", "truediv"), _quotient),
    **dict.fromkeys(("matmul", "rmatmul", "bmm"), _matrix_product),
    "sum": _total,
    "mean": _mean,
}


def _of_layer(follow: _Follow, layer: nn.Module, given: Format) -> Numbers:
    """A convolution or linear layer: sum of |integer weights| times the largest input, and its bias."""
    numbers, name = follow.read(given), follow.names[-1]
    step = layer.step().abs().double()
    if not torch.equal(step, power_of_two(step)) or layer.offset is not None:
        raise ValueError(f"{name} has step sizes that are no powers of two: call quantize.prepare(..., exact=True)")
    weights = layer.integers().double().abs().flatten(1)
    if follow.any_weights:
        weights = torch.full_like(weights[:1], 2 ** (layer.bits - 1))
    grid, most = numbers.grid, weights.sum(1) * numbers.bound
    if layer.bias is not None:
        bias = layer.quantized_bias().double() / step
        if not torch.equal(bias, (bias / BIAS_GRID).round() * BIAS_GRID):
            raise ValueError(f"{name} has biases that are no multiples of {BIAS_GRID:g} of their step sizes")
        grid, most = min(grid, BIAS_GRID), most + bias.abs()
    cure = f"; give it fewer bits than {layer.bits}, or fewer than {weights[0].numel()} inputs"
    follow.fits(Numbers(grid, float(most.max())), cure=cure)
    if hasattr(layer, "limit"):
        return Numbers(layer.grid, layer.limit)
    return Numbers(grid * float(step.min()), float((step * most).max()))


def _of_norm(follow: _Follow, norm: FixedPointNorm, given: Format) -> Numbers:
    follow.read(given)
    return Numbers(norm.grid, norm.limit)


def _of_door(follow: _Follow, door: Door, _) -> Format:
    return Numbers(door.grid, door.limit) if isinstance(door, FixedPointDoor) else "images that were not rounded"


def _of_time_mean(follow: _Follow, mean: TimeMean, given: Format) -> Format:
    if isinstance(given, str):
        return given
    return _divided(follow.fits(replace(given, bound=mean.steps * given.bound)), mean.steps)


def _of_neuron(follow: _Follow, neuron: Neuron, given: Format) -> Numbers:
    """Charged in steps that get finer with every time step, by the leak; then compared with thresholds."""
    name = follow.names[-1]
    numbers = follow.read(given, divided=not neuron.carries or neuron.steps == 1)
    if not isinstance(neuron, ILIF | NILIF | IELIF | LIF):
        raise ValueError(f"{name} is a {type(neuron).__name__}, of which it is not known whether float32 is exact")
    leak = (1 / neuron.tau if isinstance(neuron, LIF) else neuron.decay) or 1.0
    gain = getattr(neuron, "gain", 1.0)
    told = {"threshold": neuron.threshold, "unit": neuron.unit, "gain": gain, "leak": leak}
    for what, value in told.items():
        if isinstance(value, Tensor) or math.frexp(value)[0] != 0.5:
            shown = "learned" if isinstance(value, Tensor) else f"{value:g}"
            raise ValueError(
                f"{name} cannot be exact in float32: its {what} is {shown}, which is no power of two; levels must be "
                'one too, and attention="sdsa3" learns no threshold'
            )
    rest = getattr(neuron, "v_reset", None) or 0.0
    if rest != round(rest / numbers.grid) * numbers.grid:
        raise ValueError(f"{name} cannot be exact in float32: v_reset={rest:g} is no multiple of {numbers.grid:g}")
    _membrane(follow, neuron, numbers, gain=gain, leak=leak, rest=abs(rest))
    return Numbers(neuron.unit, neuron.unit * neuron.levels)


def _membrane(follow: _Follow, neuron: Neuron, numbers: Numbers, *, gain: float, leak: float, rest: float) -> None:
    """Raises ValueError if the membrane has more bits than float32, or what is compared with thresholds does.

    A neuron without memory clips first, so that only its own range counts.
    """
    times = neuron.steps if neuron.carries else 1
    if isinstance(neuron, LIF):  # it compares with its threshold, and leaks before it fires
        finest, largest = min(numbers.grid * leak**times, neuron.threshold), 2 * neuron.threshold
    else:  # others divide by it; 1/2 is added before rounding
        gain /= neuron.threshold
        finest, largest = min(numbers.grid * gain * leak ** (times - 1), 0.5), neuron.levels + 0.5
    if times > 1:
        largest += times * (gain * numbers.bound + rest)
    limit = EXACT_BITS if numbers.over == 1 else EXACT_BITS - MARGIN
    cure = "; use fewer steps or smaller images"
    follow.fits(Numbers(finest, largest, numbers.over), limit=limit, cure=cure)


MODULES: dict[type[nn.Module], Callable[[_Follow, nn.Module, Format], Format]] = {
    FixedPointNorm: _of_norm,
    Door: _of_door,
    TimeMean: _of_time_mean,
    Neuron: _of_neuron,
}
