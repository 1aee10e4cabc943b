"""`prepare`: give the layers of any model low-bit weights, in place; `plain` takes them back.

Paper: QSD-Transformer, Sec. 3 ("performed for all weight layers") and Fig. 2 (a): only FC, only Conv, only attention.
Layers change their class and keep their names and weights, so a model has one definition, quantised or not.
"""

import copy
import fnmatch
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from spikeformers.layers import Pretrained, low_bit_layers
from spikeformers.neurons import Door, closest
from spikeformers.quantize.bounds import exact_bits
from spikeformers.quantize.convert import ChannelAffine, PackedLayer, norm_of
from spikeformers.quantize.exact import EXACT_OF, NORMS, ExactDepthwise, FixedPointDoor, FixedPointNorm
from spikeformers.quantize.lsq import LSQ_OF, LSQLayer, integer_range

ROLES = ("attention", "conv", "linear", "first", "last")
Bits = int | Mapping[str, int | None]


def prepare(
    model: nn.Module, *, bits: Bits = 4, per_channel: bool = True, offset: bool = False, exact: bool = False
) -> nn.Module:
    """Quantise the weights of convolutions (1-D, 2-D) and linear layers to 2..8 bits by LSQ, in place; returns `model`.

    `bits`: one number for all layers, or a dict. Its keys are names of layers as shell patterns ("stage3.*.attn.*"),
    "first" and "last" (in the order in which the model defines its layers, unless a module names `last_layers`),
    "attention", "conv", "linear" (the kind: an attention's projections, an MLP's or classifier's layers, every other
    convolution), and "*" (the rest); earlier ones in this order win, and among patterns the first that fits. None keeps
    a layer in float, as does being named by no key, and being of a class derived from torch's (as parametrised ones).
    `per_channel`: a step size for each output channel, else one a layer.  `offset`: a learned one as well (LSQ+).
    `exact`: all else becomes fixed-point numbers too (quantize/exact.py), so that `model.eval()` is exact in float32.
    A model that is quantised already is quantised anew, its step sizes computed again from its float weights.
    Raises ValueError for bits outside 2..8, a key that fits no layer, a model without such layers or whose float
    weights are gone, or one that cannot be exact; nothing is changed then.
    """
    layers = list(quantizable(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer to quantise")
    if any(isinstance(layer, PackedLayer) for _, layer, _ in layers):
        raise ValueError("this model was converted: its float weights are gone; prepare it before `convert`")
    chosen = chosen_bits(layers, bits, last=last_layers(model) or {layers[-1][0]})
    if all(width is None for width in chosen):
        raise ValueError(f"bits={bits!r} leaves every layer in float: name one that has 2 to 8 bits")
    if exact:
        _check_exact(model, layers, chosen, offset=offset)
        trial = copy.deepcopy(model)
        _change(trial, chosen, per_channel=per_channel, offset=offset, exact=True)
        exact_bits(trial, any_weights=True)
    _change(model, chosen, per_channel=per_channel, offset=offset, exact=exact)
    told = {"bits": dict(bits) if isinstance(bits, Mapping) else bits, "per_channel": per_channel, "offset": offset}
    told |= {"exact": True} if exact else {}
    model.quantization = told | {"converted": False, "folded": False, "layers": low_bit_layers(model)}
    return model


def _change(model: nn.Module, chosen: list[int | None], *, per_channel: bool, offset: bool, exact: bool) -> None:
    """Swap the classes of `model`'s layers, of those that have `chosen` bits, and, if `exact`, of norms and doors."""
    for (_, layer, _), width in zip(list(quantizable(model)), chosen, strict=True):
        if isinstance(layer, LSQLayer):
            layer.release()
        if width is not None:
            layer.__class__ = _class_of(layer, exact=exact)
            layer.attach(bits=width, per_channel=per_channel, offset=offset)
    for module in model.modules():
        if isinstance(module, FixedPointNorm):
            module.__class__ = norm_of(module)
        if isinstance(module, FixedPointDoor):
            module.__class__ = Door
        norm = norm_of(module)
        if exact and norm is not None:
            module.__class__, _ = NORMS[norm]
            module.attach()
        if exact and type(module) is Door:
            module.__class__ = FixedPointDoor
    _keep_to_forward(model)
    _forget(model)


def _class_of(layer: nn.Module, *, exact: bool) -> type[LSQLayer]:
    if not exact:
        return LSQ_OF[type(layer)]
    depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1
    return ExactDepthwise if depthwise else EXACT_OF[type(layer)]


def _check_exact(
    model: nn.Module, layers: list[tuple[str, nn.Module, str]], chosen: list[int | None], *, offset: bool
) -> None:
    """Raises ValueError for what training would make no power of two; the rest is for `exact_bits` to find."""
    if offset:
        raise ValueError("exact=True has powers of two for step sizes and no room for an offset: leave offset=True out")
    for (name, _, _), width in zip(layers, chosen, strict=True):
        if width is None:
            raise ValueError(f"exact=True needs few bits in every layer, and {name} stays in float: give it 2 to 8")
    swapped = {layer for _, layer, _ in layers}
    for name, module in model.named_modules():
        own = [] if module in swapped or norm_of(module) else list(module.named_parameters(recurse=False))
        if own:
            raise ValueError(
                f"exact=True cannot keep {name}.{own[0][0]} of {type(module).__name__} a power of two: it is learned; "
                'only networks without such numbers can be (layer_scale=0.0, attention="sdsa3" or "ssa")'
            )


def _keep_to_forward(model: nn.Module) -> None:
    """Bar torch's encoders from the short cut, in eval mode, that reads weights of their linear layers itself.

    It stays barred after `plain`: its sums round otherwise, and predictions are to stay.
    """
    encoders = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
    for encoder in [module for module in model.modules() if isinstance(module, encoders)]:
        if any(isinstance(each, LSQLayer) for each in encoder.modules()):
            encoder.use_nested_tensor = False  # of the stack
            encoder.activation_relu_or_gelu = 0  # of a layer: only these two activations have the short cut


@torch.no_grad()
def plain(model: nn.Module) -> nn.Module:
    """Turn quantised layers back into torch's own, in place, holding the weights that they multiplied by.

    Predictions stay. After `convert` batch norms come back too, as ones with mean 0 and variance 1 - eps; after `fold`
    they do not, so that a model of the catalogue can no longer be saved as one.  Returns `model`.
    Raises ValueError for exact networks, whose norms and images are rounded as no layer of torch's does.
    """
    if any(isinstance(module, FixedPointNorm | FixedPointDoor) for module in model.modules()):
        raise ValueError(
            "an exact network predicts by rounding that torch's own layers do not have: keep it as it is, or, before "
            "`convert`, call prepare(model, exact=False)"
        )
    for module in model.modules():
        if isinstance(module, LSQLayer | PackedLayer | ChannelAffine):
            module.to_plain()
        if isinstance(module, Pretrained) and module.quantization and module.quantization["folded"]:
            module.origin = None
    _forget(model)
    return model


def _forget(model: nn.Module) -> None:
    """Drop what `model` and every module in it say about their quantisation: it would not be what they have."""
    for module in model.modules():
        if getattr(module, "quantization", None):
            module.quantization = None


def quantizable(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, layer and kind ("attention", "conv" or "linear") of everything `prepare` can quantise, in order.

    A layer that stands in several places has the name and kind of the first.
    """
    seen: set[nn.Module] = set()
    for name, layer, kind in _walk(model, "", None):
        if layer not in seen:
            seen.add(layer)
            yield name, layer, kind


def _walk(module: nn.Module, name: str, kind: str | None) -> Iterator[tuple[str, nn.Module, str]]:
    if type(module) in LSQ_OF or isinstance(module, LSQLayer | PackedLayer):
        yield name, module, kind or ("linear" if isinstance(module, nn.Linear) else "conv")
        return
    own = getattr(module, "quantize_role", None) or ("attention" if "Attention" in type(module).__name__ else None)
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, own or kind)


def last_layers(model: nn.Module) -> set[str]:
    """Names of the layers that modules of `model` declare, by `last_layers`, to give the network's results."""
    return {
        f"{name}.{layer}".lstrip(".")
        for name, each in model.named_modules()
        for layer in getattr(each, "last_layers", ())
    }


def chosen_bits(layers: list[tuple[str, nn.Module, str]], bits: Bits, *, last: set[str]) -> list[int | None]:
    """Bits of each layer, of which those named in `last` are the last ones; see `prepare`."""
    if not isinstance(bits, Mapping):
        integer_range(bits)
        return [bits] * len(layers)
    names, kinds = [name for name, _, _ in layers], {kind for _, _, kind in layers}
    for key, width in bits.items():
        if width is not None:
            integer_range(width)
        if key in ("first", "last", "*") or key in kinds:
            continue
        if key in ROLES:
            raise ValueError(f"bits: this model has no {key} layer, only {' and '.join(sorted(kinds))}")
        if not any(fnmatch.fnmatchcase(name, key) for name in names):
            raise ValueError(f"bits: no layer is called {key!r}; {closest(key, (*ROLES, *names))}")
    patterns = [key for key in bits if key not in (*ROLES, "*")]
    found = []
    for index, (name, _, kind) in enumerate(layers):
        keys = [key for key in patterns if fnmatch.fnmatchcase(name, key)]
        keys += ["first"] if index == 0 else []
        keys += ["last"] if name in last else []
        key = next((key for key in (*keys, kind, "*") if key in bits), None)
        found.append(None if key is None else bits[key])
    return found
