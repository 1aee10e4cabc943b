"""How many numbers torch multiplies below one of its functions: told by the operators that really run.

Counted are products of two numbers, neither of which is a number written in the code; operators that are known neither
to multiply nor not to are foreign. Divisions are products. Functions of one number (GELU, sqrt, exp) are look-ups.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Count = Callable[[Tensor, Sequence], int]
"""Products of one call, from its (first) result and its arguments."""


def _inner(out: Tensor, args: Sequence) -> int:
    return out.numel() * args[0].shape[-1]


def _added_inner(out: Tensor, args: Sequence) -> int:
    return out.numel() * args[1].shape[-1]


def _convolution(out: Tensor, args: Sequence) -> int:
    x, weight = args[:2]
    return (x if args[6] else out).numel() * weight[0].numel()  # transposed: every input reaches a kernel's worth


def _attention(out: Tensor, args: Sequence) -> int:
    q, k, v = args[:3]
    scores = q.numel() // q.shape[-1] * k.shape[-2]
    return scores * (q.shape[-1] + 1 + v.shape[-1])  # q k^T, the division of softmax, map v


def _grid(taps: dict[int, int]) -> Count:
    return lambda out, args: out.numel() * taps[args[2]]


def _times(taps: int) -> Count:
    return lambda out, args: out.numel() * taps


def _norm(out: Tensor, args: Sequence) -> int:
    return out.numel() * (3 if args[5] else 1)  # of the batch: squares, division, gain; else one scale


def _read(out: Tensor, args: Sequence) -> int:
    return args[0].numel()


def _power(out: Tensor, args: Sequence) -> int:
    exponent = args[1]
    whole = isinstance(exponent, int | float) and exponent == int(exponent) and exponent >= 1
    return out.numel() * (int(exponent) - 1 if whole else 1)


COUNTED: dict[str, Count] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot"), _inner),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _added_inner),
    "convolution": _convolution,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    **dict.fromkeys(("mul", "div", "reciprocal", "square", "lerp", "_softmax"), _times(1)),
    **dict.fromkeys(("addcmul", "addcdiv"), _times(1)),
    "pow": _power,
    **dict.fromkeys(("prod", "cumprod", "linalg_vector_norm", "norm", "var", "var_mean", "std"), _read),
    "native_batch_norm": _norm,
    **dict.fromkeys(("native_layer_norm", "native_group_norm", "_fused_rms_norm"), _times(3)),
    "upsample_linear1d": _times(2),
    "upsample_bilinear2d": _times(4),
    "upsample_bicubic2d": _times(16),
    "upsample_trilinear3d": _times(8),
    "grid_sampler_2d": _grid({0: 4, 1: 0, 2: 16}),
    "grid_sampler_3d": _grid({0: 8, 1: 0}),
}
MATRICES = frozenset(n for n, c in COUNTED.items() if c in (_inner, _added_inner, _convolution, _attention))
"""Operators that multiply matrices: what layers and attentions are made of."""

BY_NUMBERS = ("mul", "div", "mean", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
"""Operators that multiply by a number where they have no second tensor."""

FREE = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "permute", "transpose", "t", "squeeze"),
        *("unsqueeze", "slice", "select", "split", "split_with_sizes", "unbind", "chunk", "narrow", "as_strided"),
        *("alias", "detach", "clone", "copy", "_to_copy", "contiguous", "cat", "stack", "repeat", "roll", "flip"),
        *(
            "unsafe_split",
            "unsafe_chunk",
            "index",
            "index_select",
            "index_put",
            "index_add",
            "gather",
            "scatter",
            "scatter_add",
            "masked_fill",
        ),
        *("masked_select", "where", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d"),
        *("replication_pad1d", "replication_pad2d", "im2col", "col2im", "unfold", "pixel_shuffle"),
        *(
            "pixel_unshuffle",
            "channel_shuffle",
            "tril",
            "triu",
            "diagonal",
            "embedding",
            "take",
            "view_as_real",
            "view_as_complex",
            "slice_scatter",
        ),
        *("select_scatter", "lift_fresh", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
        "_upsample_nearest_exact2d",
        *("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "ones", "ones_like", "full"),
        *("full_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "arange"),
        *("linspace", "eye", "fill", "zero", "scalar_tensor", "rand", "rand_like", "randn", "randn_like"),
        *("randint", "randperm", "bernoulli", "uniform", "normal", "native_dropout", "dropout"),
        *("add", "sub", "rsub", "neg", "abs", "sum", "nansum", "cumsum", "amax", "amin", "max", "min", "aminmax"),
        *("argmax", "argmin", "maximum", "minimum", "clamp", "clamp_min", "clamp_max", "relu", "hardtanh"),
        *("threshold", "leaky_relu", "round", "floor", "ceil", "trunc", "frac", "sign", "sgn", "eq", "ne", "lt"),
        *("le", "gt", "ge", "logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_and"),
        *(
            "bitwise_or",
            "bitwise_not",
            "bitwise_xor",
            "__and__",
            "__or__",
            "__xor__",
            "isnan",
            "isinf",
            "isfinite",
            "isin",
            "all",
            "any",
            "sort",
        ),
        *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
        *("topk", "nonzero", "count_nonzero", "searchsorted", "bucketize", "max_pool2d_with_indices"),
        *("max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d", "heaviside", "equal", "item"),
        *("nms", "_local_scalar_dense"),
        *("sigmoid", "log_sigmoid_forward", "tanh", "gelu", "silu", "mish", "elu", "celu", "selu", "softplus"),
        *("softshrink", "hardshrink", "hardsigmoid", "hardswish", "_prelu_kernel", "exp", "exp2", "expm1", "log"),
        *("log2", "log10", "log1p", "sqrt", "rsqrt", "erf", "erfc", "erfinv", "sin", "cos", "atan", "atan2"),
        *("logit", "_log_softmax", "logsumexp"),
    )
)
"""Operators that move, make, add, compare or look up."""


PLACES = ("mul", "div", "floor_divide", "remainder", "fmod", "pow", "prod", "cumprod", "bitwise_left_shift")
"""Operators that make places in tensors where they make whole numbers."""


class Operators(TorchDispatchMode):
    """Counts while active. `products`: of two tensors.  `by_numbers`: of a tensor and a number.

    `foreign`: elements that operators made of which it is not known whether they multiply.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = self.by_numbers = self.foreign = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, list | tuple) and result else result
        name = func._schema.name.split("::")[1].removesuffix("_")
        real = isinstance(first, Tensor) and (first.is_floating_point() or first.is_complex())
        if real or (isinstance(first, Tensor) and name not in PLACES):
            self.count(name, first, args)
        return result

    def count(self, name: str, out: Tensor, args: Sequence) -> None:
        """Take in one operator."""
        if name in BY_NUMBERS and not (len(args) > 1 and isinstance(args[1], Tensor)):
            self.by_numbers += out.numel()
        elif name in COUNTED:
            self.products += COUNTED[name](out, args)
        elif name == "roi_align" and args[5] > 0:
            self.products += out.numel() * 4 * args[5] ** 2
        elif name == "deform_conv2d":
            taps = math.prod(args[1].shape[2:]) * out[:, 0].numel() * args[0].shape[1]
            self.products += out.numel() * args[1][0].numel() + 4 * taps
        elif name not in FREE:
            self.foreign += out.numel()
