"""Spiking vision transformers for PyTorch.

Names are imported when first used: torch takes seconds to load, and `spikeformers --help` should not wait for it.
"""

from importlib import import_module

_HOMES = {
    "__version__": "layers.version",
    "create_model": "zoo",
    "from_pretrained": "zoo",
    "list_models": "zoo",
    "load_official": "weights",
    "record": "energy",
    "set_steps": "neurons",
    "streaming": "neurons",
}
_FOLDERS = ("deploy", "distill", "energy", "quantize")
__all__ = [*_HOMES, *_FOLDERS]


def __getattr__(name: str) -> object:
    if name in _FOLDERS:
        return import_module(f"spikeformers.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'spikeformers' has no attribute {name!r}")
    return getattr(import_module(f"spikeformers.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
