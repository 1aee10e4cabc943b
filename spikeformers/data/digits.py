"""The offline default: scikit-learn's 1,797 real handwritten digits (8x8, 16 grey levels), white on black.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998 (its test part).
The split is fixed for all seeds: 1,437 to train and 360 to test, each digit in the same proportion."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

BRIGHTEST = 16  # the files count set pixels in 4x4 blocks: 0 to 16
TEST_COUNT = 360
SPLIT_SEED = 0
CLASSES = tuple("0123456789")


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [N,8,8] (0 to 255) and labels int64 [N] of `split` "train" or "test", in the order of the file."""
    counts, labels = load_digits(return_X_y=True)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_COUNT, random_state=SPLIT_SEED, stratify=labels
    )
    chosen = np.sort(test if split == "test" else train)
    pixels = np.rint(counts[chosen] * (255 / BRIGHTEST)).astype(np.uint8)
    return pixels.reshape(-1, 8, 8), labels[chosen].astype(np.int64)
