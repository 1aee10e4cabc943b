"""The simulated event camera: equal to the loop over pixels that defines it, the same everywhere, and learnable."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier

from spikeformers.data.digits import digits
from spikeformers.data.digits_dvs import DARKEST, SENSOR, MovingDigit, add_noise, film, path, simulate
from spikeformers.data.events import Events, frames


def looped(video: np.ndarray, times: np.ndarray, threshold: np.ndarray) -> list[tuple[int, int, int, bool]]:
    """(t, y, x, p) of one pixel and one crossing after the other, as ESIM's paper describes it."""
    light = np.log(video + DARKEST)
    light = (light - light[0]) / threshold
    level = np.zeros(video.shape[1:], dtype=int)
    found = []
    for step in range(1, len(video)):
        for y, x in np.ndindex(level.shape):
            start, end = light[step - 1, y, x], light[step, y, x]
            while abs(end - level[y, x]) >= 1:
                sign = 1 if end > level[y, x] else -1
                level[y, x] += sign
                share = (level[y, x] - start) / (end - start)
                t = times[step - 1] + round(share * (times[step] - times[step - 1]))
                found.append((int(t), y, x, sign == 1))
    return sorted(found, key=lambda event: event[0])


def rows(events: Events) -> list[tuple[int, int, int, bool]]:
    return list(zip(*(each.tolist() for each in (events.t, events.y, events.x, events.p)), strict=True))


def test_events_equal_those_of_the_loop_over_pixels():
    random = np.random.RandomState(0)
    video, threshold = random.uniform(0, 1, (12, 5, 7)), random.uniform(0.1, 0.4, (5, 7))
    times = np.cumsum(random.randint(500, 3000, 12))
    found = rows(simulate(video, times, threshold=threshold))
    assert found == looped(video, times, threshold)
    assert len(found) > 1000


def test_a_pixel_that_brightens_by_two_and_a_half_thresholds_fires_twice_on_the_way():
    light = np.exp([0, 0, 0.5, 0.5, -0.1])[:, None, None] * 0.5 - DARKEST  # of the logarithm, beside that of 0.5
    events = simulate(light, np.arange(5) * 1000, threshold=0.2)
    # 0.2 and 0.4 of 0.5 thresholds away lie at two and four fifths; back down, the last event was at 0.4.
    assert rows(events) == [(1400, 0, 0, True), (1800, 0, 0, True), (3500, 0, 0, False), (3833, 0, 0, False)]


def test_a_still_picture_fires_nothing_and_black_can_be_seen():
    video = np.random.RandomState(0).uniform(0, 1, (1, 4, 4)).repeat(5, 0)
    assert len(simulate(video, np.arange(5))) == 0
    assert len(simulate(np.array([0.0, 1.0])[:, None, None], np.array([0, 1000]), threshold=1.0)) == 6  # log 1001 = 6.9


def test_a_higher_threshold_makes_fewer_events():
    middles, times = path(np.random.RandomState(3))
    video = film(digits("test")[0][0], middles)
    counts = [len(simulate(video, times, threshold=threshold)) for threshold in (0.1, 0.2, 0.4)]
    assert counts[0] > 1.5 * counts[1] > 2 * counts[2] > 0


def test_false_events_come_at_their_rate_and_in_order():
    still = Events(*(np.zeros(0, dtype=int) for _ in "xypt"), size=(20, 30))
    noisy = add_noise(still, hz=5.0, end=2_000_000, random=np.random.RandomState(0))
    assert abs(len(noisy) - 6000) < 400  # five standard deviations of a Poisson number
    assert 0.45 < noisy.p.mean() < 0.55
    assert (noisy.y.max(), noisy.x.max()) == (19, 29)


