"""The information argument: how much the attention scores of an SNN say, and how much of it those of its ANN explain.

Paper: QSD-Transformer, Sec. 4.1-4.2. Definition 1 and Eqs. 7-8, I(S; A) = H(S) - H(S|A) of scores S of the SNN and A of
the ANN (`compare`): IE-LIF and MPRF are to raise H(S), distillation is to lower H(S|A). Eq. 11, the entropy of IE-LIF
spikes of a normal membrane (`count_entropy`). Propositions 1 and 2 are tests.
Departures from the paper: it plots scores but measures no entropy, so the estimator is ours. Both scores are divided
into equally wide bins after each is standardised: among variables of one variance the normal has the greatest entropy
(Proposition 2), so H says how near a histogram comes to it, whatever a spike is worth; quantile bins would make every
continuous variable uniform and H a constant. Scores Q K^T are what Definition 1 is about, though linear attention
multiplies K^T V first and never forms them. Proposition 1 needs products that are independent over channels and steps:
those of a network are not, and a neuron without memory repeats one image's scores at every step.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from spikeformers.attention import SpikeAttention
from spikeformers.distill.teachers import hear
from spikeformers.energy.firing import plain_name

BINS = 32
REACH = 4.0  # standard deviations that the bins span to each side of the mean
SAMPLES = 65536  # scores of a layer


@dataclass(frozen=True)
class Information:
    """Scores of one layer in bits, or the mean over layers; see `compare`.

    `entropy`: H(S) of the SNN's.  `ann_entropy`: H(A).  `entropy_given_ann`: H(S|A).  `mutual_information`: I(S; A).
    `bias`: what so many independent scores would show as I all the same, see `mutual_information`.
    `counts`, `ann_counts`: scores in each bin, `edges` in standard deviations from the mean of each network.
    The mean over layers averages the entropies and sums the histograms.
    """

    entropy: float
    ann_entropy: float
    entropy_given_ann: float
    mutual_information: float
    bias: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    ann_counts: tuple[int, ...]


def count_entropy(mean: float, std: float, *, levels: int = 4) -> float:
    """Bits in the IE-LIF count of a membrane N(mean, std^2), D = `levels`: exact, from the normal's cells.

    Counts n = floor(clip(D x, 0, D) + 1/2), so that the cells divide [0, 1], as those of `neurons.IELIF` do.  Centred
    at 0 half of all membranes give count 0; MPRF moves the centre into [0, 1].  At most log2(D + 1); nearly 0 for a
    membrane narrower than the cell it is centred in.
    Raises ValueError unless std > 0 and levels >= 1.  Source: QSD-Transformer, Eq. 11.
    """
    if std <= 0:
        raise ValueError(f"std must be positive, got {std}")
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    thresholds = (torch.arange(1, levels + 1, dtype=torch.float64) - 0.5) / levels
    below = torch.special.ndtr((thresholds - mean) / std)
    cells = torch.diff(below, prepend=below.new_zeros(1), append=below.new_ones(1))
    return torch.special.entr(cells).sum().item() / math.log(2)


def standardise(x: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
    """(x - mean) / standard deviation in float64; a constant becomes 0."""
    x = x.double()
    if x.min() == x.max():  # rounding of the mean would give it a deviation
        return torch.zeros_like(x)
    return (x - x.mean()) / x.std(correction=0)


def standard_edges(bins: int = BINS) -> Float[Tensor, " E"]:
    """Edges of `bins` equally wide bins over 4 standard deviations to each side. Raises ValueError if bins < 2."""
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
    return torch.linspace(-REACH, REACH, bins + 1, dtype=torch.float64)


def entropy(x: Float[Tensor, " *shape"], *, edges: Float[Tensor, " E"]) -> float:
    """H of the bin that x falls into, in bits; what lies outside the edges counts in the outermost bins.

    The plug-in estimate, as everywhere in this file: see `mutual_information`.
    """
    return _bits(torch.bincount(_cells(x, edges).flatten()))


def conditional_entropy(x: Float[Tensor, " S"], y: Float[Tensor, " S"], *, bins: int = BINS) -> float:
    """H(X|Y) = H(X, Y) - H(Y) in bits, from the joint histogram of the standardised variables."""
    joint = _joint(x, y, bins=bins)
    return _bits(joint) - _bits(joint.sum(0))


def mutual_information(x: Float[Tensor, " S"], y: Float[Tensor, " S"], *, bins: int = BINS) -> float:
    """I(X; Y) = H(X) - H(X|Y) in bits, from the joint histogram of the standardised variables.

    The plug-in estimate, without Miller and Madow's correction: it is never negative, never above H, and the identity
    holds to the last bit.  Its bias is upwards: with a and b bins in use, n independent pairs are expected to show
    (a - 1)(b - 1) / (2 n ln 2) bits, twice that at most (0.011 for 65536 pairs, 32 bins).  Scores of one image depend
    on each other, so chance shows more than that where images are few.
    Raises ValueError if there is not one y for each x.
    """
    joint = _joint(x, y, bins=bins)
    return _bits(joint.sum(1)) - (_bits(joint) - _bits(joint.sum(0)))


def attention_scores(model: nn.Module, images: Tensor, *, samples: int = SAMPLES) -> dict[str, Float[Tensor, " S"]]:
    """Attention scores q_n . k_m of every attention of `model` by name, before any scale, shallow to deep.

    images: one batch [B, C, H, W] or [T, B, C, H, W].  The products are those of spikes as their neurons emit them, or
    of what stands in the neurons' place; the mean over T of Q_t K_t^T.  All B M N N of a layer in this order, or
    `samples` of them drawn with replacement, the same positions in every network of B images, M heads and N tokens.
    The model runs in eval mode without gradients and comes back as it was.
    Raises ValueError for no images or samples, and for a model without attention, with one that multiplies no queries
    with keys (SDSA-1, SDSA-2), or whose queries and keys are not finite.
    """
    return {name: _scores(*operands, samples=samples) for name, operands in _operands(model, images).items()}


def compare(
    snn: nn.Module, ann: nn.Module, images: Tensor, *, bins: int = BINS, samples: int = SAMPLES
) -> dict[str, Information]:
    """H(S), H(S|A) and I(S; A) of the attention scores of `snn` and `ann` by layer of the SNN, and of their "mean".

    Pairs are the scores of one image, head, query and key, see `attention_scores`; layers pair in order of depth.
    Raises ValueError, besides, for networks that differ in number of layers, heads or tokens.
    """
    spiking, dense = _operands(snn, images), _operands(ann, images)
    if len(spiking) != len(dense):
        raise ValueError(f"the networks have {len(spiking)} and {len(dense)} attentions: compare twins of one depth")
    layers = {}
    for (name, pair), (ann_name, ann_pair) in zip(spiking.items(), dense.items(), strict=True):
        sizes, ann_sizes = _sizes(*pair), _sizes(*ann_pair)
        if sizes != ann_sizes:
            raise ValueError(
                f"scores [B, M, N, N] of {name} are {list(sizes)}, those of the ANN's {ann_name} {list(ann_sizes)}: "
                "compare twins with the same heads and tokens"
            )
        layers[name] = _information(_scores(*pair, samples=samples), _scores(*ann_pair, samples=samples), bins=bins)
    return layers | {"mean": _mean(list(layers.values()))}


def plot(rows: dict[str, Information], path: str | Path) -> Path:
    """Histogram of the SNN's scores beside the ANN's, a panel for each row, as the image file `path`.

    rows: say the "mean" of `compare` for baseline, +IE-LIF, +MPRF and +FGD; or all that `compare` gives, for the layers
    of one network.  Raises ValueError if there are none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("there is no row to plot: give the result of compare, or some of its entries by name")
    columns = min(4, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(3.2 * columns + 0.4, 2.8 * lines + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (name, row) in enumerate(rows.items()):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.stairs(_density(row.counts, row.edges), row.edges, fill=True, alpha=0.5, label="SNN")
        axes.stairs(_density(row.ann_counts, row.edges), row.edges, color="black", label="ANN")
        axes.set_title(
            f"{name}\nH {row.entropy:.2f}, H(.|ANN) {row.entropy_given_ann:.2f}, I {row.mutual_information:.2f} bits",
            fontsize=9,
        )
        axes.set_xlabel("score, in standard deviations", fontsize=8)
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
        if index == 0:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
    return Path(path)


def _density(counts: tuple[int, ...], edges: tuple[float, ...]) -> list[float]:
    """Histogram of area 1."""
    return [count / (sum(counts) * (edges[1] - edges[0])) for count in counts]


def _cells(x: Tensor, edges: Tensor) -> Int64[Tensor, " *shape"]:
    """Index of the bin edges[i] <= x < edges[i + 1], the outermost ones without end."""
    return torch.bucketize(x, edges[1:-1].to(x), right=True)


def _joint(x: Tensor, y: Tensor, *, bins: int) -> Int64[Tensor, "bins bins"]:
    """How many pairs fall into each bin of x (rows) and y (columns), both standardised."""
    if x.shape != y.shape:
        raise ValueError(f"x and y must be pairs, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    edges = standard_edges(bins)
    cells = _cells(standardise(x), edges) * bins + _cells(standardise(y), edges)
    return torch.bincount(cells.flatten(), minlength=bins * bins).view(bins, bins)


def _bits(counts: Tensor) -> float:
    """Entropy of the frequencies, in bits."""
    return torch.special.entr(counts.double() / counts.sum()).sum().item() / math.log(2)


def _information(snn: Tensor, ann: Tensor, *, bins: int) -> Information:
    """`Information` of paired scores."""
    joint = _joint(snn, ann, bins=bins)
    counts, ann_counts = joint.sum(1), joint.sum(0)
    total, ann_total = _bits(counts), _bits(ann_counts)
    given = _bits(joint) - ann_total
    freedom = ((counts > 0).sum().item() - 1) * ((ann_counts > 0).sum().item() - 1)
    return Information(
        entropy=total,
        ann_entropy=ann_total,
        entropy_given_ann=given,
        mutual_information=total - given,
        bias=freedom / (2 * len(snn) * math.log(2)),
        edges=tuple(standard_edges(bins).tolist()),
        counts=tuple(counts.tolist()),
        ann_counts=tuple(ann_counts.tolist()),
    )


def _mean(layers: list[Information]) -> Information:
    """Means of the entropies, sums of the histograms."""

    def mean(values: Iterable[float]) -> float:
        return math.fsum(values) / len(layers)

    return Information(
        entropy=mean(layer.entropy for layer in layers),
        ann_entropy=mean(layer.ann_entropy for layer in layers),
        entropy_given_ann=mean(layer.entropy_given_ann for layer in layers),
        mutual_information=mean(layer.mutual_information for layer in layers),
        bias=mean(layer.bias for layer in layers),
        edges=layers[0].edges,
        counts=tuple(map(sum, zip(*(layer.counts for layer in layers), strict=True))),
        ann_counts=tuple(map(sum, zip(*(layer.ann_counts for layer in layers), strict=True))),
    )


def _attentions(model: nn.Module) -> dict[str, SpikeAttention]:
    """Every attention of `model` that mixes by queries and keys, by plain name."""
    found = {plain_name(name): each for name, each in model.named_modules() if isinstance(each, SpikeAttention)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention with queries and keys, so no attention scores")
    for name, attention in found.items():
        if type(attention).mix is SpikeAttention.mix:
            raise ValueError(
                f"{name} is {type(attention).__name__}, which multiplies no queries with keys: there are no scores; "
                "build the network with an attention that mixes by Q K^T, such as sdsa3"
            )
    return found


def _operands(model: nn.Module, images: Tensor) -> dict[str, tuple[Float[Tensor, "T B M K N"], ...]]:
    """Queries and keys of every attention in one pass over `images`."""
    attentions = _attentions(model)
    if images.numel() == 0:
        raise ValueError(f"there are no images to score: got shape {tuple(images.shape)}")
    neurons = {f"{name}.{each}": getattr(attention, each) for name, attention in attentions.items() for each in "qk"}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), hear(neurons) as outputs:
            model(images.to(next(model.parameters())))
    finally:
        for module, mode in modes.items():
            module.training = mode
    for name, output in outputs.items():
        if not output.isfinite().all():
            raise ValueError(f"{name} gives NaN or infinity: check the images and the weights")

    def split(name: str, operand: str) -> Tensor:
        return attentions[name].split(outputs[f"{name}.{operand}"]).unflatten(0, (-1, images.shape[-4]))

    return {name: (split(name, "q"), split(name, "k")) for name in attentions}


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    """B, M, N, N of the scores."""
    _, batch, heads, _, tokens = q.shape
    return batch, heads, tokens, k.shape[-1]


def _scores(q: Tensor, k: Tensor, *, samples: int) -> Float[Tensor, " S"]:
    """Mean over T of Q_t K_t^T at positions that depend on B, M, N only."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    sizes = _sizes(q, k)
    total = math.prod(sizes)
    if total <= samples:
        chosen = torch.arange(total)
    else:  # with replacement: a permutation of all N x N products would cost more memory than they do
        chosen = torch.randint(total, (samples,), generator=torch.Generator().manual_seed(0))
    image, head, query, key = torch.unravel_index(chosen.to(q.device), sizes)
    queries, keys = q.permute(1, 2, 4, 0, 3)[image, head, query], k.permute(1, 2, 4, 0, 3)[image, head, key]
    return (queries * keys).sum(-1).mean(-1).double().cpu()
