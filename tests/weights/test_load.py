"""Checkpoints: strict, safe, and clear about what does not fit."""

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from spikeformers.heads.yolo import PRIOR
from spikeformers.weights import load_backbone, load_official, load_strict, read_checkpoint
from spikeformers.weights.meta_spikeformer import LAYERS, STAGES, describe_widths, own_key
from spikeformers.zoo import create_model, from_pretrained, import_checkpoint, options_of

TINY = {"dims": (8, 16, 32, 40), "num_classes": 10}


@pytest.fixture(scope="module")
def official(pytestconfig) -> dict[str, torch.Tensor]:
    tensors = load_file(pytestconfig.rootpath / "tests" / "parity" / "meta_spikeformer.safetensors")
    return {key[6:]: tensor for key, tensor in tensors.items() if key.startswith("state.")}


def model_of(**overrides) -> torch.nn.Module:
    return create_model("meta_spikeformer_15m", **(TINY | overrides))


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def unchanged(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_every_official_key_has_one_name_of_ours(official):
    model = model_of(distillation=True)
    assert {own_key(key) for key in official} == set(model.state_dict())
    assert len(set(STAGES.values())) == len(STAGES)
    assert len(set(LAYERS.values())) == len(LAYERS)
    assert own_key("block3.6.attn.q_conv.1.weight") is None


def test_a_distillation_head_is_dropped_and_reported(official):
    report = load_official(model_of(), official)
    assert report.dropped == ("head_kd.bias", "head_kd.weight")
    assert "dropped from the file: head_kd.bias, head_kd.weight" in str(report)


def test_segmentation_and_detection_files_load_without_a_classifier(official):
    backbone = {f"backbone.{k}": v for k, v in official.items() if not k.startswith("head")}
    model = model_of()
    before = model.head.weight.clone()
    report = load_official(model, {"state_dict": backbone | {"decode_head.conv.weight": torch.zeros(1)}})
    assert report.kept == ("head.weight", "head.bias")
    assert report.dropped == ("decode_head.conv.weight",)
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.stage1a.down.conv.conv.weight, official["downsample1_1.encode_conv.weight"])


def test_checkpoints_of_another_width_say_which_size_they_look_like(official):
    model = model_of(dims=(16, 32, 64, 80))
    before = values(model)
    with pytest.raises(ValueError, match=r"looks like dims=\(8, 16, 32, 40\)"):
        load_official(model, official)
    assert unchanged(model, before)
    with torch.device("meta"):
        assert "meta_spikeformer_31m" in describe_widths(create_model("meta_spikeformer_31m").state_dict())


def test_a_missing_or_foreign_tensor_is_refused_and_nothing_changes(official):
    model = model_of()
    before = values(model)
    short = {k: v for k, v in official.items() if k != "block3.2.mlp.fc1_conv.weight"}
    with pytest.raises(ValueError, match=r"stage3\.block2\.mlp\.conv1\.conv\.weight"):
        load_official(model, short)
    with pytest.raises(ValueError, match="block9"):
        load_official(model, official | {"block9.weight": torch.zeros(1)})
    assert unchanged(model, before)


