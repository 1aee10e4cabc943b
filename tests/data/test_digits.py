"""The offline default: real digits in a split that never changes."""

import hashlib

import numpy as np
import pytest

from spikeformers.data import ImageData, load_split
from spikeformers.data.digits import digits


def test_the_split_is_1437_and_360_with_every_digit_in_proportion():
    (train, train_labels), (test, test_labels) = digits("train"), digits("test")
    assert (train.shape, test.shape) == ((1437, 8, 8), (360, 8, 8))
    shares = np.bincount(test_labels) / np.bincount(np.concatenate([train_labels, test_labels]))
    assert np.abs(shares - 0.2).max() < 0.005  # one picture of 180 is 0.0055


def test_the_split_is_fixed_for_ever():
    assert hashlib.sha256(digits("test")[0].tobytes()).hexdigest()[:16] == "de85aee14a9506dd"


def test_digits_are_upsampled_to_the_size_and_normalised_to_zero_mean_and_unit_spread():
    split = load_split(ImageData(source="digits", size=32, in_channels=1), "train")
    images = np.stack([split[i][0].numpy() for i in range(400)])
    assert images.shape == (400, 1, 32, 32)
    # interpolation narrows the spread of the 8x8 pixels a little
    assert abs(images.mean()) < 0.1
    assert 0.85 < images.std() < 1.05
    assert split.classes == tuple("0123456789")


@pytest.mark.parametrize("channels", [1, 3])
def test_digits_serve_grey_and_rgb_models(channels):
    split = load_split(ImageData(source="digits", size=8, in_channels=channels, test_limit=5), "test")
    assert len(split) == 5
    image = split[0][0]
    assert image.shape == (channels, 8, 8)
    assert (image == image[:1]).all()
