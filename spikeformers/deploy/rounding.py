"""What rounds in an exact network: norms, and what a depthwise convolution hands on (quantize/exact.py)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spikeformers.quantize import FixedPointNorm


class Rounding(nn.Module):
    """clamp(round(x scale) + shift, -most, most) x grid, per channel: [TB, C, H, W] -> the same shape.

    Buffers `scale`, `shift`: float32 [C], in units of `grid`. Every number and so every result is exact in float32.
    """

    def __init__(self, channels: int, *, grid: float, limit: float) -> None:
        super().__init__()
        self.grid, self.limit = grid, limit
        self.register_buffer("scale", torch.full((channels,), 1 / grid))
        self.register_buffer("shift", torch.zeros(channels))

    @classmethod
    def of(cls, norm: FixedPointNorm) -> "Rounding":
        """The same as `norm` in eval mode."""
        made = cls(norm.num_features, grid=norm.grid, limit=norm.limit)
        made.scale.copy_(norm.scale() / norm.grid)
        made.shift.copy_(norm.shift() / norm.grid)
        return made

    def forward(self, x: Float[Tensor, "TB C H W"]) -> Float[Tensor, "TB C H W"]:
        most = self.limit / self.grid
        y = (x * self.scale.view(-1, 1, 1)).round_().add_(self.shift.view(-1, 1, 1))
        return y.clamp_(-most, most).mul_(self.grid)

    def of_zero(self) -> Float[Tensor, " C"]:
        """What each channel makes of a zero."""
        return (self.shift * self.grid).clamp(-self.limit, self.limit)

    def describe(self) -> dict:
        """Plain values that build an empty one of these sizes."""
        return {"channels": len(self.scale), "grid": self.grid, "limit": self.limit}