def test_the_authors_pickles_are_read_without_running_code(official, tmp_path):
    content = {"model": official, "epoch": 3, "args": argparse.Namespace(blr=6e-4), "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "authors.pth")
    assert read_checkpoint(tmp_path / "authors.pth").keys() == official.keys()


class Attack:
    def __init__(self, flag: str) -> None:
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (self.flag,)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    flag = tmp_path / "code-ran"
    torch.save({"model": Attack(str(flag))}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": Attack(str(flag))}))
    for name in ("evil.pth", "evil.pkl"):
        with pytest.raises(ValueError, match="refused"):
            read_checkpoint(tmp_path / name)
    assert not flag.exists()


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors", "text.pth", "empty.safetensors"])
def test_damaged_files_give_one_clear_error(name, tmp_path, official):
    path = tmp_path / name
    if name.startswith("cut"):
        whole = tmp_path / f"whole{path.suffix}"
        save_file(official, whole) if path.suffix == ".safetensors" else torch.save(official, whole)
        path.write_bytes(whole.read_bytes()[:50_000])
    else:
        path.write_text("no checkpoint" if name.startswith("text") else "")
    with pytest.raises(ValueError, match=name):
        read_checkpoint(path)


def test_import_writes_a_model_that_loads_and_says_what_it_dropped(official, tmp_path):
    torch.save({"model": official}, tmp_path / "kd.pth")
    said = import_checkpoint(
        tmp_path / "kd.pth", name="meta_spikeformer_15m", out=tmp_path / "out", overrides={"dims": TINY["dims"]}
    )
    assert "head_kd.weight" in said
    model = from_pretrained(tmp_path / "out")
    assert torch.equal(model.head.weight, official["head.weight"])
    assert not model.training


def test_a_failed_import_leaves_nothing_behind(official, tmp_path):
    save_file(official, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="looks like"):
        import_checkpoint(
            tmp_path / "small.safetensors", name="meta_spikeformer_15m", out=tmp_path / "out", overrides={}
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.safetensors"]


@pytest.mark.parametrize("kind", ["folder", "run", "safetensors", "official"])
def test_every_backbone_weight_arrives_and_a_new_classifier_is_xavier(kind, official, tmp_path):
    source = model_of()
    load_official(source, official)
    path = tmp_path / "source"
    if kind in ("folder", "run"):
        source.save_pretrained(path if kind == "folder" else path / "model")
    elif kind == "safetensors":
        path = tmp_path / "source.safetensors"
        save_file(source.state_dict(), path)
    else:
        path = tmp_path / "source.pth"
        torch.save({"model": official}, path)
    model = model_of(num_classes=3)
    report = load_backbone(model, path)
    loaded = model.state_dict()
    for key, tensor in source.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(loaded[key], tensor), key
    assert set(report.kept) == {"head.weight", "head.bias"}
    bound = (6 / (40 + 3)) ** 0.5
    assert 0.5 * bound < model.head.weight.abs().max() <= bound
    assert model.head.bias.abs().max() == 0


def test_a_backbone_of_another_width_is_refused(tmp_path):
    model_of(dims=(8, 16, 32, 48)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="looks like"):
        load_backbone(model_of(), tmp_path / "other")
    with pytest.raises(ValueError, match="neither a run nor a saved model"):
        load_backbone(model_of(), tmp_path)


def test_strict_loading_names_what_is_missing():
    model = model_of()
    weights = values(model)
    del weights["head.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(head.bias\)"):
        load_strict(model, weights)


def test_layers_that_the_source_lacks_are_new_and_reported(tmp_path):
    source = model_of()
    source.save_pretrained(tmp_path / "sdsa3")
    model = model_of(attention="sdsa4")
    report = load_backbone(model, tmp_path / "sdsa3")
    assert all(key.endswith("attn.threshold") for key in report.kept)
    assert len(report.kept) == 8
    assert model.stage3.block0.attn.attn.threshold.item() == 0.5
    with pytest.raises(ValueError, match="unexpected"):
        load_backbone(source, save_with_extra(model, tmp_path / "extra"))
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no weight"):
        load_backbone(model, tmp_path / "other.safetensors")


def save_with_extra(model: torch.nn.Module, path) -> str:
    model.save_pretrained(path)
    return path


def test_prefixes_of_wrappers_do_not_hide_other_networks(official):
    wrapped = {f"module.backbone.{k}": v for k, v in official.items() if not k.startswith("head")}
    report = load_official(model_of(), wrapped | {"module.decode_head.w": torch.zeros(1)})
    assert report.dropped == ("module.decode_head.w",)


def test_a_checkpoint_of_a_pre_training_drops_its_decoder_by_name_and_others_nothing(tmp_path):
    model = model_of()
    weights = {f"encoder.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(weights | {"decoder.norm.weight": torch.zeros(3)}, tmp_path / "mae.safetensors")
    assert load_backbone(model_of(), tmp_path / "mae.safetensors").dropped == ("decoder.norm.weight",)
    save_file(weights | {"anything.else": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"unexpected|holds no weight"):
        load_backbone(model_of(), tmp_path / "other.safetensors")


def segmenter_of(**overrides) -> torch.nn.Module:
    sizes = {"dims": TINY["dims"], "steps": 1, "neck_dim": 8, "fpn_dim": 8, "num_classes": 5}
    return create_model("meta_spikeformer_15m_fpn_ade20k", **(sizes | overrides))


@pytest.mark.parametrize("kind", ["run", "official"])
def test_a_segmenter_takes_the_stages_of_a_classifier_and_keeps_its_head_as_built(kind, official, tmp_path):
    classifier = model_of(steps=1)
    if kind == "official":
        load_official(classifier, official)
        save_file(official, tmp_path / "official.safetensors")
    else:
        classifier.save_pretrained(tmp_path / "run" / "model")
    model = segmenter_of()
    head = values(model.head)
    report = load_backbone(model, tmp_path / ("official.safetensors" if kind == "official" else "run"))
    theirs = values(classifier)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.backbone.state_dict().items())
    assert unchanged(model.head, head)
    assert {"head.weight", "head.bias"} <= set(report.dropped)
    assert set(report.kept) == {f"head.{key}" for key in head}
    assert report.differs == ()


def test_a_segmenter_takes_another_one_but_for_the_layer_of_other_classes(tmp_path):
    source = segmenter_of(num_classes=3)
    source.save_pretrained(tmp_path / "model")
    same, other = segmenter_of(num_classes=3), segmenter_of()
    assert load_backbone(same, tmp_path).kept == ()
    assert unchanged(same, values(source))
    before, theirs = values(other), values(source)
    report = load_backbone(other, tmp_path)
    new = {"head.classifier.classify.weight", "head.classifier.classify.bias"}
    assert set(report.kept) == new
    assert all(torch.equal(tensor, (before if key in new else theirs)[key]) for key, tensor in values(other).items())


def test_a_segmenter_built_otherwise_than_its_source_says_so(tmp_path):
    model_of(steps=1, heads=4).save_pretrained(tmp_path / "model")
    assert load_backbone(segmenter_of(), tmp_path).differs == ("heads=8, there 4",)
    with pytest.raises(ValueError, match="another shape"):
        load_backbone(segmenter_of(dims=(8, 16, 32, 48)), tmp_path)


def spike2former_of(**overrides) -> torch.nn.Module:
    sizes = {"dim": 16, "queries": 6, "encoder_layers": 1, "decoder_layers": 1, "groups": 4, "decoder_heads": 2}
    return create_model("spike2former_voc", **(sizes | {"dims": TINY["dims"], "num_classes": 5} | overrides))


def test_what_the_catalogue_gave_the_source_is_compared_too(tmp_path):
    """sdsa3 scales by 1/8 with thresholds of 1/2, sdsa3_width by head width: weights fit, and mean something else."""
    model_of(neuron="ni_lif").save_pretrained(tmp_path / "model")
    assert load_backbone(spike2former_of(), tmp_path).differs == ()  # no catalogue, nothing overridden
    found = load_backbone(spike2former_of(), tmp_path, options=options_of).differs
    assert found == ("attention=sdsa3_width, there sdsa3",)
    model_of(neuron="ni_lif", attention="sdsa3_width").save_pretrained(tmp_path / "model")
    assert load_backbone(spike2former_of(), tmp_path, options=options_of).differs == ()


def test_a_head_of_another_kind_stays_out(tmp_path):
    source, model = segmenter_of(num_classes=5), spike2former_of()
    source.save_pretrained(tmp_path / "model")
    head = values(model.head)
    report = load_backbone(model, tmp_path)
    assert unchanged(model.backbone, values(source.backbone))
    assert unchanged(model.head, head)
    assert set(report.dropped) == {f"head.{key}" for key in source.head.state_dict()}
    assert set(report.kept) == {f"head.{key}" for key in head}


DETECTORS = {
    "yolo": {"dim": 8},
    "mask_rcnn": {"region_dim": 8, "fc_dim": 8, "norm": "batch_norm"},
}


def detector_of(kind: str, **overrides) -> torch.nn.Module:
    sizes = {"dims": TINY["dims"], "steps": 1, "num_classes": 5}
    return create_model(f"meta_spikeformer_15m_{kind}", **(DETECTORS[kind] | sizes | overrides))


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("source", ["run", "official", "mmdetection"])
def test_a_detector_takes_the_stages_of_a_classifier_and_keeps_its_head_as_built(kind, source, official, tmp_path):
    classifier = model_of(steps=1)
    load_official(classifier, official)
    path = tmp_path / "run"
    if source == "run":
        classifier.save_pretrained(path / "model")
    else:
        path = tmp_path / "authors.safetensors"
        stages = {f"backbone.{key}": value for key, value in official.items() if not key.startswith("head")}
        save_file(official if source == "official" else stages | {"rpn_head.conv.bias": torch.zeros(2)}, path)
    model = detector_of(kind)
    head = values(model.head)
    report = load_backbone(model, path)
    theirs = values(classifier)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.backbone.state_dict().items())
    assert unchanged(model.head, head)
    assert report.dropped
    assert set(report.kept) == {f"head.{key}" for key in head}
    assert report.differs == ()


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("yolo", {"predict.0.conv", "predict.1.conv", "predict.2.conv"}),
        ("mask_rcnn", {"boxes.classify", "boxes.deltas", "masks.classify"}),
    ],
)
def test_a_detector_takes_another_one_but_for_layers_of_other_classes_which_stay_as_built(kind, layers, tmp_path):
    source = detector_of(kind, num_classes=3)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    source.save_pretrained(tmp_path / "model")
    model = detector_of(kind)
    before, theirs = values(model), values(source)
    report = load_backbone(model, tmp_path)
    new = {f"head.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert set(report.kept) == new
    assert all(torch.equal(tensor, (before if key in new else theirs)[key]) for key, tensor in values(model).items())
    if kind == "yolo":  # few objects are expected: five classes behind the objectness of each anchor
        objectness = model.head.predict[0].conv.bias.view(-1, 5 + 5)[:, 4]
        assert torch.equal(objectness, torch.tensor(PRIOR).logit().expand(len(objectness)))


def test_a_detector_takes_no_head_of_another_kind(tmp_path):
    detector_of("yolo").save_pretrained(tmp_path / "model")
    model = detector_of("mask_rcnn")
    head = values(model.head)
    report = load_backbone(model, tmp_path)
    assert unchanged(model.head, head)
    assert set(report.kept) == {f"head.{key}" for key in head}


def test_the_authors_detectors_are_no_models_of_ours_but_their_stages_are(official):
    with pytest.raises(ValueError, match=r"the head of this Detector, a YOLO: start its backbone .* load_backbone"):
        load_official(detector_of("yolo"), official)
