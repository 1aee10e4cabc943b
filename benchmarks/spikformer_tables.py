"""The tables and figures of Spikformer V2 at a size that two CPU cores can train, ours beside the paper's.

The networks are small and see a few thousand CIFAR-10 images for a few epochs, so the numbers are not to be compared
with the paper's, and the order of rows only where they lie far apart: all but `labels` have one seed and 2,000 test
images, where one standard deviation is a point, and many of the paper's differences are below half of that. Every row
of a table has the same data, epochs and rate unless the row is about them. Each training has a folder of its own below
--runs and is resumed, so that a table can be made over days; finished ones are only read. More --images, better tables.

    python benchmarks/spikformer_tables.py labels --json benchmarks/results/spikformer_labels.json

Tables: labels (masked pre-training, then 1,000 labels, against from scratch; three seeds at the best of three rates),
1 (attention maps), 6 (time steps, VSA, IAND), fig4 (stems), fig7 (depth; with it Table 3's training times), 7 (mask
ratio, epochs).
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from tables import changed, done, make, parser_of

from spikeformers import energy, from_pretrained, recipes
from spikeformers.data import load_split
from spikeformers.train.evaluate import batches_of
from spikeformers.train.recipe import Init, Recipe, from_json
from spikeformers.train.summary import spread

RATES = (5e-4, 1.5e-3, 4e-3)
SEEDS = (0, 1, 2)


def labels(runs: Path, images: int) -> list[dict]:
    """1,000 labels, from scratch and from masked pre-training on 50,000 unlabelled images: mean and sd of seeds."""
    scratch = arm(runs, "from scratch", "")
    done(recipes.get("spikformer_v2_cifar10_mae"), runs / "mae")
    return [scratch, arm(runs, "pre-trained", str(runs / "mae"))]


def arm(runs: Path, name: str, backbone: str) -> dict:
    """One arm of `labels`: the best of RATES by the first seed, then all seeds at that rate."""
    tuning = recipes.get("spikformer_v2_cifar10_finetune")

    def accuracy(rate: float, seed: int) -> float:
        recipe = dataclasses.replace(changed(tuning, optim__lr=rate), seed=seed, init=Init(backbone=backbone))
        return 100 * done(recipe, runs / f"{name.replace(' ', '-')}_lr-{rate:g}_seed-{seed}").accuracy

    trials = {rate: accuracy(rate, SEEDS[0]) for rate in RATES}
    best = max(trials, key=trials.get)
    found = [accuracy(best, seed) for seed in SEEDS]
    mean, sd = spread(found)
    return {"arm": name, "rate": best, "mean": mean, "sd": sd, "accuracies": found, "trials": trials}


def small(images: int, **fields: object) -> Recipe:
    """A small V1 at T=4, the ground of Tables 1 and 6."""
    base = dataclasses.replace(recipes.get("spikformer_cifar10_small"), name="spikformer_table")
    ground = {
        "data__train_limit": images,
        "data__test_limit": 2_000,
        "model__options__dim": 48,
        "model__options__attention": "ssa",
        "model__steps": 4,
        "epochs": 5,
        "testing__every": 100,
        "testing__integer_images": 50,
    }
    return changed(base, **(ground | fields))


def small_v2(images: int, **fields: object) -> Recipe:
    """A small V2 on the same images at T=1, the ground of Figs. 4 and 7 and Table 7."""
    base = dataclasses.replace(recipes.get("spikformer_v2_cifar10_finetune"), name="spikformer_v2_table")
    ground = {
        "data__train_limit": images,
        "data__test_limit": 2_000,
        "model__options__dim": 32,
        "model__options__depth": 6,
        "model__options__stem": "scs",
        "model__options__stem_branch": "conv2",
        "model__options__shortcut": "sew",
        "epochs": 10,
        "optim__lr": 2e-3,
        "testing__integer_images": 50,
    }
    return changed(base, **(ground | fields))


def small_mae(images: int, **fields: object) -> Recipe:
    """Masked pre-training of that network on the same images."""
    base = dataclasses.replace(recipes.get("spikformer_v2_cifar10_mae"), name="spikformer_mae_table")
    ground = {
        "data__train_limit": images,
        "data__test_limit": 2_000,
        "model__options__dim": 32,
        "model__options__depth": 6,
        "model__options__stem": "scs",
        "model__options__stem_branch": "conv2",
        "model__options__shortcut": "sew",
        "pretrain__decoder_dim": 64,
        "pretrain__decoder_depth": 1,
        "epochs": 8,
        "testing__every": 100,
    }
    return changed(base, **(ground | fields))


def attention_cost(folder: Path) -> tuple[float, float]:
    """Operations in millions and microjoules of one block's Q, K, V products in one step, counted as Table 1 does:
    two operations a multiply-accumulate of real numbers at 4.6 pJ each, one for each addition of spikes at 0.9 pJ."""
    recipe = from_json(json.loads((folder / "recipe.json").read_text()))
    images = next(iter(batches_of(load_split(recipe.data, "test"), batch_size=64)))[0]
    operations = [o for o in energy.trace(from_pretrained(folder / "model"), images).operations if o.parts]
    if operations[0].kind == "attention_map":
        count, price = sum(2 * part.macs for o in operations for part in o.parts), 4.6
    else:
        count, price = sum(part.macs * float(part.rates.mean()) for o in operations for part in o.parts), 0.9
    count /= len(operations)
    return count / 1e6, count * price / 1e6


def table_1(runs: Path, images: int) -> list[dict]:
    """Attention maps."""
    paper = {
        "identity": (93.96, 6.3, 29),
        "leaky_relu": (93.85, 6.3, 29),
        "relu": (94.34, 6.3, 29),
        "vsa": (94.97, 6.6, 30),
        "ssa": (95.19, 1.1, 0.990),
    }
    rows = []
    for name, published in paper.items():
        folder = runs / f"v1_{name}_t4"
        summary = done(small(images, model__options__attention=name), folder)
        operations, microjoule = attention_cost(folder)
        ours = {"accuracy": 100 * summary.accuracy, "mega_operations": operations, "microjoule": microjoule}
        rows.append({"attention": name, "paper": dict(zip(ours, published, strict=True)), "ours": ours})
    return rows


def table_6(runs: Path, images: int) -> list[dict]:
    """Time steps, vanilla self-attention, and IAND instead of ADD."""
    cases: list[tuple[str, str, int, float | None, Recipe]] = [
        *(
            (
                f"4-384 {attention}",
                f"v1_{attention}_t{steps}",
                steps,
                published,
                small(images, model__options__attention=attention, model__steps=steps),
            )
            for attention, steps, published in (
                ("ssa", 1, 93.51),
                ("ssa", 2, 93.59),
                ("ssa", 4, 95.19),
                ("ssa", 6, 95.34),
                ("vsa", 4, 94.97),
                ("vsa_float_v", 4, 95.17),
            )
        ),
        ("V2 8-512 ADD", "v2_depth-6_supervised", 1, 79.05, small_v2(images)),
        *(
            ("V2 8-512 ADD, from T=1", f"v2_depth-6_t{steps}", steps, published, _more_steps(runs, images, steps))
            for steps, published in ((2, 79.20), (4, 80.38), (6, 80.73))
        ),
        ("V2 8-512 IAND", "v2_depth-6_iand", 1, 76.12, small_v2(images, model__options__shortcut="iand")),
    ]
    rows = []
    for label, folder, steps, published, recipe in cases:
        summary = done(recipe, runs / folder)
        ours = {"accuracy": 100 * summary.accuracy, "firing_rate": 100 * summary.firing_rate}
        rows.append({"model": label, "steps": steps, "paper": {"accuracy": published}, "ours": ours})
    return rows


def _more_steps(runs: Path, images: int, steps: int) -> Recipe:
    """The supervised network of T=1 finetuned at more steps, briefly at a fiftieth of its rate, as in Sec. 5.2.1."""
    single = small_v2(images, model__steps=steps, epochs=2, optim__lr=4e-5, optim__warmup_epochs=0.0)
    return dataclasses.replace(single, init=Init(backbone=str(runs / "v2_depth-6_supervised")))


def figure_4(runs: Path, images: int) -> list[dict]:
    """Stems: nothing, linear layers, or convolutions behind each down-sampling; the paper's numbers are a picture."""
    sps = done(small_v2(images, model__options__stem="sps"), runs / "sps_depth-6_supervised")
    ours = {"accuracy": 100 * sps.accuracy, "parameters": sps.parameters}
    rows = [{"stem": "sps", "paper": {}, "ours": ours}]
    for branch in ("conv0", "linear1", "linear2", "linear3", "conv1", "conv2", "conv3"):
        folder = "v2_depth-6_supervised" if branch == "conv2" else f"v2_{branch}"
        summary = done(small_v2(images, model__options__stem_branch=branch), runs / folder)
        ours = {"accuracy": 100 * summary.accuracy, "parameters": summary.parameters}
        rows.append({"stem": branch, "paper": {}, "ours": ours})
    return rows


