"""The installed version, for files that record what wrote them."""

from importlib.metadata import version

__version__ = version("spikeformers")
