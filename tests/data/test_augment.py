"""Augmentation: a function of its key, within its range, leaving the world's random states alone."""

import contextlib
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, _RAND_TRANSFORMS, AugmentOp

from spikeformers.data.augment import Augment, Normalise, TrainTransform, mixing, seed_of, seeded, to_pil, to_pixels

PICTURE = torch.arange(3 * 32 * 32).reshape(3, 32, 32).remainder(251).to(torch.uint8)


def transform(augment: Augment, *, channels: int = 3, size: int = 32) -> TrainTransform:
    return TrainTransform(augment, size=size, mean=(0.5,) * channels, std=(0.25,) * channels, interpolation="bicubic")


@pytest.mark.parametrize("name", sorted({*_RAND_TRANSFORMS, *_RAND_INCREASING_TRANSFORMS}))
def test_every_randaugment_operation_runs_at_level_10_with_the_installed_pillow(name):
    changed = AugmentOp(name, prob=1.0, magnitude=10)(to_pil(PICTURE))
    assert changed.size == (32, 32)
    assert changed.mode == "RGB"


def test_a_seed_depends_on_every_part_of_its_key_and_is_fixed_for_ever():
    assert seed_of(1, 2, 3) != seed_of(1, 23) != seed_of(12, 3)
    assert seed_of(0, 1, 2) == 2649961579


@pytest.mark.parametrize("torch_only", [False, True])
def test_seeded_repeats_inside_and_restores_all_three_states_outside(torch_only):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    np.random.randn()  # leaves half of a pair of normals cached, which must survive too
    random.gauss(0, 1)

    def draws():
        return (random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist())

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draws()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    inside = []
    for _ in range(2):
        with seeded(5, 6, torch_only=torch_only):
            inside.append(torch.randn(3).tolist() if torch_only else draws())
    with contextlib.suppress(KeyError), seeded(7, torch_only=torch_only):
        torch.randn(1)
        raise KeyError
    assert inside[0] == inside[1]
    assert draws() == expected


def test_normalise_equals_the_textbook_formula():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = (PICTURE.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    # float32 rounding of values up to 3
    assert torch.allclose(Normalise(mean, std)(PICTURE).double(), expected, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_survive_the_way_through_pillow(channels):
    assert torch.equal(to_pixels(to_pil(PICTURE[:channels])), PICTURE[:channels])


def test_without_augmentation_the_picture_is_only_normalised_and_no_random_number_is_drawn():
    plain = transform(Augment())
    assert not plain.random
    assert torch.equal(plain(PICTURE), Normalise((0.5,) * 3, (0.25,) * 3)(PICTURE))


def test_a_certain_flip_mirrors_the_picture():
    assert torch.equal(transform(Augment(flip=1.0))(PICTURE), transform(Augment())(PICTURE.flip(-1)))


def test_a_padded_crop_is_a_window_of_the_padded_picture():
    padded = torch.nn.functional.pad(PICTURE, (2, 2, 2, 2))
    windows = [transform(Augment())(padded[:, y : y + 32, x : x + 32]) for y in range(5) for x in range(5)]
    crop = transform(Augment(crop_padding=2))
    crops = [crop(PICTURE) for _ in range(10)]
    assert all(any(torch.equal(found, window) for window in windows) for found in crops)
    assert any(not torch.equal(crops[0], found) for found in crops)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop_padding=4, flip=0.5),
        Augment(shift=0.1, rotate=10, scale=0.1),
        Augment(erase=1.0),
        Augment(policy="rand-m9-n1-mstd0.4-inc1", policy_ops=("Rotate", "ShearX")),
        Augment(policy="rand-m9-mstd0.5-inc1", crop_padding=4),
        Augment(policy="rand-m9-mstd0.5-inc1", resized_crop=0.3, flip=0.5, erase=0.25),
        Augment(policy="augmix-m3-w2"),
    ],
    ids=["crop", "affine", "erase", "policy_ops", "policy", "imagenet", "augmix"],
)
def test_the_same_key_gives_the_same_picture_and_another_key_another(augment, channels):
    change = transform(augment, channels=channels)
    picture = to_pil(PICTURE[:channels]) if change.whole else PICTURE[:channels]
    seen = []
    for key in (1, 1, *range(2, 10)):
        with seeded(key, torch_only=change.torch_only):
            seen.append(change(picture))
    assert all(image.shape == (channels, 32, 32) and image.dtype == torch.float32 for image in seen)
    assert torch.equal(seen[0], seen[1])
    assert any(not torch.equal(seen[0], image) for image in seen[2:])