def figure_7(runs: Path, images: int) -> list[dict]:
    """Depth, supervised against pre-trained and finetuned, with both training times (Table 3); last, V1's stem."""
    paper = {  # V2 12-512 and 16-768 are the nearest rows, and V1 8-512
        ("scs", 2): (None, None),
        ("scs", 6): (78.65, 79.64),
        ("scs", 12): (77.43, 81.10),
        ("sps", 6): (78.23, 75.23),
    }
    rows = []
    for (stem, depth), published in paper.items():
        deep = {"model__options__depth": depth, "model__options__stem": stem}
        name = f"v2_depth-{depth}" if stem == "scs" else f"{stem}_depth-{depth}"
        supervised = done(small_v2(images, **deep), runs / f"{name}_supervised")
        mae = runs / f"{name}_mae"
        pretrained = done(small_mae(images, **deep), mae)
        tuned = done(finetuned(mae, images, **deep), runs / f"{name}_finetuned")
        seconds = pretrained.seconds + tuned.seconds
        ours = {
            "supervised": 100 * supervised.accuracy,
            "pretrained": 100 * tuned.accuracy,
            "supervised_seconds": supervised.seconds,
            "pretrained_seconds": seconds,
            "speedup": supervised.seconds / seconds,
        }
        both = {"supervised": published[0], "pretrained": published[1]}
        rows.append({"stem": stem, "depth": depth, "paper": both, "ours": ours})
    return rows


