"""Layers and functions as nodes of the neuromorphic intermediate representation; deploy/nir.py has the map."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from spikeformers.neurons import IELIF, ILIF, LIF, NILIF, Neuron

Shape = tuple[int, ...]
"""Of one image at one step: [C, H, W] or [C]."""

RESHAPES = ("view", "reshape", "flatten", "squeeze")
PRODUCT = "NIR has no product of two signals"
REASONS = dict.fromkeys(("matmul", "rmatmul", "bmm", "einsum", "scaled_dot_product_attention"), PRODUCT)
MOVES = (*RESHAPES, "unsqueeze", "unflatten", "permute", "transpose", "get", "getitem", "chunk", "split")
REASONS |= dict.fromkeys(MOVES, "NIR moves no elements, it only flattens a whole map")
REASONS["TimeMean"] = "NIR has no mean over time: average what the last part gives over the steps"


class InexpressibleError(Exception):
    """NIR has no words for a layer or function; says why."""


@dataclass(frozen=True)
class Piece:
    """NIR nodes of one layer: what it reads goes to each of `first`, what it gives comes from `last`."""

    nodes: dict[str, Any]
    first: tuple[str, ...]
    last: str
    edges: tuple[tuple[str, str], ...] = ()
    binary: bool = False  # gives zeros and ones

    @classmethod
    def chain(cls, nodes: dict[str, Any], *, binary: bool = False) -> "Piece":
        """Nodes in a row."""
        names = tuple(nodes)
        return cls(nodes, names[:1], names[-1], tuple(pairwise(names)), binary)


@dataclass(frozen=True, eq=False)
class Step:
    """A layer or function of one forward pass, and the tensor [T*B, *shape] that it gave.

    With neither piece nor reason it is the sum of its operands or, if it has none, the image.  `level`: the most
    inexpressible steps on a way here, so that the steps of one level can run together with none of those between.
    """

    place: str
    module: str
    what: str
    shape: Shape
    operands: tuple["Step", ...] = ()
    piece: Piece | None = None
    reason: str = ""
    level: int = 0

    @property
    def expressible(self) -> bool:
        return self.piece is not None or (bool(self.operands) and not self.reason)

    def summands(self) -> frozenset["Step"]:
        """The steps that add up to this one."""
        if self.piece is None and self.expressible:
            return frozenset().union(*(each.summands() for each in self.operands))
        return frozenset({self})


def _full(value: float | Tensor, shape: Shape, dtype: torch.dtype) -> Any:
    """One number, or one for each element, as an array of `shape`."""
    return torch.as_tensor(value, dtype=dtype).expand(shape).contiguous().numpy()


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


def _below(value: Tensor) -> Tensor:
    """The largest float below: NIR fires strictly above its thresholds, we fire at ours."""
    return torch.nextafter(value, torch.full_like(value, -torch.inf))


def _lif(neuron: LIF, name: str, _, shape: Shape, dtype: torch.dtype) -> Piece:
    import nir

    if neuron.v_reset is None:
        raise InexpressibleError(
            "NIR's neurons reset to a fixed potential, this one subtracts its threshold (soft reset)"
        )
    threshold = _below(torch.as_tensor(neuron.threshold, dtype=dtype).detach())
    node = nir.LIF(
        tau=_full(neuron.tau, shape, dtype),
        r=_full(1.0 if neuron.decay_input else neuron.tau, shape, dtype),
        v_leak=_full(neuron.v_reset, shape, dtype),
        v_threshold=_full(threshold, shape, dtype),
        v_reset=_full(neuron.v_reset, shape, dtype),
    )
    return Piece.chain({name: node}, binary=True)


def _integer(neuron: ILIF | NILIF | IELIF, name: str, _, shape: Shape, dtype: torch.dtype) -> Piece:
    import nir

    if neuron.carries:
        raise InexpressibleError(
            "NIR's neurons reset to a fixed potential, this one's membrane keeps what its spikes leave"
        )
    thresholds = {
        f"{name}.{level}": nir.Threshold(_full(_below(_least_current(neuron, level, dtype)), shape, dtype))
        for level in range(1, neuron.levels + 1)
    }
    if neuron.levels == 1 and neuron.unit == 1:
        return Piece.chain({name: thresholds[f"{name}.1"]}, binary=True)
    edges = tuple((threshold, name) for threshold in thresholds)
    nodes = thresholds | {name: nir.Scale(_full(neuron.unit, shape, dtype))}
    return Piece(nodes, tuple(thresholds), name, edges)


def _least_current(neuron: Neuron, level: int, dtype: torch.dtype) -> Tensor:
    """The smallest float for which the neuron counts to `level`, found among the neighbours of where that should be."""
    threshold = torch.atleast_1d(torch.as_tensor(neuron.threshold, dtype=dtype).detach())
    if not bool((threshold > 0).all()):
        raise InexpressibleError(f"its threshold is not positive: {threshold.min().item():g}")
    current = (level - 0.5) * threshold / getattr(neuron, "gain", 1.0)
    infinity = torch.full_like(current, torch.inf)

    def reached(x: Tensor) -> Tensor:
        return neuron.counts(neuron.spike(neuron.charge(x, None))) >= level

    while bool((low := reached(current)).any()):
        current = torch.where(low, torch.nextafter(current, -infinity), current)
    while not bool((high := reached(current)).all()):
        current = torch.where(high, current, torch.nextafter(current, infinity))
    return current


def _other_neuron(neuron: Neuron, *_) -> Piece:
    raise InexpressibleError(f"the equations of {type(neuron).__name__} are not known to be those of a NIR neuron")


def _conv(conv: nn.Conv2d, name: str, sources: list[Step], _, __) -> Piece:
    import nir

    if conv.padding_mode != "zeros":
        raise InexpressibleError(f"NIR pads with zeros, not by {conv.padding_mode!r}")
    if len(set(conv.kernel_size)) > 1:
        raise InexpressibleError(f"nir 1.0 takes every kernel as square, this one is {conv.kernel_size}")
    weight = conv.weight.detach()
    if conv.groups > 1:
        dense = weight.new_zeros(len(weight), conv.in_channels, *conv.kernel_size)
        inputs = dense.chunk(conv.groups, 1)
        for group, (block, own) in enumerate(zip(inputs, weight.chunk(conv.groups), strict=True)):
            block.chunk(conv.groups)[group].copy_(own)
        weight = dense
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias
    size = sources[0].shape[1:]
    node = nir.Conv2d(size, _array(weight), conv.stride, conv.padding, conv.dilation, 1, _array(bias))
    return Piece.chain({name: node})


def _linear(linear: nn.Linear, name: str, _, shape: Shape, __) -> Piece:
    import nir

    if len(shape) != 1:
        raise InexpressibleError(f"NIR's linear nodes take one axis, this layer gives {list(shape)}")
    weight = _array(linear.weight)
    node = nir.Linear(weight) if linear.bias is None else nir.Affine(weight, _array(linear.bias))
    return Piece.chain({name: node})


def _pair(value: int | tuple[int, ...]) -> Any:
    return torch.tensor(value).expand(2).contiguous().numpy()


def _avg_pool(pool: nn.AvgPool2d, name: str, *_) -> Piece:
    import nir

    if pool.ceil_mode or pool.divisor_override or (any(_pair(pool.padding)) and not pool.count_include_pad):
        raise InexpressibleError("NIR's averages divide by the whole window everywhere, padding included")
    return Piece.chain({name: nir.AvgPool2d(*(_pair(x) for x in (pool.kernel_size, pool.stride, pool.padding)))})


def _max_pool(pool: nn.MaxPool2d, name: str, sources: list[Step], shape: Shape, dtype: torch.dtype) -> Piece:
    import nir

    if not _is_binary(sources[0]):
        raise InexpressibleError(
            "NIR has no maximum; only for zeros and ones, from one binary neuron, is it a threshold"
        )
    if pool.ceil_mode or pool.return_indices or any(_pair(pool.dilation) != 1):
        raise InexpressibleError("NIR's pools have no dilation, no indices and no partial windows at the end")
    pooled = nir.SumPool2d(*(_pair(x) for x in (pool.kernel_size, pool.stride, pool.padding)))
    return Piece.chain({f"{name}.sum": pooled, name: nir.Threshold(_full(0.5, shape, dtype))}, binary=True)


def _sum(fixed: list, kwargs: dict, _, sources: list[Step], shape: Shape, __) -> None:
    if kwargs or any(not isinstance(each, int | float) or each for each in fixed):
        raise InexpressibleError("NIR adds signals, no constants")
    if any(each.shape != shape for each in sources):
        raise InexpressibleError(
            f"NIR adds signals of one shape, not {' and '.join(str(list(s.shape)) for s in sources)}"
        )
    terms = [each.summands() for each in sources]
    if len(frozenset().union(*terms)) < sum(map(len, terms)):
        raise InexpressibleError("NIR's edges cannot add a signal to itself")


def _scaled(
    fixed: list, kwargs: dict, name: str, sources: list[Step], shape: Shape, dtype: torch.dtype, *, divide: bool = False
) -> Piece:
    import nir

    if len(sources) > 1 and not divide:
        return _both(name, sources, shape, dtype)
    if kwargs or len(fixed) != 1:
        raise InexpressibleError(PRODUCT)
    factor = torch.as_tensor(fixed[0], dtype=dtype).detach()
    if factor.ndim > len(shape) and len(factor) == 1:
        factor = factor.squeeze(0)
    if sources[0].shape != shape or factor.ndim > len(shape):
        raise InexpressibleError("NIR scales each element of a map by one number, the same for every image")
    return Piece.chain({name: nir.Scale(_full(1 / factor if divide else factor, shape, dtype))})


def _both(name: str, sources: list[Step], shape: Shape, dtype: torch.dtype) -> Piece:
    """The product of zeros and ones: where both are one their sum is above 3/2."""
    import nir

    if not all(_is_binary(each) and each.shape == shape for each in sources) or sources[0] is sources[1]:
        raise InexpressibleError(PRODUCT)
    return Piece.chain({name: nir.Threshold(_full(1.5, shape, dtype))}, binary=True)


def _not(fixed: list, kwargs: dict, name: str, sources: list[Step], shape: Shape, dtype: torch.dtype) -> Piece:
    """1 - x of zeros and ones: -x is above -1/2 where x is zero."""
    import nir

    if kwargs or fixed != [1] or not _is_binary(sources[0]):
        raise InexpressibleError("NIR adds no constants; only 1 - x of zeros and ones is a threshold")
    negative, above = nir.Scale(_full(-1, shape, dtype)), nir.Threshold(_full(-0.5, shape, dtype))
    return Piece.chain({f"{name}.negative": negative, name: above}, binary=True)


def _is_binary(step: Step) -> bool:
    return step.piece is not None and step.piece.binary


def _mean(fixed: list, kwargs: dict, name: str, sources: list[Step], shape: Shape, _) -> Piece:
    import nir

    given = dict(zip(("dim", "keepdim"), fixed, strict=False)) | kwargs
    dims, (channels, *pixels) = given.pop("dim", None), sources[0].shape
    keep = given.pop("keepdim", False)
    if given or len(pixels) != 2 or not isinstance(dims, tuple | list) or {d % 4 for d in dims} != {2, 3}:
        raise InexpressibleError("NIR averages over pixels, over nothing else")
    size = _pair(tuple(pixels))
    pool = nir.AvgPool2d(size, size, _pair(0))
    return Piece.chain({name: pool} if keep else {f"{name}.pool": pool, name: _flatten((channels, 1, 1))})


def _flattened(fixed: list, kwargs: dict, name: str, sources: list[Step], shape: Shape, _) -> Piece:
    if len(shape) != 1 or shape[0] != prod(sources[0].shape):
        raise InexpressibleError(REASONS["flatten"])
    return Piece.chain({name: _flatten(sources[0].shape)})


def _flatten(shape: Shape) -> Any:
    import nir

    return nir.Flatten({"input": torch.tensor(shape).numpy()}, start_dim=0)


LAYERS: dict[type[nn.Module], Callable[..., Piece]] = {
    LIF: _lif,
    ILIF: _integer,
    NILIF: _integer,
    IELIF: _integer,
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.AvgPool2d: _avg_pool,
    nn.MaxPool2d: _max_pool,
}
"""Called as `build(module, name, operands, shape, dtype)`."""

COMMUTING = ("add", "radd", "iadd", "mul", "rmul", "imul", "multiply")
FUNCTIONS: dict[str, Callable[..., Piece | None]] = {
    **dict.fromkeys(("add", "radd", "iadd"), _sum),
    **dict.fromkeys(("mul", "rmul", "imul", "multiply"), _scaled),
    **dict.fromkeys(("div", "truediv", "itruediv", "divide"), partial(_scaled, divide=True)),
    **dict.fromkeys(RESHAPES, _flattened),
    "rsub": _not,
    "mean": _mean,
}
"""Called as `build(fixed arguments, keyword arguments, name, operands, shape, dtype)`; None: a sum."""


def builder_of(module: nn.Module) -> Callable[..., Piece | None] | None:
    """What makes the nodes of a layer, None if it is none that NIR knows."""
    if isinstance(module, Neuron):
        return LAYERS.get(type(module), _other_neuron)
    known = ((kind, build) for kind, build in LAYERS.items() if isinstance(module, kind))
    return next((build for kind, build in known if type(module).forward is kind.forward), None)
