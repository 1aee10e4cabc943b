"""Recipes by name; each is a function that returns a `Recipe`, in a file named after its paper."""

import difflib
from collections.abc import Callable

from spikeformers.recipes import meta_spikeformer, quick, spikformer
from spikeformers.train.recipe import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits": quick.digits,
    "cifar10_small": quick.cifar10_small,
    "spikformer_cifar10_small": spikformer.cifar10_small,
    "meta_spikeformer_15m_imagenet": meta_spikeformer.imagenet_15m,
    "meta_spikeformer_31m_imagenet": meta_spikeformer.imagenet_31m,
    "meta_spikeformer_55m_imagenet": meta_spikeformer.imagenet_55m,
    "meta_spikeformer_15m_imagenet_t4": meta_spikeformer.imagenet_15m_t4,
    "meta_spikeformer_31m_imagenet_t4": meta_spikeformer.imagenet_31m_t4,
    "meta_spikeformer_55m_imagenet_t4": meta_spikeformer.imagenet_55m_t4,
    "meta_spikeformer_15m_imagenet_t4_distilled": meta_spikeformer.imagenet_15m_t4_distilled,
    "meta_spikeformer_31m_imagenet_t4_distilled": meta_spikeformer.imagenet_31m_t4_distilled,
    "meta_spikeformer_55m_imagenet_t4_distilled": meta_spikeformer.imagenet_55m_t4_distilled,
}


def get(name: str) -> Recipe:
    """The recipe called `name`. Raises ValueError that lists the closest names if there is none."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4) or list(RECIPES)
        raise ValueError(f"unknown recipe {name!r}; closest: {', '.join(close)}")
    return RECIPES[name]()