def finetuned(mae: Path, images: int, **fields: object) -> Recipe:
    """Half of the supervised epochs, from the pre-training in `mae`, with layer-wise rates."""
    recipe = small_v2(images, **({"epochs": 5, "optim__layer_decay": 0.7} | fields))
    return dataclasses.replace(recipe, init=Init(backbone=str(mae)))


def table_7(runs: Path, images: int) -> list[dict]:
    """Mask ratio, epochs of pre-training and of finetuning; a quarter of a step is 50 of the paper's epochs."""
    paper = {
        (0.75, 8, 5): 79.64,
        (0.75, 16, 5): 79.71,
        (0.75, 32, 5): 79.90,
        (0.75, 8, 7): 79.93,
        (0.6, 8, 5): 79.40,
        (0.5, 8, 5): 79.73,
    }
    rows = []
    for (ratio, epochs, tuning), published in paper.items():
        usual = (ratio, epochs) == (0.75, 8)
        mae = runs / ("v2_depth-6_mae" if usual else f"v2_mae_ratio-{ratio:g}_epochs-{epochs}")
        pretrained = done(small_mae(images, pretrain__mask_ratio=ratio, epochs=epochs), mae)
        folder = "v2_depth-6_finetuned" if usual and tuning == 5 else f"{mae.name}_finetuned-{tuning}"
        tuned = done(finetuned(mae, images, epochs=tuning), runs / folder)
        ours = {"accuracy": 100 * tuned.accuracy, "pretraining_loss": pretrained.loss}
        rows.append(
            {"mask_ratio": ratio, "pretrain_epochs": epochs, "finetune_epochs": tuning}
            | {"paper": {"accuracy": published}, "ours": ours}
        )
    return rows


TABLES: dict[str, Callable[[Path, int], list[dict]]] = {
    "labels": labels,
    "1": table_1,
    "6": table_6,
    "fig4": figure_4,
    "fig7": figure_7,
    "7": table_7,
}


def main() -> None:
    options = parser_of(__doc__, TABLES, runs="runs/spikformer_tables", images=4_000).parse_args()
    make("spikformer_tables", TABLES, options)


if __name__ == "__main__":
    main()
