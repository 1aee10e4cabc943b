"""Fixtures for tests of the Triton kernels."""

import os

import pytest

from spikeformers import kernels


@pytest.fixture
def interpreter():
    """Skips where Triton is missing or compiles for a device, which the tests in tests/gpu then cover."""
    if not kernels.TRITON:
        pytest.skip("Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a device is present: the kernels are compiled, not interpreted; run -m gpu")
