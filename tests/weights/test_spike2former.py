"""Spike2Former's checkpoints: every key of the authors' list, values in their places, and what a refusal says."""

import sys
from collections import OrderedDict
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spikeformers.weights import load_backbone, load_official, read_checkpoint
from spikeformers.weights.segmenter import keys_of
from spikeformers.zoo import create_model, from_pretrained, import_checkpoint
from tests.weights.conftest import as_their_file, randomised

SMALL = {
    **{"dims": (8, 16, 32, 40), "dim": 32, "queries": 7, "encoder_layers": 2, "encoder_hidden": 64, "groups": 4},
    **{"decoder_layers": 2, "decoder_heads": 4, "decoder_hidden": 48},
}
TOLD = {"levels": 4, "alpha": 4.0, "layout": "released"}


def model_of(**overrides) -> torch.nn.Module:
    return create_model("spike2former_ade20k", **(SMALL | TOLD | {"num_classes": 5} | overrides))


@pytest.fixture(scope="module")
def keys(listed) -> dict[str, tuple[int, ...]]:
    return listed("spike2former_ade20k_keys.txt")


@pytest.fixture(scope="module")
def source() -> torch.nn.Module:
    return randomised(model_of())


@pytest.fixture
def official(source, keys) -> dict[str, torch.Tensor]:
    return as_their_file(source, keys)


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "outputs", "hidden"), [("ade20k", 151, 1024), ("voc", 22, 1024), ("cityscapes", 20, 2048)]
)
def test_every_key_of_the_authors_list_has_its_place_and_shape(name, outputs, hidden, keys):
    def sizes(key: str) -> list[int]:
        changes = {151: outputs} | ({1024: hidden} if ".encoder.layers." in key else {})
        return [changes.get(side, side) for side in keys[key]]

    with torch.device("meta"):
        model = create_model(f"spike2former_{name}")
        bare = {key.removeprefix("backbone."): torch.empty(sizes(key)) for key in keys}
    names = keys_of(model.config)
    found = {names.own_key(key): names.own_tensor(key, tensor).shape for key, tensor in bare.items()}
    assert len(keys) == len(found) == 1860
    assert found == {key: tensor.shape for key, tensor in model.state_dict().items()}


def test_all_tensors_of_a_file_arrive_and_the_report_says_what_it_cannot_know(source, official):
    model = model_of()
    report = load_official(model, {"meta": {}, "state_dict": OrderedDict(official)})
    assert same(model, source)
    assert (report.loaded, report.dropped, report.kept) == (len(model.state_dict()), (), ())
    assert f"loaded {report.loaded} tensors of a file of mmsegmentation" in str(report)
    assert "does not tell levels=4, alpha=4.0, layout='released'" in str(report)
    wrapped = {f"module.{key}": tensor for key, tensor in official.items()}
    assert load_official(model_of(), wrapped).framework == "mmsegmentation and DistributedDataParallel"


def test_a_loaded_head_computes_the_authors_numbers(keys, pytestconfig):
    arrays = load_file(pytestconfig.rootpath / "tests" / "parity" / "spike2former_head.safetensors")
    case = {key.removeprefix("head_small_D4_T1/"): each.double() for key, each in arrays.items() if "head_small" in key}
    sizes = {"dims": (8, 16, 24, 20), "heads": 4, "queries": 10, "encoder_hidden": 32, "decoder_layers": 3}
    model = model_of(**sizes, decoder_hidden=64)
    head = {f"decode_head.{key[2:]}": value.float() for key, value in case.items() if key.startswith("w.")}
    file = as_their_file(model, keys)
    counters = {key: tensor for key, tensor in file.items() if key.endswith("num_batches_tracked")}
    stages = {key: tensor for key, tensor in file.items() if key.startswith("backbone.")}
    load_official(model, stages | counters | head)
    model.double().eval()
    output = model.head([case[f"feat{level}"][0] for level in (0, 1, 2, 2, 3)])  # stage 3 is not read
    # Sums in another order.
    torch.testing.assert_close(output.class_logits, case["cls"][-1], rtol=0, atol=1e-12)
    torch.testing.assert_close(output.mask_logits, case["mask"][-1], rtol=0, atol=1e-11)


class HistoryBuffer:
    """Pickled as mmengine's: it names its own methods, and numpy's arrays."""

    def __init__(self) -> None:
        self._log_history = np.array([1.0, 2.0])

    def mean(self) -> float:
        return 1.5

    def __getstate__(self) -> dict:
        return {**vars(self), "statistics_methods": {"mean": HistoryBuffer.mean}}


def save_as_mmengine(file: dict, path, monkeypatch) -> None:
    """A checkpoint as mmengine's CheckpointHook writes it, log of the training included."""
    name = "mmengine.logging.history_buffer"
    module = ModuleType(name)
    module.HistoryBuffer = HistoryBuffer
    with monkeypatch.context() as patch:
        for package in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, package, ModuleType(package))
        patch.setitem(sys.modules, name, module)
        for named in (HistoryBuffer, HistoryBuffer.mean):
            patch.setattr(named, "__module__", name)
        log = {"log_scalars": OrderedDict(loss=HistoryBuffer()), "runtime_info": {"best_score": np.float64(44.5)}}
        meta = {"iter": 3, "cfg": "T = 4", "dataset_meta": {"classes": ("wall",)}}
        torch.save({"meta": meta, "state_dict": OrderedDict(file), "message_hub": log}, path)


