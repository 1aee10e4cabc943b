"""Training low-bit weights, and a student of q, k and v: what the loop does with the two groups of a recipe."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

import spikeformers as sf
from spikeformers.backbones.qsd_transformer import ANN_TWIN
from spikeformers.quantize import LSQLayer
from spikeformers.train.loop import train
from spikeformers.train.recipe import FineGrained, Init, Quantize, Saving, override
from spikeformers.train.results import training_rows
from spikeformers.train.saved import read_run
from spikeformers.train.summary import read_summary
from spikeformers.train.tasks import build_fgd_teacher
from tests.train.test_loop import assert_same_run, interrupt_at


def bits_of(model):
    return {name: each.bits for name, each in model.named_modules() if isinstance(each, LSQLayer)}


@pytest.fixture
def student(tiny):
    """Call with fields of `Recipe`: a tiny QSD-Transformer on digits."""
    recipe = tiny()
    options = {"heads": 2, "layer_scale": 1.0, "bits": 4}
    choice = {"name": "qsd_transformer_t", "neuron": "ie_lif", "options": options}
    # 16 pixels to 4x4 tokens: one token alone is always alike to itself, and nothing would be learnt from a teacher.
    model = dataclasses.replace(recipe.model, strides=(2, 2, 1, 1, 1), blocks=(0, 0, 0, 1, 0), **choice)
    return lambda **changes: dataclasses.replace(recipe, model=model, **changes)


@pytest.fixture
def teacher(student, tmp_path):
    """The run of the student's ANN twin."""
    recipe = student()
    twin = {name: value for name, value in ANN_TWIN.items() if name not in ("neuron", "steps")}
    model = dataclasses.replace(recipe.model, neuron="gelu", options=recipe.model.options | twin)
    train(dataclasses.replace(recipe, model=model, name="ann"), run=tmp_path / "ann")
    return tmp_path / "ann"


def test_a_recipe_quantises_the_layers_it_names_and_the_saved_model_is_that_network(tiny, tmp_path):
    recipe = tiny(quantize=Quantize(bits=3, layers={"attention": 2, "first": 0}, per_channel=False, offset=True))
    summary = train(recipe, run=tmp_path / "run")
    model, stored, _ = read_run(tmp_path / "run")
    bits = bits_of(model)
    assert stored == recipe
    assert "stage1a.down.conv.conv" not in bits
    assert {width for name, width in bits.items() if ".attn." in name} == {2}
    assert {width for name, width in bits.items() if ".attn." not in name} == {3}
    assert all(each.offset is not None and len(each.alpha) == 1 for each in model.modules() if hasattr(each, "alpha"))
    assert summary.quantized["packed_mb"] == sf.quantize.size(model).packed_mb
    assert any(label == "Low-bit weights" for label, _ in training_rows(summary))


def test_step_sizes_of_a_loaded_network_come_from_its_weights(tiny, tmp_path):
    train(tiny(), run=tmp_path / "float")
    recipe = tiny(quantize=Quantize(bits=4), init=Init(backbone=str(tmp_path / "float")), optim=tiny().optim)
    recipe = override(override(recipe, "optim.lr", "0"), "optim.min_lr", "0")
    train(recipe, run=tmp_path / "low")
    loaded = load_file(tmp_path / "float" / "model" / "model.safetensors")
    trained = load_file(tmp_path / "low" / "model" / "model.safetensors")
    key = "stage3.block0.mlp.conv1.conv"
    assert torch.equal(trained[f"{key}.weight"], loaded[f"{key}.weight"])
    expected = 2 * loaded[f"{key}.weight"].abs().mean() / 7**0.5  # sqrt(Qp) of 4 bits
    assert torch.allclose(trained[f"{key}.alpha"], expected.expand(8 * 4), rtol=1e-6)  # one rounding of the mean


def test_an_interrupted_low_bit_student_ends_as_the_uninterrupted_one(student, teacher, tmp_path, monkeypatch):
    recipe = student(fgd=FineGrained(teacher=str(teacher)), ema_decay=0.9, saving=Saving(every_steps=2, keep=0))
    summary = train(recipe, run=tmp_path / "whole")
    interrupt_at(monkeypatch, 1, 29)
    with pytest.raises(ConnectionError):
        train(recipe, run=tmp_path / "broken")
    train(recipe, run=tmp_path / "broken", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken", epochs=2)
    assert summary.distillation["teacher_accuracy"] == read_summary(teacher).accuracy
    assert summary.distillation["kept_mb"] > summary.distillation["kept_plain_mb"] > 0
    assert {"Teacher", "Distillation"} <= {label for label, _ in training_rows(summary)}


def test_distillation_changes_what_is_learnt_and_weight_zero_does_not(student, teacher, tmp_path):
    taught = FineGrained(teacher=str(teacher))
    learnt = {}
    for name, fgd in (("none", FineGrained()), ("zero", dataclasses.replace(taught, weight=0.0)), ("two", taught)):
        train(student(epochs=1, fgd=fgd), run=tmp_path / name)
        weights = load_file(tmp_path / name / "model" / "model.safetensors")
        learnt[name] = weights["stage3.block0.attn.q_conv.pw1.weight"]
    assert torch.equal(learnt["none"], learnt["zero"])
    assert not torch.equal(learnt["none"], learnt["two"])


def test_a_teacher_that_does_not_exist_is_named_before_anything_is_written(student, tmp_path):
    for name in ("runs/nowhere", "caformer_s19"):
        with pytest.raises(ValueError, match=f"fgd.teacher '{name}' is neither a folder"):
            train(student(fgd=FineGrained(teacher=name)), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_network_of_timm_teaches_with_weights_of_the_same_classes_only():
    teacher = build_fgd_teacher(FineGrained(teacher="caformer_s18", weights="random"), num_classes=10, in_channels=3)
    assert teacher.num_classes == 10
    assert not any(each.requires_grad for each in teacher.parameters())
    with pytest.raises(ValueError, match=r"fgd\.teacher 'caformer_s18' know 1000 classes"):
        build_fgd_teacher(FineGrained(teacher="caformer_s18"), num_classes=10, in_channels=3)
