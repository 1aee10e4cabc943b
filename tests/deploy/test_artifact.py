"""One file that is a whole model: it comes back bit by bit, and nothing that was changed, cut or forged comes back."""

import copy
import dataclasses
import json
import random
import resource
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from spikeformers import create_model, set_steps
from spikeformers.deploy import Framing, Letterbox, ModelCard, Preprocessing, container, integer, load, save
from spikeformers.neurons import ILIF
from spikeformers.quantize import prepare
from spikeformers.quantize.exact import FixedPointDoor

SIZES = {"num_classes": 5, "neuron": "i_lif"}
PYRAMID = {"dims": (8, 8, 8, 8), "blocks": (1, 0, 1, 1, 0), "heads": 2} | SIZES
SPIKFORMER = {"dim": 32, "depth": 1, "heads": 2} | SIZES
GREY = Preprocessing(size=32, crop=0.875, channels=1, mean=(0.3,), std=(0.4,))
WINDOWS = Framing(short_side=48, window=(32, 40), stride=(16, 40), channels=1, mean=(0.3,), std=(0.4,))
LETTERBOX = Letterbox(window=(48, 60), channels=1, mean=(0.3,), std=(0.4,))
COLOURS = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
LABELS = ("nul", "één", "two", "3", "🐛")
CARD = ModelCard("tiny", accuracy=0.9, images=24, data="digits", energy_mj=0.001, license="CC0")


def engine_of(name: str = "meta_spikeformer_15m", side: int = 32, **overrides) -> nn.Module:
    """An engine whose neurons fire."""
    torch.manual_seed(0)
    sizes = SPIKFORMER if name.startswith("spikformer") else PYRAMID
    model = create_model(name, **sizes | overrides).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.3, 1.5)
            nn.init.normal_(module.bias, 0.7, 0.5)
    return integer(model, torch.randn(1, model.config.in_channels, side, side))


@pytest.fixture(scope="module")
def engine() -> nn.Module:
    return engine_of(in_channels=1)


@pytest.fixture(scope="module")
def good(engine, tmp_path_factory) -> bytes:
    """A whole file."""
    path = tmp_path_factory.mktemp("good") / "model.spk"
    return save(engine, path, preprocessing=GREY, labels=LABELS, card=CARD).read_bytes()


@pytest.fixture
def refusal(tmp_path):
    """What loading these bytes says, which must be one sentence of a ValueError that names the file."""

    def complaint(content: bytes) -> str:
        path = tmp_path / "model.spk"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.spk") as caught:
            load(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
        return str(caught.value)

    return complaint


def test_an_exact_network_keeps_its_rounded_images(tmp_path):
    torch.manual_seed(0)
    sizes = PYRAMID | {"neuron": "ie_lif", "layer_scale": 0.0}
    model = prepare(create_model("qsd_transformer_t", **sizes).eval(), bits=4, exact=True)
    engine, images = integer(model, torch.randn(1, 3, 32, 32)), torch.randn(3, 3, 32, 32)
    loaded = load(save(engine, tmp_path / "model.spk"))
    assert isinstance(loaded.engine.net.door, FixedPointDoor)
    assert torch.equal(loaded(images), engine(images))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("meta_spikeformer_15m", {}),
        ("meta_spikeformer_15m", {"neuron": "lif", "steps": 2, "attention": "sdsa4", "distillation": True}),
        ("qsd_transformer_t", {"neuron": "ie_lif", "layer_scale": 1.0}),
        ("spikformer_cifar_4_256", {"attention": "ssa_learnable", "steps": 1}),
    ],
    ids=str,
)
def test_a_loaded_engine_gives_the_same_logits_bit_by_bit_and_saves_to_the_same_bytes(tmp_path, name, overrides):
    engine, images = engine_of(name, **overrides), torch.randn(3, 3, 32, 32)
    path = save(engine, tmp_path / "model.spk")
    loaded = load(path)
    logits = engine(images)
    assert logits.std() > 0
    assert torch.equal(loaded(images), logits)
    assert {name: (t.dtype, t.stride()) for name, t in loaded.engine.state_dict().items()} == {
        name: (t.dtype, t.stride()) for name, t in engine.state_dict().items()
    }
    assert loaded.engine.report() == engine.report()
    written = path.read_bytes()
    assert save(loaded.engine, path).read_bytes() == written


