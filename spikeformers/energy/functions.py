"""Layers and products that a network makes by calling functions of torch, and whatever else may multiply unseen.

Counted are F.linear, F.conv* and deform_conv2d (a layer each, unless an nn module of that name calls them), products of
matrices in any spelling (@, bmm, addmm, einsum, ...), fused attention (F.scaled_dot_product_attention, the same two
products as spelt out) and nn.MultiheadAttention (its projections are layers).
What else multiplies matrices (recurrent layers, say), and operators of which it is not known whether they multiply
(FFT, bilinear layers, operators of other libraries), is listed by name. What leaves torch (NumPy) goes unseen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from spikeformers.energy.operators import MATRICES, Operators

FUSED, MULTI_HEAD, DEFORMABLE = "scaled_dot_product_attention", "multi_head_attention_forward", "deform_conv2d"
CONVOLUTIONS = tuple(f"conv{way}{n}d" for way in ("", "_transpose") for n in (1, 2, 3))
ADDED = ("addmm", "baddbmm", "addbmm", "addmv")
"""Products whose first operand is only added."""

MATRIX = ("matmul", "mm", "bmm")
PLAIN = (*MATRIX, "mv", "dot", "vdot", "inner", "einsum", "tensordot", "multi_dot", "chain_matmul")
HEARD = frozenset((FUSED, MULTI_HEAD, DEFORMABLE, "linear", *CONVOLUTIONS, *ADDED, *PLAIN))
SPELT = {"rmatmul": "matmul", "imatmul": "matmul", "linalg_matmul": "matmul", "linalg_multi_dot": "multi_dot"}


class Part(NamedTuple):
    """One product of a call. `factors`: what may be spikes, [rows, ...]."""

    label: str
    kind: str  # "conv", "linear" or "product"
    macs: int
    factors: tuple[Tensor, ...]
    rows: int


def parts_of(name: str, args: Sequence, kwargs: dict, result: object, products: int) -> list[Part]:
    """The products of one call of the function `name`, `products` of two numbers in all."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    products //= max(len(getattr(each, "planes", (each,))) for each in tensors)  # spikes one by one (deploy/unroll.py)
    if name == FUSED:
        q, k, v = tensors[:3]
        scores = q.numel() // q.shape[-1] * k.shape[-2]
        first = Part("product", "product", scores * q.shape[-1], (q, k), len(q))
        return [first, Part("product", "product", scores * v.shape[-1], (v,), len(q))]
    if name == MULTI_HEAD:
        return _multi_head(*tensors[:3], made=result[0])
    if name == "linear" or name in CONVOLUTIONS or name == DEFORMABLE:
        kind, x = ("linear" if name == "linear" else "conv"), kwargs.get("input", tensors[0])
        if name == DEFORMABLE:  # what it multiplies are samples between pixels, free as all taps are
            return [Part(kind, kind, result.numel() * tensors[1][0].numel(), (), len(x))]
        return [Part(kind, kind, products, (x,), len(x))]
    if name in MATRIX:
        products = result.numel() * tensors[0].shape[-1]
    rows = len(result) if result.ndim else 1
    return [Part("product", "product", products, tuple(tensors[name in ADDED :]), rows)]


def _multi_head(query: Tensor, key: Tensor, value: Tensor, *, made: Tensor) -> list[Part]:
    """Projections and products of the attention of [L, B, E] to [S, B, ...]; rows are images, as elsewhere."""
    width, tokens, length = made.shape[-1], made.numel() // made.shape[-1], len(key)
    inputs = [each.transpose(0, 1) if made.ndim == 3 else each[None] for each in (query, key, value)]
    rows = len(inputs[0])
    first = [
        Part(f"{letter}_proj", "linear", each.numel() * width, (each,), rows)
        for letter, each in zip("qkv", inputs, strict=True)
    ]
    product = Part("product", "product", tokens * length * width, (), rows)
    return [*first, product, product, Part("out_proj", "linear", tokens * width * width, (), rows)]


class Functions(TorchFunctionMode):
    """Hears functions, while active. `idle()`: whether a rule counts what runs.  `tell(part)`: about every product."""

    def __init__(self, leftovers: "Leftovers", *, idle: Callable[[], bool], tell: Callable[[Part], None]) -> None:
        super().__init__()
        self.leftovers = leftovers
        self.idle = idle
        self.tell = tell

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "").strip("_")
        name = SPELT.get(name, name)
        if name not in HEARD or self.idle():
            return function(*args, **kwargs)
        with self.leftovers.counted(), Operators() as below:
            result = function(*args, **kwargs)
        for part in parts_of(name, args, kwargs, result, below.products):
            self.tell(part)
        return result


class Leftovers(Operators):
    """Operators that ran while nothing counted them. `where()`: the module that runs, None where all is accounted for.

    `found`: (module, operator) -> products of two numbers, 0 for an operator that is not known.
    """

    def __init__(self, where: Callable[[], str | None]) -> None:
        super().__init__()
        self.where = where
        self.found: dict[tuple[str, str], int] = {}
        self.listening = True

    @contextmanager
    def counted(self) -> Iterator[None]:
        """What runs inside is counted elsewhere."""
        before, self.listening = self.listening, False
        try:
            yield
        finally:
            self.listening = before

    def count(self, name: str, out: Tensor, args: Sequence) -> None:
        """As Operators; what multiplies matrices, or may, is written down."""
        before, foreign = self.products, self.foreign
        super().count(name, out, args)
        module = self.where() if self.listening and (name in MATRICES or self.foreign > foreign) else None
        if module is not None:
            self.found[module, name] = self.found.get((module, name), 0) + self.products - before

    def settle(self, module: str, macs: int) -> None:
        """Strike `macs` products of a layer, counted now, and the operators that served them."""
        mine = [key for key in self.found if key[0] == module]
        rest = sum(self.found.pop(key) for key in mine) - macs
        if rest > 0:
            self.found[mine[-1]] = rest
