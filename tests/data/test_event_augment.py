"""Clips are augmented frame by frame alike, and by (seed, epoch, index) alone; the defaults change nothing."""

import pytest
import torch
from torchvision.transforms import v2

from spikeformers.data.augment import seeded
from spikeformers.data.event_augment import CUTOUT, EventAugment, wide


def clip_of_counts(steps: int = 3, side: int = 24) -> torch.Tensor:
    """Frames that differ in a factor only, so that a transform alike on all keeps the factor; no pixel is 0."""
    frame = torch.arange(1.0, 2 * side * side + 1).view(1, 2, side, side)
    return frame * torch.arange(1, steps + 1).view(-1, 1, 1, 1)


def drawn(count: int) -> list[torch.Tensor]:
    found = []
    for index in range(count):
        with seeded(0, 0, index, torch_only=True):
            found.append(wide(clip_of_counts()))
    return found


def test_the_defaults_change_nothing():
    assert EventAugment().transform() is None


def test_a_flip_mirrors_all_frames():
    clip = clip_of_counts()
    assert torch.equal(EventAugment(flip=1.0).transform()(clip), clip.flip(-1))


def test_every_frame_is_moved_alike_and_counts_stay_counts():
    clip = clip_of_counts()
    for result in drawn(40):
        assert result.shape == clip.shape
        for step in range(3):
            assert torch.equal(result[step], result[0] * (step + 1))
        assert torch.isin(result[0], torch.cat((clip[0].flatten(), torch.zeros(1)))).all()


def test_all_six_operations_come_about_equally_often_and_within_their_ranges():
    """A sixth of 600 is 100; 60 to 140 are more than four standard deviations away."""
    clip, side = clip_of_counts(), 24
    named: dict[bytes, str] = {clip.numpy().tobytes(): "same"}
    affine = v2.functional.affine
    for pixels in range(1, 6):
        for sign in (-1, 1):
            for axis, shift in (("x", [sign * pixels, 0]), ("y", [0, sign * pixels])):
                moved = affine(clip, angle=0.0, translate=shift, scale=1.0, shear=[0.0, 0.0])
                named[moved.numpy().tobytes()] = f"shift_{axis}"
    for part in range(-15, 16):
        shear = float(torch.rad2deg(torch.tensor(0.3 * part / 15, dtype=torch.float64)))
        sheared = affine(clip, angle=0.0, translate=[0, 0], scale=1.0, shear=[shear, 0.0])
        turned = v2.functional.rotate(clip, -2.0 * part)  # affine turns clockwise, rotate the other way
        named.setdefault(sheared.numpy().tobytes(), "shear")
        named.setdefault(turned.numpy().tobytes(), "rotate")
    counts = dict.fromkeys((*named.values(), "cutout"), 0)
    for result in drawn(600):
        name = named.get(result.numpy().tobytes(), "cutout")
        counts[name] += 1
        if name == "cutout":
            rows, columns = (result[0, 0] == 0).nonzero().unbind(1)
            height, width = (int(each.max() - each.min()) + 1 for each in (rows, columns))
            assert height == width
            assert len(rows) == height * width
            assert height <= round((0.11 * side * side) ** 0.5)
    # The weakest leave the clip as it is: 1 of 31 shears and rotations, 5 of 31 shifts (they drop parts of pixels).
    assert 60 <= counts["same"] - 600 / 6 * (1 / 31 + 1 / 31 + 5 / 31 + 5 / 31) <= 140
    for name in ("shear", "rotate", "cutout"):
        assert 60 <= counts[name] <= 140
    for name in ("shift_x", "shift_y"):
        assert 44 <= counts[name] <= 124


def test_a_clip_is_a_function_of_its_key():
    transform = EventAugment(flip=0.5, wide=0.9).transform()
    results = []
    for key in ((1, 2, 3), (1, 2, 4), (1, 2, 3)):
        before = torch.random.get_rng_state()
        with seeded(*key, torch_only=True):
            results.append([transform(clip_of_counts()) for _ in range(3)])
        assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))


def test_the_clip_itself_is_left_alone():
    clip = clip_of_counts()
    CUTOUT(clip)
    EventAugment(flip=1.0, wide=1.0).transform()(clip)
    assert torch.equal(clip, clip_of_counts())


def test_wide_is_the_probability_of_an_operation():
    transform = EventAugment(wide=0.25).transform()
    clip = clip_of_counts(side=8)
    changed = sum(not torch.equal(transform(clip), clip) for _ in range(400))
    assert 30 <= changed <= 120  # 0.25 * about 0.77 * 400 = 77


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip": 1.5}, "augment.flip must lie between 0 and 1, got 1.5"),
        ({"wide": -0.1}, "augment.wide must lie between 0 and 1, got -0.1"),
        ({"mixup": -1.0}, "augment.mixup must be at least 0, got -1.0"),
    ],
)
def test_values_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EventAugment(**change)