def test_preprocessing_labels_and_card_come_back(good, tmp_path):
    (tmp_path / "model.spk").write_bytes(good)
    loaded = load(tmp_path / "model.spk")
    assert (loaded.preprocessing, loaded.labels, loaded.card) == (GREY, LABELS, CARD)


def test_so_do_framing_and_colours_where_classes_are_of_pixels(segmenter, tmp_path):
    images = torch.randn(1, 3, 32, 32)
    framing = dataclasses.replace(WINDOWS, channels=3, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    about = {"preprocessing": framing, "colours": COLOURS[:4], "card": ModelCard(miou=0.5)}
    loaded = load(save(integer(segmenter("fpn"), images), tmp_path / "model.spk", **about))
    assert {name: getattr(loaded, name) for name in about} == about
    assert loaded.segments


def test_files_from_before_these_existed_still_load(good, tmp_path):
    def change(header: dict) -> None:
        assert "colours" not in header  # nor is it written where it is not known
        for name in ("miou", "map", "ap50", "mask_map"):
            del header["card"][name]

    (tmp_path / "model.spk").write_bytes(forged(good, change))
    loaded = load(tmp_path / "model.spk")
    assert (loaded.preprocessing, loaded.colours, loaded.card, loaded.segments) == (GREY, None, CARD, False)


def test_without_them_nothing_is_invented(engine, tmp_path):
    loaded = load(save(engine, tmp_path / "new" / "model.spk"))
    assert (loaded.preprocessing, loaded.labels, loaded.card) == (None, None, ModelCard())


def test_steps_set_after_building_come_back(tmp_path):
    engine, clip = engine_of(neuron="lif", steps=4), torch.randn(2, 1, 3, 32, 32)
    set_steps(engine, 2)
    assert torch.equal(load(save(engine, tmp_path / "model.spk"))(clip), engine(clip))


def test_integer_weights_are_packed(tmp_path):
    engine = engine_of("qsd_transformer_t", neuron="ie_lif")
    stored = container.read(save(engine, tmp_path / "model.spk")).table
    weights = {name: each for name, each in stored.items() if each.dtype == torch.int8}
    assert weights
    assert all(each.kind in ("int2", "int3", "int4") for each in weights.values())


def test_what_cannot_be_loaded_as_it_is_cannot_be_saved(engine, tmp_path):
    path = tmp_path / "model.spk"
    with pytest.raises(ValueError, match=r"what sf.deploy.integer\(model, images\) gives, not MetaSpikeFormer"):
        save(create_model("meta_spikeformer_15m", **PYRAMID), path)
    with pytest.raises(ValueError, match="neuron of this network is a builder"):
        save(engine_of(neuron=partial(ILIF, levels=2)), path)
    own = nn.Sequential(nn.Conv2d(3, 4, 3), ILIF(steps=1, levels=4), nn.Conv2d(4, 5, 3))
    with pytest.raises(ValueError, match="networks of the catalogue, not Sequential"):
        save(integer(own, torch.randn(1, 3, 8, 8)), path)
    changed = copy.deepcopy(engine)
    changed.net.time_mean = nn.Sequential(changed.net.time_mean, nn.Hardtanh(0, 1e-3))
    with pytest.raises(ValueError, match="no longer what its config says"):
        save(changed, path)
    with pytest.raises(ValueError, match="labels must be a list of 5 names"):
        save(engine, path, labels=["0", "1"])
    with pytest.raises(ValueError, match="a label must be a line"):
        save(engine, path, labels=["\x1b[2J", *"1234"])
    with pytest.raises(ValueError, match="colours must be a list of 5 triples"):
        save(engine, path, colours=COLOURS[:4])
    with pytest.raises(ValueError, match="pictures of 3 channels for a network of 1"):
        save(engine, path, preprocessing=dataclasses.replace(GREY, channels=3, mean=(0.1,) * 3, std=(1,) * 3))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accuracy": 90}, "card.accuracy must be a number from 0 to 1"),
        ({"accuracy": True}, "card.accuracy"),
        ({"miou": 1.01}, "card.miou must be a number from 0 to 1"),
        ({"map": 1.01}, "card.map must be a number from 0 to 1"),
        ({"ap50": -0.1}, "card.ap50 must be a number from 0 to 1"),
        ({"mask_map": "1"}, "card.mask_map must be a number from 0 to 1"),
        ({"energy_mj": -1.0}, "card.energy_mj"),
        ({"ann_energy_mj": float("inf")}, "card.ann_energy_mj"),
        ({"images": 0}, "card.images"),
        ({"license": "a\nb"}, "card.license must be a line"),
        ({"source": "x" * 1001}, "card.source must be a line"),
        ({"versions": {"torch": 2}}, "card.versions must be a line"),
        ({"versions": []}, "card.versions must be a dict"),
    ],
)
def test_cards_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(CARD, **changes)


