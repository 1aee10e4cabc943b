"""Spike2Former's ablations (Table 3 and the last rows of Table 1) at a size that a CPU core can train, on CamVid.

A Spike2Former of 1.8 M weights on CamVid's 367 pictures, without ImageNet; every row has the same pictures, epochs,
rate and seeds. The numbers are not to be compared with the paper's, only differences to the baseline, and those only
where they are larger than the deviation between seeds. One thing is not as in the paper: attention scales are learnt
and start balanced, since random weights and fixed scales leave attention silent (docs/decisions/0018). Part of what
normalised spikes are for is done by that, so I-LIF may lose less here; the rows "with fixed scales" leave it out.
The mask embedding has whole counts in every row but "norm with 8": alpha is D of NI-LIF and 1 of I-LIF.
Each training has a folder of its own below --runs and is resumed, so that a table can be made over days; finished ones
are only read. Two processes may train different --seeds at once, and a third call with all seeds makes the tables.
With the row "no shortcut", table3 also draws its queries and the baseline's (Fig. 3) to shortcut.png beside the runs.

    python benchmarks/camvid_tables.py table3 steps backbone --json benchmarks/results/camvid_tables.json

Tables: table3 (SDME, SDTE, NI-LIF: --rows large, all, or names with commas between), steps (steps T and levels D, and
the ANN twin), backbone (both heads, from scratch and from a classifier trained on CIFAR-10).
"""

import dataclasses
import statistics
from dataclasses import dataclass
from functools import partial, update_wrapper
from pathlib import Path

import matplotlib.pyplot as plt
from tables import changed, done, make, parser_of, runs_of

from spikeformers import recipes
from spikeformers.heads.spike2former import ANN_TWIN
from spikeformers.train.recipe import Init, Recipe
from spikeformers.train.segmentation_pictures import QUERIES
from spikeformers.train.summary import SegmentationSummary, read_summary, spread

LAST_NEURON = "head.embedding.mask_spikes.neuron"  # its spikes make the masks
FIXED = {"model__options__attention": "sdsa3_width", "model__options__attention_scale": "fixed", "init__balance": False}

I_LIF = {"model__neuron": "i_lif", "model__options__alpha": 1.0}


@dataclass(frozen=True)
class Ground:
    """What all rows share."""

    epochs: int = 40
    size: tuple[int, int] = (90, 120)  # of pictures, a quarter of their sides; scores are counted at 360 x 480
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: tuple[str, ...] = ()  # of table3; none: those of LARGE


@dataclass(frozen=True)
class Row:
    """One modification of the baseline, and what the paper has for it on ADE20K: mIoU in percent, mJ an image."""

    fields: dict[str, object]
    miou: float | None = None
    mj: float | None = None


TABLE_3 = {
    "baseline": Row({}, 46.3, 68.0),
    "no shortcut": Row({"model__options__mask_shortcut": "none"}, 41.8, 67.9),
    "shortcut without conv": Row({"model__options__mask_shortcut": "spikes"}, 45.7, 67.9),
    "membrane shortcut": Row({"model__options__mask_shortcut": "membrane"}, 45.0, 67.8),
    "no encoder": Row({"model__options__encoder": "none"}, 43.8, 65.2),
    "no ESC in SDDA": Row({"model__options__sdda_projection": "linear"}, 45.6, 64.5),
    "no DWConv in SDDA": Row({"model__options__sdda_query": "plain"}, 45.7, 67.8),
    "spiking query": Row({"model__options__sdda_spikes": "query"}, 43.1, 67.8),
    "multi-scale query": Row({"model__options__encoder_query": "multi"}, 46.7, 136.5),
    "vanilla encoder": Row({"model__options__encoder": "vanilla"}, 44.9, 66.9),
    "I-LIF": Row(I_LIF, 37.9, 68.1),
    "norm in cross-attention": Row(I_LIF | {"model__options__cross_attention_neuron": "ni_lif"}, 43.2, 68.1),
    "norm with 8": Row({"model__neuron": "ni_lif_const8"}, 44.7, 67.4),
    "NI-LIF with fixed scales": Row(FIXED),
    "I-LIF with fixed scales": Row(FIXED | I_LIF),
}
LARGE = ("baseline", "I-LIF", "no shortcut", "spiking query", "no encoder")  # where the paper loses most
STEPS = {(1, 2): (61.8, 50.6), (2, 2): (62.1, 98.3), (1, 4): (75.1, 63.0), (4, 4): (75.4, 221.9)}