def test_a_digit_keeps_its_light_and_shows_where_the_path_says():
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[3:5, 3:5] = 255  # its middle is the digit's middle
    middles = np.array([[0.0, 0.0], [4.0, -2.5]])
    excess = film(pixels, middles) - film(np.zeros((8, 8)), middles)
    total = excess.sum((1, 2))
    assert total == pytest.approx([total[0]] * 2, rel=0.01)  # bilinear weights between whole pixels
    for axis, side in enumerate(SENSOR):
        where = (excess.sum(2 - axis) @ (np.arange(side) - (side - 1) / 2)) / total
        assert where == pytest.approx(middles[:, axis], abs=0.05)


def test_paths_are_closed_smooth_and_different():
    drawn = [path(np.random.RandomState(seed)) for seed in range(20)]
    for middles, times in drawn:
        assert np.abs(middles[0] - middles[-1]).max() < 0.01
        assert np.linalg.norm(np.diff(middles, axis=0), axis=1).max() < 1
        assert np.abs(middles).max() < 5.1
        assert (np.diff(times) > 0).all()
    assert len({times[-1] for _, times in drawn}) == 20
    turns = [np.linalg.det(np.diff(middles[:: len(middles) // 3][:3], axis=0)) > 0 for middles, _ in drawn]
    assert 4 < sum(turns) < 16


def test_a_recording_is_a_function_of_split_and_index_alone():
    pixels = digits("train")[0]
    first = MovingDigit(pixels[5], "train", 5).read()
    torch.manual_seed(7)
    np.random.seed(7)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert rows(MovingDigit(pixels[5], "train", 5).read()) == rows(first)
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])
    assert rows(MovingDigit(pixels[5], "train", 6).read()) != rows(first)
    assert rows(MovingDigit(pixels[5], "test", 5).read()) != rows(first)


def test_recordings_look_like_those_of_n_mnist_and_can_be_told_apart():
    pixels, labels = digits("train")
    recordings = [MovingDigit(pixels[i], "train", i).read() for i in range(500)]
    counts = [len(events) for events in recordings]
    assert 1000 < min(counts) < max(counts) < 8000  # N-MNIST: 1,069 to 7,152 in 1,100 recordings
    assert all(200_000 < events.duration < 400_000 for events in recordings)
    clips = np.stack([frames(events, steps=1).numpy().ravel() for events in recordings])
    linear = RidgeClassifier(alpha=1e3).fit(clips[:400], labels[:400])
    assert linear.score(clips[400:], labels[400:500]) > 0.4  # chance is 0.1


@pytest.mark.parametrize(
    ("video", "times", "threshold", "message"),
    [
        (np.zeros((3, 4)), np.arange(3), 0.2, r"video must be \[F,H,W\] with a time for each picture, got \(3, 4\)"),
        (np.zeros((0, 4, 4)), np.arange(0), 0.2, r"video must be \[F,H,W\]"),
        (np.zeros((3, 4, 4)), np.arange(2), 0.2, r"got \(3, 4, 4\) and \(2,\)"),
        (np.zeros((3, 4, 4)), np.array([0, 5, 5]), 0.2, r"times must be whole microseconds that increase, got \[0, 5"),
        (np.zeros((3, 4, 4)), np.arange(3.0), 0.2, "times must be whole microseconds .* float64"),
        (
            np.full((3, 4, 4), 255),
            np.arange(3),
            0.2,
            "light must lie in 0..1, got 255 to 255: divide by",
        ),
        (np.full((3, 4, 4), np.nan), np.arange(3), 0.2, "light must lie in 0..1, got nan"),
        (np.zeros((3, 4, 4)), np.arange(3), 0.0, "threshold must be above 0, got 0.0"),
        (
            np.zeros((3, 4, 4)),
            np.arange(3),
            np.array([[0.2, 0.2, -0.1, 0.2]] * 4),
            "threshold must be above 0, got -0.1",
        ),
    ],
)
def test_what_no_camera_can_see_is_refused(video, times, threshold, message):
    with pytest.raises(ValueError, match=message):
        simulate(video, times, threshold=threshold)
