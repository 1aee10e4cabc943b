"""Unrolling: an integer network as the binary one it stands for, its neurons firing 0 and 1 over D virtual steps.

Paper: Spike2Former, Eqs. 19-21; QSD-Transformer, Sec. 3 (its text has the idea, no code); Luo et al., ECCV 2024.
A neuron waits until the whole input of its layer is there (the barrier), then integrates and fires: the d-th of its D
virtual steps emits a spike and takes one count off the membrane, so that n counts are spikes in the first n steps.
A layer adds the products of all virtual steps and its bias once: W n + b = sum_d W s_d + b. In a product of two spike
maps one waits as whole counts and the other comes spike by spike: sum_d q_d (sum_e k_e)^T, with every cross term.
Departures from the paper: Eq. 20's W x D is a slip for NI-LIF, whose spikes are worth 1/D: weights stay. Fired
step by step without the barrier, or multiplied within equal steps only, spikes would give other numbers (tests show).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from spikeformers.energy.marks import SpikeMarks
from spikeformers.neurons import IELIF, ILIF, LIF, NILIF, Neuron


class BinarySpikes(Tensor):
    """Spikes [T*B, ...] as zeros and ones over P virtual steps, `planes` [P, T*B, ...], each spike worth `unit`.

    To the code of a model it is a tensor of its outer shape. What may be done to spikes is done to every plane: moving,
    max-pooling, and products, which see one binary plane at a time and are added up. Sums of spikes of one unit, their
    element-wise products (AND), a number minus them (NOT) and a number times them are spikes again. Anything else makes
    real numbers, counts times unit. There is no tensor of these behind it: what the table below does not know how to
    take cannot go wrong unseen.  Raises ValueError where spikes would be written to, or multiplied by a function that
    hides its product.
    """

    planes: Tensor
    unit: float

    @staticmethod
    def __new__(cls, planes: Float[Tensor, "P TB *shape"], unit: float) -> "BinarySpikes":
        shell = Tensor._make_wrapper_subclass(cls, planes.shape[1:], dtype=planes.dtype, device=planes.device)
        shell.planes, shell.unit = planes, unit
        return shell

    def counts(self) -> Float[Tensor, " TB *shape"]:
        """Spikes of each element over all virtual steps."""
        return self.planes.sum(0)

    def numbers(self) -> Float[Tensor, " TB *shape"]:
        """What the spikes are worth: an ordinary tensor, no spikes any more."""
        return self.counts() * self.unit

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"BinarySpikes({len(self.planes)} virtual steps of {tuple(self.shape)}, unit={self.unit:g})"

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, is_attribute = getattr(function, "__name__", ""), False
        if name == "__get__":
            name, is_attribute = function.__self__.__name__, True
        if name not in RULES and (is_attribute or name in METADATA):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        result = RULES[name](function, args, kwargs) if name in RULES else None
        return _as_numbers(name, function, args, kwargs) if result is None else result

    @classmethod
    def __torch_dispatch__(cls, function: Callable, types: tuple, args: tuple = (), kwargs: object = None) -> Any:
        raise TypeError(f"{function} wants the numbers behind binary spikes, and there are none: call .numbers() first")


METADATA = ("size", "numel", "dim", "stride", "is_floating_point", "is_contiguous", "__len__")
MOVES = (*SpikeMarks.MOVES, "T", "mT")  # what leaves spikes spikes for energy.measure too
BIASED = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")
UNBIASED = ("matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "einsum")
HIDDEN = ("addmm", "addmv", "addbmm", "baddbmm", "bilinear", "multi_head_attention_forward")  # products inside
WRITES = ("__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


def _as_numbers(name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
    """The function on counts times unit: what comes out are real numbers."""
    if name in HIDDEN:
        raise ValueError(f"{name} hides a product of spikes, which cannot be unrolled: write it with matmul (@)")
    writes = name in WRITES or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
    if writes and isinstance(args[0] if args else None, BinarySpikes):
        raise ValueError(f"{name} would change spikes in place: let the model make a new tensor of them instead")
    return function(*_numbers(args), **_numbers(kwargs))


def _numbers(values: Any) -> Any:
    return tree_map(lambda value: value.numbers() if isinstance(value, BinarySpikes) else value, values)


def _moved(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Plane by plane; None if that gives no spikes, as a change to another type."""
    spikes, *rest = args or (None,)
    if not isinstance(spikes, BinarySpikes):
        return None
    moved = [function(plane, *rest, **kwargs) for plane in spikes.planes]
    if isinstance(moved[0], Tensor):
        return BinarySpikes(torch.stack(moved), spikes.unit) if moved[0].is_floating_point() else None
    return tuple(BinarySpikes(torch.stack(parts), spikes.unit) for parts in zip(*moved, strict=True))