def grounded(name: str, images: int, ground: Ground, **fields: object) -> Recipe:
    """The recipe `name` on the pictures, epochs and size of `ground`, with other `fields`; tested at its end only."""
    shared = {
        "data__train_limit": images,
        "data__size": ground.size,
        "data__test_size": ground.size,
        "epochs": ground.epochs,
        "testing__every": ground.epochs,
        "testing__integer_images": 1,
    }
    return changed(dataclasses.replace(recipes.get(name), name="camvid_table"), **(shared | fields))


def spike2former(images: int, ground: Ground, **fields: object) -> Recipe:
    """The baseline with other `fields`."""
    return grounded("camvid_spike2former_small", images, ground, **({"model__options__alpha": 4.0} | fields))


def place_of(runs: Path, ground: Ground) -> Path:
    height, width = ground.size
    return runs / f"{height}x{width}_epochs-{ground.epochs}"


def folder_of(runs: Path, name: str, ground: Ground, *, seed: int) -> Path:
    """Where the training of a row is kept."""
    return place_of(runs, ground) / f"{name.lower().replace(' ', '-')}_seed-{seed}"


def outcomes(runs: Path, name: str, recipe: Recipe, ground: Ground) -> list[SegmentationSummary]:
    """A training of a row for each seed."""
    return [
        done(dataclasses.replace(recipe, seed=seed), folder_of(runs, name, ground, seed=seed)) for seed in ground.seeds
    ]


def draw_shortcut(runs: Path, *, ground: Ground) -> Path:
    """Fig. 3 of the first seed: the mean mask of each query with the ME-shortcut, and below it without."""
    shown = {"baseline": "with the ME-shortcut", "no shortcut": "without it"}
    figure, axes = plt.subplots(len(shown), layout="constrained", figsize=(7, 4.8))
    for axis, (name, title) in zip(axes, shown.items(), strict=True):
        folder = folder_of(runs, name, ground, seed=ground.seeds[0])
        rate = 100 * read_summary(folder).layers[LAST_NEURON]
        axis.imshow(plt.imread(folder / QUERIES))
        axis.set_title(f"{title}: the last neuron fires {rate:.1f} % of the most it could", fontsize=10)
        axis.axis("off")
    target = place_of(runs, ground) / "shortcut.png"
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def scored(found: list[SegmentationSummary]) -> dict:
    """Our side of a row: mean and deviation over seeds of mIoU, means of energy and of firing rates, in percent."""
    mean, sd = spread([100 * each.miou for each in found])
    last = [100 * each.layers[LAST_NEURON] for each in found if LAST_NEURON in each.layers]
    return {
        "miou": mean,
        "sd": sd if len(found) > 1 else None,
        "mj": statistics.fmean(each.energy_mj for each in found),
        "firing": 100 * statistics.fmean(each.firing_rate for each in found),
        "last_firing": statistics.fmean(last) if last else None,
    }


def compared(
    about: dict[str, object], found: list[SegmentationSummary], *, paper: dict[str, float | None] | None = None
) -> dict:
    """A row: what it is `about`, both sides, and the mIoU of each seed."""
    mious = [100 * each.miou for each in found]
    return about | ({"paper": paper} if paper else {}) | {"ours": scored(found), "mious": mious}


def table_3(runs: Path, images: int, *, ground: Ground) -> list[dict]:
    """Modifications of Spike2Former one by one; paper: ADE20K, and its shortcut makes the last neuron fire 26.6 % of
    the time instead of 8.6 %. Differences are to the baseline, in points of mIoU."""
    rows = []
    for name in dict.fromkeys(("baseline", *(ground.rows or LARGE))):
        row = TABLE_3[name]
        found = outcomes(runs, name, spike2former(images, ground, **row.fields), ground)
        rows.append(compared({"row": name}, found, paper={"miou": row.miou, "mj": row.mj}))
    for row in rows:
        for side in ("paper", "ours"):
            own, base = row[side]["miou"], rows[0][side]["miou"]
            row[side]["difference"] = None if own is None else own - base
    return rows