def test_an_mmengine_checkpoint_is_imported_without_mmengine(official, source, tmp_path, monkeypatch):
    save_as_mmengine(official, tmp_path / "best.pth", monkeypatch)
    with pytest.raises(Exception, match="HistoryBuffer"):
        torch.load(tmp_path / "best.pth", weights_only=True)
    assert read_checkpoint(tmp_path / "best.pth").keys() == official.keys()
    overrides = SMALL | TOLD
    said = import_checkpoint(
        tmp_path / "best.pth", name="spike2former_ade20k", out=tmp_path / "out", overrides=overrides
    )
    assert "mmsegmentation" in said
    assert "does not tell levels=4" in said
    model = from_pretrained(tmp_path / "out")
    assert same(model, source)
    assert model.config.num_classes == 5
    assert model.config.head.layout == "released"


@pytest.mark.parametrize("given", [{}, {"levels": 4}, {"levels": 4, "alpha": 4.0}])
def test_an_import_asks_for_what_no_checkpoint_tells(given, official, tmp_path):
    save_file(official, tmp_path / "file.safetensors")
    missing = ", ".join(name for name in TOLD if name not in given)
    with pytest.raises(ValueError, match=f"does not tell {missing}, .*--set levels=4 alpha=4.0 layout=released"):
        import_checkpoint(
            tmp_path / "file.safetensors", name="spike2former_ade20k", out=tmp_path / "out", overrides=SMALL | given
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"num_classes": 19}, r"classifier.weight is \(6, 32, 1, 1\), needs \(20, .*num_classes=5"),
        ({"dims": (16, 32, 64, 80)}, r"looks like dims=\(8, 16, 32, 40\) with a head of dim=32, queries=7"),
        ({"encoder_hidden": 32}, "encoder_hidden=64"),
        ({"encoder_layers": 3}, r"missing \(head.pixel_decoder.encoders.0.layer2"),
        ({"decoder_layers": 1}, r"unexpected \(head.decoder.layers.1"),
    ],
)
def test_a_file_of_other_sizes_is_refused_with_its_sizes_and_nothing_changes(overrides, said, official):
    model = model_of(**overrides)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        load_official(model, official)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_no_tensor_vanishes_unseen(official):
    strange = {"decode_head.pixel_decoder.encoder_in_proj_spike.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"encoder_in_proj_spike.*what is read: the decode_head of Spike2Former"):
        load_official(model_of(), official | strange)
    with pytest.raises(ValueError, match=r"not of Segmenter: backbone\.block9"):
        load_official(model_of(), official | {"backbone.block9.weight": torch.zeros(1)})
    del official["decode_head.w"]
    with pytest.raises(ValueError, match=r"1 missing \(head.embedding.shortcut.weight\)"):
        load_official(model_of(), official)


def test_a_classifiers_file_is_sent_to_load_backbone_which_takes_it(official, source, tmp_path):
    stages = {key.removeprefix("backbone."): t for key, t in official.items() if key.startswith("backbone.")}
    classifier = stages | {"head.weight": torch.zeros(1000, 40), "head.bias": torch.zeros(1000)}
    with pytest.raises(ValueError, match=r"backbone only.*load_backbone"):
        load_official(model_of(), stages)
    with pytest.raises(ValueError, match="backbone only"):
        load_official(model_of(), classifier)
    torch.save({"model": classifier}, tmp_path / "checkpoint-199.pth")
    model = model_of()
    report = load_backbone(model, tmp_path / "checkpoint-199.pth")
    assert same(model.backbone, source.backbone)
    assert report.dropped == ("head.weight", "head.bias")
    with pytest.raises(ValueError, match=r"looks like dims=\(8, 16, 32, 40\)"):
        load_backbone(model_of(dims=(16, 32, 64, 80)), tmp_path / "checkpoint-199.pth")


def test_a_head_that_stays_out_is_not_described(source, tmp_path):
    source.save_pretrained(tmp_path)
    other = create_model("meta_spikeformer_15m_fpn_voc", dims=(16, 32, 64, 80), blocks=(1, 1, 1, 1, 1), fpn_dim=8)
    with pytest.raises(ValueError, match=r"the file looks like dims=\(8, 16, 32, 40\)$"):
        load_backbone(other, tmp_path)


def test_the_authors_segmenter_starts_one_with_other_classes(official, source, tmp_path):
    save_file(official, tmp_path / "ade20k.safetensors")
    model = model_of(num_classes=3)
    report = load_backbone(model, tmp_path / "ade20k.safetensors")
    new = ("head.embedding.classifier.weight", "head.embedding.classifier.bias")
    assert report.kept == new
    theirs = source.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.state_dict().items() if key not in new)
