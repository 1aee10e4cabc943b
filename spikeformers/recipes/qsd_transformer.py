"""QSD-Transformer: CIFAR-10 for one CPU core."""

import dataclasses

from spikeformers.backbones.qsd_transformer import ANN_TWIN
from spikeformers.data.augment import Augment
from spikeformers.data.images import ImageData
from spikeformers.recipes.quick import cifar10_root
from spikeformers.train.recipe import ModelChoice, Optim, Recipe, Testing


def cifar10_small() -> Recipe:
    """10,000 training images of CIFAR-10: 0.29 M weights of 4 bits, IE-LIF at T=1, one core."""
    return Recipe(
        name="qsd_transformer_cifar10_small",
        data=ImageData(source="parquet", root=cifar10_root(), size=32, train_limit=10_000, augment=Augment(flip=0.5)),
        model=ModelChoice(
            name="qsd_transformer_t",
            neuron="ie_lif",
            levels=4,
            dims=(32, 48, 64, 64),
            strides=(2, 2, 1, 1, 1),
            blocks=(0, 1, 0, 2, 1),
            options={"heads": 4, "mlp_ratio": 2, "layer_scale": 1.0, "conv_token_mixer": "identity"},
        ),
        optim=Optim(lr=3e-3, warmup_epochs=0.5, weight_decay=0.05, clip_grad=1.0),
        testing=Testing(every=2, images=1_000, integer_images=100),
        epochs=6,
        batch_size=32,
        threads=1,
    )


def cifar10_small_ann() -> Recipe:
    """The ANN twin of qsd_transformer_cifar10_small, its teacher."""
    student = cifar10_small()
    twin = {name: value for name, value in ANN_TWIN.items() if name not in ("neuron", "steps")}
    model = dataclasses.replace(student.model, neuron="gelu", options=student.model.options | twin)
    return dataclasses.replace(student, name="qsd_transformer_cifar10_small_ann", model=model, epochs=15)