def steps(runs: Path, images: int, *, ground: Ground) -> list[dict]:
    """Steps T and levels D, and the ANN twin (GELU, softmax attention in backbone and decoder); paper: VOC2012.

    For T > 1 membranes live on from step to step, keeping half (Eq. 18): without that, as in the authors' code, T
    copies of a picture give T times the same spikes, and T changes nothing but the energy.
    """
    rows = []
    for (times, levels), (miou, mj) in STEPS.items():
        fields = {"model__steps": times, "model__levels": levels, "model__options__alpha": float(levels)}
        if times > 1:
            fields["model__options__temporal"] = True
        name = "baseline" if (times, levels) == (1, 4) else f"T-{times} D-{levels}"
        found = outcomes(runs, name, spike2former(images, ground, **fields), ground)
        rows.append(compared({"network": f"{times} x {levels}"}, found, paper={"miou": miou, "mj": mj}))
    return [*rows, compared({"network": "ANN twin"}, outcomes(runs, "ANN", twin(images, ground), ground))]


def twin(images: int, ground: Ground) -> Recipe:
    """The baseline as an ordinary network. It has no scales to balance."""
    overrides = dict(ANN_TWIN)
    fields = {f"model__{name}": overrides.pop(name) for name in ("neuron", "steps")}
    fields |= {f"model__options__{name}": value for name, value in overrides.items()}
    return spike2former(images, ground, **fields, init__balance=False)


def backbone(runs: Path, images: int, *, ground: Ground) -> list[dict]:
    """Both heads, from scratch and from a backbone that told 10,000 CIFAR-10 images apart (one for all seeds); the
    paper has ImageNet."""
    heads = {
        "Semantic FPN": ("fpn", grounded("camvid_fpn_small", images, ground)),
        "Spike2Former": ("baseline", spike2former(images, ground)),
    }
    rows = []
    for head, (name, recipe) in heads.items():
        rows.append(compared({"head": head, "start": "scratch"}, outcomes(runs, name, recipe, ground)))
        classifier = runs.parent / f"backbone_{recipe.model.neuron}"
        told_apart = done(changed(recipes.get("camvid_backbone"), model__neuron=recipe.model.neuron), classifier)
        trained = dataclasses.replace(recipe, init=Init(backbone=str(classifier), balance=True))
        found = outcomes(runs, f"{name} from cifar10", trained, ground)
        about = {"head": head, "start": "CIFAR-10", "classifier": 100 * told_apart.accuracy}
        rows.append(compared(about, found))
    return rows


TABLES = {"table3": table_3, "steps": steps, "backbone": backbone}


def rows_of(text: str) -> tuple[str, ...]:
    """`large`, `all`, or names of TABLE_3 with commas between. Raises ValueError for other names."""
    names = {"large": LARGE, "all": tuple(TABLE_3)}.get(text) or tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in TABLE_3]:
        raise ValueError(f"no such rows: {', '.join(unknown)}; there are large, all, {', '.join(TABLE_3)}")
    return names


def numbers(text: str, separator: str = ",") -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(separator))


def main() -> None:
    parser = parser_of(__doc__, TABLES, runs="runs/camvid_tables", images=0)
    usual = Ground()
    parser.add_argument("--epochs", type=int, default=usual.epochs, help="of every row (default: %(default)s)")
    parser.add_argument("--size", default="90x120", help="height x width of pictures (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="of every row (default: %(default)s)")
    parser.add_argument("--rows", default="large", help="of table3: large, all, or names (default: %(default)s)")
    options = parser.parse_args()
    try:
        ground = Ground(options.epochs, numbers(options.size, "x"), numbers(options.seeds), rows_of(options.rows))
        if len(ground.size) != 2:
            raise ValueError(f"--size must be height x width, such as 90x120, got {options.size}")
    except ValueError as error:
        parser.error(str(error))
    made = {name: update_wrapper(partial(table, ground=ground), table) for name, table in TABLES.items()}
    make("camvid_tables", made, options, ground=dataclasses.asdict(ground))
    if "table3" in options.tables and "no shortcut" in (ground.rows or LARGE):
        print(f"drawn: {draw_shortcut(runs_of(options), ground=ground)}")


if __name__ == "__main__":
    main()