def test_torch_only_transforms_draw_nothing_from_python_or_numpy():
    change = transform(Augment(crop_padding=4, flip=0.5, shift=0.1, rotate=5, scale=0.1, erase=1.0))
    assert change.torch_only
    before = random.getstate(), np.random.get_state()
    change(PICTURE)
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))


def test_a_resized_crop_takes_pictures_of_any_size():
    assert transform(Augment(resized_crop=0.08))(Image.new("RGB", (50, 41))).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"flip": 1.5}, "augment.flip must lie between 0 and 1, got 1.5"),
        ({"scale": 1.0}, "augment.scale must lie below 1, got 1.0"),
        ({"crop_padding": -1}, "augment.crop_padding must be at least 0, got -1"),
        ({"crop_padding": 4, "resized_crop": 0.1}, "set one of them to 0"),
        ({"mixing_epochs": -1}, "augment.mixing_epochs must be at least 0, got -1"),
        ({"erase_fill": "grey"}, "augment.erase_fill must be noise or zero, got 'grey'"),
        ({"policy": "rand-m9", "policy_ops": ("Rotat",)}, "has no 'Rotat'; closest: Rotate"),
        ({"policy": "rand-m9-inc1", "policy_ops": ("ColorIncreasing",)}, "'ColorIncreasing'; closest: .*Color"),
        ({"policy_ops": ("Rotate",)}, "restricts RandAugment, but augment.policy='': set a policy such as"),
        ({"policy": "augmix-m3-w2", "policy_ops": ("Rotate",)}, "but augment.policy='augmix-m3-w2'"),
        ({"policy": "rand-m9-tweights", "policy_ops": ("Rotate",)}, "leave one of them out"),
    ],
)
def test_an_impossible_augmentation_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Augment(**wrong)


@pytest.mark.parametrize("policy", ["rnd-m9", "rand-q5", "9"])
def test_an_unknown_policy_is_refused_with_an_example(policy):
    with pytest.raises(ValueError, match=f"augment.policy='{policy}' is not one of timm's, such as"):
        transform(Augment(policy=policy))


def test_only_the_named_operations_are_drawn_and_they_keep_all_of_timms_settings():
    names = ("Equalize", "Rotate", "ShearX", "TranslateXRel", "TranslateYRel")  # of Spikformer's CIFAR training
    text = "rand-m9-n1-mstd0.4-inc1"
    (policy,) = transform(Augment(policy=text, policy_ops=names)).on_picture
    assert policy.num_layers == 1
    assert policy.choice_weights is None
    assert tuple(op.name for op in policy.ops) == names
    whole = transform(Augment(policy=text)).on_picture[0].transforms[0]
    expected = {op.name: vars(op) for op in whole.ops}
    assert all(vars(op) == expected[op.name] for op in policy.ops)
    assert {op.prob for op in policy.ops} == {0.5}
    assert policy.ops[0].hparams["translate_const"] == int(0.45 * 32)


@pytest.mark.parametrize(("text", "name"), [("rand-m9", "Solarize"), ("rand-m9-inc1", "SolarizeIncreasing")])
def test_inc1_picks_the_increasing_variant_of_a_named_operation(text, name):
    (policy,) = transform(Augment(policy=text, policy_ops=("Solarize",))).on_picture
    assert [op.name for op in policy.ops] == [name]


def test_erasing_fills_with_noise_or_with_zeros_after_normalising():
    plain = transform(Augment())(PICTURE)
    for fill in ("noise", "zero"):
        with seeded(2):
            image = transform(Augment(erase=1.0, erase_fill=fill))(PICTURE)
        changed = (image != plain).any(0)
        rows, columns = changed.any(1), changed.any(0)
        assert 0.02 * 0.8 <= float(changed.float().mean()) <= 0.33 * 1.2  # timm's areas; sides are whole pixels
        assert torch.equal(changed, rows[:, None] & columns)  # one rectangle
        assert bool((image[:, changed] == 0).all()) == (fill == "zero")


def test_mixing_is_none_when_off_and_gives_soft_targets_that_sum_to_one():
    assert mixing(Augment(), num_classes=4) is None
    mix = mixing(Augment(mixup=0.8, cutmix=1.0), num_classes=4)
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    results = []
    for _ in range(2):
        with seeded(0, 3):
            results.append(mix(images.clone(), labels))
    assert torch.allclose(results[0][1].sum(1), torch.ones(6))
    assert (results[0][1] > 0).sum(1).max() <= 2  # two pictures in each, nothing spread over the others
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