def test_a_full_disk_leaves_the_file_that_was_there(engine, tmp_path, monkeypatch):
    path = tmp_path / "model.spk"
    path.write_bytes(b"before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(engine, path)
    assert [each.name for each in tmp_path.iterdir()] == ["model.spk"]
    assert path.read_bytes() == b"before"


def corrupted(content: bytes, rng: random.Random) -> bytes:
    """`content` with one accident of the kinds that disks, transfers and editors have."""
    found, size = bytearray(content), len(content)
    at, length = rng.randrange(size), rng.choice((1, 4, 64, 1000))
    kind = rng.choice(("flip", "cut", "cut start", "swap", "insert", "zero", "drop", "random", "append", "newlines"))
    if kind == "flip":
        found[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del found[at:]
    elif kind == "cut start":
        del found[: at + 1]
    elif kind == "swap":
        there, other = slice(at, at + length), slice(start := rng.randrange(size), start + length)
        found[there], found[other] = content[other], content[there]
    elif kind == "insert":
        found[at:at] = rng.randbytes(length)
    elif kind == "zero":
        found[at : at + length] = bytes(len(found[at : at + length]))
    elif kind == "drop":
        del found[at : at + length]
    elif kind == "random":
        found[at : at + length] = rng.randbytes(len(found[at : at + length]))
    elif kind == "append":
        found += rng.randbytes(length)
    else:
        found = found.replace(b"\r\n", b"\n")
    return bytes(found)


def forged(content: bytes, change) -> bytes:
    """`content` with a header that `change` has changed, and right checksums again."""
    _, _, _, length, _, _, _ = container.SIZES.unpack(content[: container.SIZES.size])
    header = json.loads(content[container.PREAMBLE : container.PREAMBLE + length])
    change(header)
    text = json.dumps(header).encode()
    return container.seal(text + b" " * (-len(text) % container.ALIGNMENT), content[container.PREAMBLE + length :])


def put(*place: str, value: object):
    """A change that sets header[place[0]][place[1]]... to `value`."""

    def change(header: dict) -> None:
        *outer, last = place
        for each in outer:
            header = header[each]
        header[last] = value

    return change


def change_a_convolution(**values: object):
    """A change to the first convolution of the engine."""

    def change(header: dict) -> None:
        next(row for row in header["engine"]["modules"] if "geometry" in row[2])[2]["geometry"] |= values

    return change


def rename_a_tensor(header: dict) -> None:
    header["tensors"] = {name + "s": row for name, row in header["tensors"].items()}


def lose_a_tensor(header: dict) -> None:
    header["tensors"].popitem()


def reshape_a_tensor(header: dict) -> None:
    row = next(row for row in header["tensors"].values() if len(row["shape"]) == 4)
    row["shape"] = [row["shape"][1], row["shape"][0], *row["shape"][2:]]


def retype_a_tensor(header: dict) -> None:
    row = next(row for row in header["tensors"].values() if row["kind"] == "float32")
    row["kind"] = "int32"


FORGERIES = {
    "unknown network": (put("network", "stem", value="os.system"), "an unknown network, 'os.system'"),
    "no network": (put("network", value=[]), "describes no network"),
    "config lacks": (lambda header: header["network"]["config"].pop("dims"), "lacks or adds 'dims'"),
    "config adds": (put("network", "config", "__class__", value="x"), "lacks or adds '__class__'"),
    "huge": (put("network", "config", "dims", value=[10**9] * 4), "dims of its config must lie between 0 and 16384"),
    "deep": (put("network", "config", "blocks", value=[10**9] * 5), "blocks of its config must lie between"),
    "many": (put("network", "config", "blocks", value=[1] * 10**5), "a list of at most 64"),
    "many classes": (put("network", "config", "num_classes", value=2**40), "num_classes of its config must lie"),
    "negative": (put("network", "config", "steps", value=-1), "steps of its config must lie between"),
    "no heads": (put("network", "config", "heads", value=0), "heads"),
    "true": (put("network", "config", "steps", value=True), "steps of its config must be int, got 'True'"),
    "text": (put("network", "config", "levels", value="4"), "levels of its config must be int"),
    "long name": (put("network", "config", "neuron", value="lif" * 10**5), "must be a name, got 300000 characters"),
    "unknown neuron": (put("network", "config", "neuron", value="li"), "unknown neuron 'li'"),
    "other classes": (put("network", "config", "num_classes", value=6), "labels must be a list of 6"),
    "padding": (change_a_convolution(padding=[10**6] * 2), "is no convolution of a network"),
    "groups": (change_a_convolution(groups=0), ""),
    "true as a size": (change_a_convolution(groups=True), "groups of its engine must be int, got 'True'"),
    "infinite": (change_a_convolution(kernel=[2**40, 1]), "kernel of its engine must be two whole"),
    "channels out": (change_a_convolution(out_channels=2**40), ""),
    "no engine": (put("engine", value=None), ""),
    "engine of numbers": (put("engine", value=[1, 2]), ""),
    "section lost": (lambda header: header.pop("card"), "must have card, engine, labels"),
    "section added": (put("code", value="print()"), "must have card, engine, labels"),
    "preprocessing": (put("preprocessing", "size", value=10**6), "size=1000000"),
    "channels": (put("preprocessing", value=dataclasses.asdict(GREY) | {"channels": 3}), "mean must be"),
    "framing": (put("preprocessing", value=dataclasses.asdict(WINDOWS) | {"short_side": 10**6}), "got 1000000"),
    "framing adds": (put("preprocessing", value=dataclasses.asdict(WINDOWS) | {"path": "x"}), "path"),
    "letterbox": (put("preprocessing", value=dataclasses.asdict(LETTERBOX) | {"window": [10**6, 1]}), "window must"),
    "letterbox adds": (put("preprocessing", value=dataclasses.asdict(LETTERBOX) | {"path": "x"}), "path"),
    "padding of letterbox": (put("preprocessing", value=dataclasses.asdict(LETTERBOX) | {"padded_to": 2**40}), "got"),
    "framing of 3 channels": (
        put("preprocessing", value=dataclasses.asdict(WINDOWS) | {"channels": 3, "mean": [0] * 3, "std": [1] * 3}),
        "pictures of 3 channels for a network of 1",
    ),
    "window": (put("preprocessing", value=dataclasses.asdict(WINDOWS) | {"window": [1, True]}), "window must be"),
    "no colours": (put("colours", value={}), "colours must be a list of 5"),
    "few colours": (put("colours", value=[[0, 0, 0]]), "colours must be a list of 5"),
    "flat colours": (put("colours", value=[0] * 5), "colours must be a list of 5"),
    "bright colours": (put("colours", value=[[0, 0, 256]] * 5), "colours must be a list of 5"),
    "true colours": (put("colours", value=[[0, 0, True]] * 5), "colours must be a list of 5"),
    "card's miou": (put("card", "miou", value="1"), "card.miou"),
    "labels": (put("labels", value=["a"]), "labels must be a list of 5"),
    "label": (put("labels", value=["a", "b", "c", "d", "\x1b]0;"]), "a label must be a line"),
    "label of numbers": (put("labels", value=[0, 1, 2, 3, 4]), "a label must be a line"),
    "card": (put("card", "accuracy", value=1.5), "card.accuracy"),
    "card adds": (put("card", "script", value="x"), "script"),
    "renamed": (rename_a_tensor, "its tensors are not those of its network"),
    "lost": (lose_a_tensor, "its tensors take"),
    "reshaped": (reshape_a_tensor, "its tensors are not those of its network"),
    "retyped": (retype_a_tensor, "its tensors are not those of its network"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_header_with_right_checksums_is_refused(good, refusal, name):
    change, said = FORGERIES[name]
    assert said in refusal(forged(good, change))


def test_the_version_that_wrote_a_file_is_told_if_it_is_another(good, refusal):
    def change(header):
        header["version"] = "99.0"
        header["network"]["config"]["new_option"] = True

    assert "written by spikeformers '99.0', this is " in refusal(forged(good, change))


def test_a_scale_that_is_no_number_is_refused(good, refusal):
    length = container.SIZES.unpack(good[: container.SIZES.size])[3]
    header, payload = good[container.PREAMBLE :][:length], bytearray(good[container.PREAMBLE + length :])
    name, row = next((n, r) for n, r in json.loads(header)["tensors"].items() if n.endswith("scale"))
    payload[row["offset"] : row["offset"] + 4] = b"\0\0\xc0\x7f"
    assert f"tensor {name} holds numbers that are not finite" in refusal(container.seal(header, payload))


def leaves(value: object, place: tuple = ()):
    """Every place in nested dicts and lists that holds neither."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, (*place, key))
    else:
        yield place


def vandalised(content: bytes, rng: random.Random) -> bytes:
    """`content` with nonsense in one place of its header, and right checksums."""

    def change(header: dict) -> None:
        value = rng.choice((None, True, -1, 0, 2**62, 1e308, -0.5, "", "x" * 500, [], [[]], {}, {"kind": "x"}))
        put(*rng.choice(list(leaves(header))), value=value)(header)

    return forged(content, change)


def unnoticed(good: bytes, path: Path, *, accidents: int, forgeries: int) -> list[int]:
    """Numbers of the accidents after which a changed file loaded; forgeries may, if nonsense is a value like another.

    Neither may load code, or take much memory.
    """
    rng, loaded = random.Random(0), []
    path.write_bytes(good)
    load(path)
    modules, memory = set(sys.modules), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(accidents + forgeries):
        damaged = corrupted(good, rng) if number < accidents else vandalised(good, rng)
        path.write_bytes(damaged)
        try:
            load(path)
        except ValueError:
            continue
        loaded += [number] if number < accidents and damaged != good else []
    assert set(sys.modules) == modules
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 * 1024  # KiB
    return loaded


def test_random_damage_is_always_noticed(good, tmp_path):
    assert unnoticed(good, tmp_path / "model.spk", accidents=90, forgeries=10) == []


@pytest.mark.slow
def test_random_damage_is_always_noticed_2000_times(good, tmp_path):
    assert unnoticed(good, tmp_path / "model.spk", accidents=1700, forgeries=300) == []