def _repeated(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Nearest upsampling repeats spikes; the other modes average them."""
    mode = kwargs.get("mode", args[3] if len(args) > 3 else "nearest")
    return _moved(function, args, kwargs) if mode in ("nearest", "nearest-exact") else None


def _kept(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Dropout of a network that does not train."""
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return None if training or not args else args[0]


def _max_pooled(function: Callable, args: tuple, kwargs: dict) -> BinarySpikes:
    """The largest count is the OR of every plane once spikes stand in the first steps; sums and masks disorder them."""
    spikes, *rest = args
    counts = spikes.counts()
    ordered = torch.stack([(counts > step).to(counts.dtype) for step in range(len(spikes.planes))])
    return _moved(function, (BinarySpikes(ordered, spikes.unit), *rest), kwargs)


def _joined(function: Callable, args: tuple, kwargs: dict) -> BinarySpikes | None:
    """cat and stack of spikes of one unit, plane by plane; steps that some of them lack are silent."""
    parts, *rest = args
    if not all(isinstance(part, BinarySpikes) for part in parts) or len({part.unit for part in parts}) > 1:
        return None
    steps = max(len(part.planes) for part in parts)
    padded = [torch.cat([p.planes, p.planes.new_zeros(steps - len(p.planes), *p.shape)]) for p in parts]
    planes = [function([part[step] for part in padded], *rest, **kwargs) for step in range(steps)]
    return BinarySpikes(torch.stack(planes), parts[0].unit)


def _two(args: tuple, kwargs: dict) -> bool:
    """True if the operands are two maps of spikes and nothing else."""
    return len(args) == 2 and not kwargs and all(isinstance(each, BinarySpikes) for each in args)


def _added(function: Callable, args: tuple, kwargs: dict) -> BinarySpikes | None:
    """The spikes of both, one behind the other (SEW): their virtual steps add up."""
    if not _two(args, kwargs) or args[0].unit != args[1].unit:
        return None
    shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
    planes = [plane.expand(shape) for spikes in args for plane in spikes.planes]
    return BinarySpikes(torch.stack(planes), args[0].unit)


def _multiplied(function: Callable, args: tuple, kwargs: dict) -> BinarySpikes | Tensor | None:
    """By a positive number: spikes worth more or less. By real numbers: these where a spike is, added up over steps.

    By spikes: AND of every step of one with every step of the other, since products of counts need all pairs.
    """
    if kwargs or len(args) != 2:
        return None
    left, right = args
    if not isinstance(left, BinarySpikes):
        left, right = right, left
    if isinstance(right, int | float):
        return BinarySpikes(left.planes, left.unit * right) if right > 0 else None
    if not isinstance(right, BinarySpikes):
        return _product(function, args, kwargs)
    planes = [one * other for one in left.planes for other in right.planes]
    return BinarySpikes(torch.stack(planes), left.unit * right.unit)


def _complement(function: Callable, args: tuple, kwargs: dict) -> BinarySpikes | None:
    """A number minus spikes that cannot exceed it: NOT in every step, and steps that always fire for the rest."""
    if len(args) != 2 or kwargs or not isinstance(args[1], int | float):
        return None
    spikes, most = args[0], args[1] / args[0].unit
    if most % 1 or most < len(spikes.planes):
        return None
    always = spikes.planes.new_ones(int(most) - len(spikes.planes), *spikes.shape)
    return BinarySpikes(torch.cat([1 - spikes.planes, always]), spikes.unit)


def _product(function: Callable, args: tuple, kwargs: dict) -> Tensor:
    """One operand comes spike by spike, any other waits as whole counts; the planes' products are added up."""
    leaves, tree = tree_flatten((args, kwargs))
    # By place, not by identity: in s @ s one side must wait, or cross terms are lost.
    place = next(index for index, leaf in enumerate(leaves) if isinstance(leaf, BinarySpikes))
    waiting = [leaf.counts() if isinstance(leaf, BinarySpikes) else leaf for leaf in leaves]
    total, unit = 0, 1.0
    for plane in leaves[place].planes:
        waiting[place] = plane
        arguments, options = tree_unflatten(waiting, tree)
        total = total + function(*arguments, **options)
    for leaf in leaves:
        unit *= leaf.unit if isinstance(leaf, BinarySpikes) else 1.0
    return total * unit


def _layer(function: Callable, args: tuple, kwargs: dict) -> Tensor:
    """A convolution or linear layer: the bias is added once, not in every virtual step."""
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    args = (*args[:2], None, *args[3:]) if len(args) > 2 else args
    y = _product(function, args, {key: value for key, value in kwargs.items() if key != "bias"})
    if bias is None:
        return y
    space = 0 if function.__name__ == "linear" else int(function.__name__[-2])  # conv2d: two axes behind the channels
    return y + bias.view(-1, *[1] * space)


def _weighted(function: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Softmax attention adds up the values, which may be spikes; a map of spiking q and k is a product unseen."""
    if any(isinstance(each, BinarySpikes) for each in (*args[:2], kwargs.get("query"), kwargs.get("key"))):
        raise ValueError(f"{function.__name__} hides the product of spiking q and k: write softmax(q @ k.mT) @ v")
    return _product(function, args, kwargs)


RULES: dict[str, Callable[[Callable, tuple, dict], Any]] = {
    **dict.fromkeys(MOVES, _moved),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "adaptive_max_pool2d"), _max_pooled),
    "interpolate": _repeated,
    **dict.fromkeys(("cat", "concat", "stack"), _joined),
    **dict.fromkeys(("add", "__add__"), _added),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "multiply"), _multiplied),
    **dict.fromkeys(("rsub", "__rsub__"), _complement),
    **dict.fromkeys(BIASED, _layer),
    **dict.fromkeys(UNBIASED, _product),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), _kept),
    "scaled_dot_product_attention": _weighted,
}
"""Name of a torch function -> what it does to binary spikes; None from a rule (or no rule): real numbers."""


class IFNeuron(Neuron):
    """What an unrolled neuron adds: it emits `BinarySpikes` over D = `levels` virtual steps after the barrier.

    Currents, gain, threshold and the membrane between real steps are those of the class it is mixed into.
    """

    def fire(self, h: Tensor) -> list[Tensor]:
        """Zeros and ones of each virtual step from the charged membrane h, in units of one count."""
        raise TypeError(f"{type(self).__name__} must define fire()")

    def spike(self, h: Tensor) -> Tensor:
        return BinarySpikes(torch.stack(self.fire(h)).detach(), self.unit)

    def counts(self, spikes: Tensor) -> UInt8[Tensor, " TDB *shape"]:
        """Spikes as emitted -> zeros and ones, uint8 [T*D*B, ...]: step d of real step t at (t*D + d)*B + b."""
        planes = spikes.planes.unflatten(1, (self.steps, -1))
        return planes.transpose(0, 1).flatten(0, 2).to(torch.uint8)


class HalfUpIF(IFNeuron, IELIF):
    """IE-LIF unrolled: the membrane starts half a count up, fires from 1 on and loses 1 by each spike."""

    def fire(self, h: Tensor) -> list[Tensor]:
        membrane, fired = h + 0.5, []
        for _ in range(self.levels):
            fired.append((membrane >= 1).to(h.dtype))
            membrane = membrane - fired[-1]  # exact in floating point
        return fired


class HalfEvenIF(IFNeuron, ILIF):
    """I-LIF or NI-LIF unrolled: fires beyond 1/2, loses 1 by each spike; at 1/2 it fires if its count is odd by then.

    So halves go to the even count; it takes one more bit than the membrane.
    """

    def fire(self, h: Tensor) -> list[Tensor]:
        membrane, odd, fired = h, torch.zeros_like(h, dtype=torch.bool), []
        for _ in range(self.levels):
            fires = (membrane > 0.5) | ((membrane == 0.5) & odd)
            fired.append(fires.to(h.dtype))
            membrane, odd = membrane - fired[-1], odd ^ fires
        return fired


class BinaryLIF(IFNeuron, LIF):
    """LIF unrolled: it is binary already, D = 1."""

    def fire(self, h: Tensor) -> list[Tensor]:
        return [LIF.spike(self, h)]


UNROLLED: dict[type[Neuron], type[IFNeuron]] = {
    LIF: BinaryLIF,
    ILIF: HalfEvenIF,
    NILIF: HalfEvenIF,
    IELIF: HalfUpIF,
}
"""Class of a neuron -> what it becomes. For a neuron of your own derive from IFNeuron and it, and add the pair here."""


def unroll(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode that computes with binary spikes over T x D virtual steps; `model` stays.

    Each of its neurons fires D times what the integer one counts once, and each product (convolution, linear layer,
    attention) sees zeros and ones on its spike side. Summed spikes equal the integer model's: from equal inputs where
    weights are integers; end to end in float64, where sums differ by rounding only, and logits within 1e-12. Exact ties
    need exact sums: D a power of two, and no softmax attention (VSA) in front of the neuron.
    Layers that read real numbers still do: `unroll(fuse(model))` has the fewest.
    `sf.record` gives zeros and ones, uint8 [T*D*B, ...] (see `summed`); steps, streams and energy reports are as ever.
    It keeps every weight, low-bit ones as they are, but no gradient passes the spikes.
    Raises ValueError if nothing spikes or a neuron is of an unknown class.
    Source: Spike2Former, Eqs. 19-21.
    """
    unrolled = copy.deepcopy(getattr(model, "_orig_mod", model)).eval()
    neurons = [module for module in unrolled.modules() if isinstance(module, Neuron)]
    if not neurons:
        raise ValueError(f"{type(model).__name__} has no spiking neuron: there is nothing to unroll")
    for neuron in neurons:
        if not isinstance(neuron, IFNeuron):
            neuron.__class__ = _unrolled_class(type(neuron))
    return unrolled


def _unrolled_class(kind: type[Neuron]) -> type[IFNeuron]:
    """What a neuron of class `kind` becomes. Raises ValueError for an unknown one: it may round in its own way."""
    if kind not in UNROLLED:
        known = ", ".join(each.__name__ for each in UNROLLED)
        raise ValueError(f"unroll knows {known}, not {kind.__name__}: add it to UNROLLED in spikeformers.deploy.unroll")
    return UNROLLED[kind]


def summed(spikes: UInt8[Tensor, " TDB *shape"], *, levels: int, steps: int = 1) -> UInt8[Tensor, " TB *shape"]:
    """Recorded spikes of an unrolled neuron, D = `levels` virtual steps in each of T = `steps`, -> counts 0..D.

    Raises ValueError if the first axis is no multiple of T D.
    """
    if spikes.shape[0] % (steps * levels):
        raise ValueError(
            f"first axis {spikes.shape[0]} is not a multiple of steps={steps} x levels={levels}: expected [T*D*B, ...]"
        )
    return spikes.unflatten(0, (steps, levels, -1)).sum(1, dtype=torch.uint8).flatten(0, 1)
