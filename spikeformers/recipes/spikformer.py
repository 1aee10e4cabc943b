"""Spikformer V1 and V2."""

from spikeformers.data.augment import Augment
from spikeformers.data.images import ImageData
from spikeformers.recipes.quick import cifar10_root
from spikeformers.train.recipe import ModelChoice, Optim, Recipe, Testing


def cifar10_small() -> Recipe:
    """CIFAR-10, all 50,000 images: Spikformer V1 of 0.65 M parameters, binary LIF at T=1, 10 epochs."""
    return Recipe(
        name="spikformer_cifar10_small",
        data=ImageData(source="parquet", root=cifar10_root(), size=32, augment=Augment(flip=0.5)),
        model=ModelChoice(
            name="spikformer_cifar_4_384", neuron="lif", steps=1, options={"dim": 128, "depth": 2, "heads": 4}
        ),
        optim=Optim(lr=2e-3, warmup_epochs=0.5, weight_decay=0.05, clip_grad=1.0),
        testing=Testing(every=2, images=1_000, integer_images=500),
        epochs=10,
        batch_size=64,
        threads=1,
    )
