"""Computing on visible positions only: any network of convolutions becomes a sparse one while a mask is laid over it.

Paper: Spikformer V2, Sec. 4.2 and Fig. 6 (sparse convolution and sparse batch norm, after MC-MAE and SparK). A sparse
convolution is the dense one with its output masked; a sparse batch norm takes its statistics over visible positions.
Hooks do it, for as long as the context lasts: the layers stay the dense ones, with their weights, names and statistics.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor, nn

SPATIAL = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
UNKNOWN = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d, nn.BatchNorm1d, nn.BatchNorm3d, nn.LocalResponseNorm)


class Visible:
    """Which cells of a grid [B, h, w] are seen, at any resolution that is a multiple of the grid.

    Maps [T*B, C, H, W] are time-major, as everywhere: every step sees the same cells.
    """

    def __init__(self, grid: Bool[Tensor, "B h w"]) -> None:
        self.grid = grid
        self._fitted: dict[tuple[int, ...], Tensor] = {}
        self._places: dict[tuple[int, ...], Tensor] = {}

    def at(self, x: Tensor) -> Bool[Tensor, "TB H W"]:
        """The mask of a map `x` [T*B, C, H, W]. Raises ValueError if the map is no multiple of the grid."""
        rows, _, height, width = x.shape
        batch, h, w = self.grid.shape
        if rows % batch or height % h or width % w or height // h != width // w:
            raise ValueError(
                f"a mask of {batch} x {h} x {w} cells does not fit a map of shape {tuple(x.shape)}: images must be a "
                "whole number of patches on both sides"
            )
        if (rows, height, width) not in self._fitted:
            scale = height // h
            fitted = self.grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            self._fitted[rows, height, width] = fitted.repeat(rows // batch, 1, 1)
        return self._fitted[rows, height, width]

    def places(self, x: Tensor) -> Int64[Tensor, " V"]:
        """Indices of the visible positions among all T*B*H*W of a map `x`."""
        rows, _, height, width = x.shape
        if (rows, height, width) not in self._places:
            self._places[rows, height, width] = self.at(x).flatten().nonzero().flatten()
        return self._places[rows, height, width]

    def cover(self, x: Shaped[Tensor, "TB C H W"]) -> Shaped[Tensor, "TB C H W"]:
        """`x` [T*B, C, H, W] with zeros at hidden positions, whatever stood there."""
        return x.masked_fill(~self.at(x).unsqueeze(1), 0)

    def gather(self, x: Shaped[Tensor, "TB C H W"]) -> Shaped[Tensor, "V C 1 1"]:
        """The visible positions of `x` [T*B, C, H, W] as a batch of single pixels [V, C, 1, 1]."""
        # Whole rows by index: a boolean mask's backward adds element by element.
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
        return rows.index_select(0, self.places(x))[:, :, None, None]

    def scatter(
        self, pixels: Shaped[Tensor, "V C 1 1"], like: Shaped[Tensor, "TB C H W"]
    ) -> Shaped[Tensor, "TB C H W"]:
        """Back from `gather`, with zeros at hidden positions, in the shape of `like`."""
        rows, channels, height, width = like.shape
        canvas = pixels.new_zeros(rows * height * width, channels)
        canvas = canvas.index_copy(0, self.places(like), pixels.flatten(1))
        x = canvas.view(rows, height, width, channels).permute(0, 3, 1, 2)
        return x.contiguous() if like.is_contiguous() else x


def _keep_visible(visible: Visible, whole: dict[nn.Module, Tensor], norm: nn.Module, args: tuple) -> tuple:
    """Before a batch norm: it gets the visible pixels; what it was given waits in `whole`."""
    whole[norm] = args[0]
    return (visible.gather(args[0]),)


def _put_back(visible: Visible, whole: dict[nn.Module, Tensor], norm: nn.Module, _, out: Tensor) -> Tensor:
    """After it: the map again."""
    return visible.scatter(out, whole.pop(norm))


@contextmanager
def masked(module: nn.Module, visible: Visible) -> Iterator[None]:
    """Inside, the convolutions, batch norms and pools of `module` compute as if hidden positions did not exist.

    Their outputs are zero there, and so are those of what lies between (a neuron without input must stay silent), so
    nothing reaches a visible position from a hidden one. A max-pool takes hidden cells as 0, the smallest count of
    spikes. The input of `module` is the caller's to cover.  With every cell visible nothing changes.
    Raises ValueError for a norm that would mix positions, or if `module` is masked already.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, UNKNOWN):
            raise ValueError(f"{name} is a {type(layer).__name__}, which cannot be masked: use nn.BatchNorm2d")
        if _keep_visible in (getattr(hook, "func", None) for hook in layer._forward_pre_hooks.values()):
            raise ValueError(f"{name} is under a mask already: leave that context first")
    whole: dict[nn.Module, Tensor] = {}
    keep_visible, put_back = partial(_keep_visible, visible, whole), partial(_put_back, visible, whole)
    handles = []
    for layer in module.modules():
        if isinstance(layer, SPATIAL):
            handles.append(layer.register_forward_hook(lambda _, __, out: visible.cover(out)))
        elif isinstance(layer, nn.BatchNorm2d):
            handles.append(layer.register_forward_pre_hook(keep_visible))
            handles.append(layer.register_forward_hook(put_back))
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled graph would not hear the hooks
            yield
    finally:
        for handle in handles:
            handle.remove()
