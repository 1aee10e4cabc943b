"""QSD-Transformer's checkpoints, and float ones that start it: step sizes, scales, and what a refusal says."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spikeformers.quantize import LSQLayer, convert, plain, prepare
from spikeformers.weights import load_backbone, load_official, load_strict
from spikeformers.weights.qsd_transformer import UNUSED, describe_widths, own_key, unset_steps
from spikeformers.zoo import create_model, from_pretrained, import_checkpoint

TINY = {"dims": (8, 16, 32, 40), "num_classes": 10}
FLOAT, LOW_BIT = "meta_spikeformer_15m", "qsd_transformer_t"
LAYERS, SCALES = 138, 16


@pytest.fixture(scope="module")
def official(pytestconfig) -> dict[str, torch.Tensor]:
    tensors = load_file(pytestconfig.rootpath / "tests" / "parity" / "qsd_transformer.safetensors")
    return {key[6:]: tensor for key, tensor in tensors.items() if key.startswith("state/")}


@pytest.fixture(scope="module")
def official_float(pytestconfig) -> dict[str, torch.Tensor]:
    """A Meta-SpikeFormer of the authors, of the same widths."""
    tensors = load_file(pytestconfig.rootpath / "tests" / "parity" / "meta_spikeformer.safetensors")
    return {key[6:]: tensor for key, tensor in tensors.items() if key.startswith("state.") and "head_kd" not in key}


def model_of(name: str = LOW_BIT, **overrides) -> nn.Module:
    return create_model(name, **(TINY | overrides))


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def has_steps_of_its_weights(layer: LSQLayer) -> bool:
    step = 2 * layer.weight.abs().mean() / math.sqrt(2 ** (layer.bits - 1) - 1)
    return torch.equal(layer.alpha, step.expand_as(layer.alpha))


def low_bit_layers(model: nn.Module) -> dict[str, LSQLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LSQLayer)}


def test_every_official_key_has_one_name_of_ours_or_is_of_no_use(official):
    names = {key: own_key(key) for key in official}
    used = [name for name in names.values() if name is not None]
    assert len(set(used)) == len(used)
    assert set(used) == set(model_of().state_dict())
    assert all(UNUSED.fullmatch(key) for key, name in names.items() if name is None)
    for foreign in ("block3.6.layer_scale1", "ConvBlock1_1.1.conv1.alpha", "block3.0.attn.q_conv.0.alpha", "alpha"):
        assert own_key(foreign) is None
        assert not UNUSED.fullmatch(foreign)


def test_the_authors_step_sizes_and_scales_arrive_and_idle_tensors_are_named(official):
    model = model_of()
    report = load_official(model, official)
    assert (report.kept, report.computed, report.unscaled) == ((), (), ())
    assert len(report.dropped) == 5 * LAYERS
    assert "dropped from the file: ConvBlock1_1.0.Conv.dwconv.act.alpha" in str(report)
    layer = model.stage3.block2.mlp.conv1.conv
    assert torch.equal(layer.alpha, official["block3.2.mlp.fc1_conv.alpha"])
    assert torch.equal(layer.weight[..., 0], official["block3.2.mlp.fc1_conv.weight"])
    assert torch.equal(model.stage4.block1.attn_scale, official["block4.1.layer_scale1"])
    assert torch.equal(model.stage4.block1.mlp_scale, official["block4.1.layer_scale2"])


def test_step_sizes_that_were_never_set_are_computed_and_not_read(official):
    unset = ["downsample2.encode_conv", "block3.1.attn.k_conv.0.body.2.0", "head"]
    file = official | {f"{layer}.init_state": torch.zeros(1) for layer in unset}
    file |= {f"{layer}.alpha": torch.full_like(official[f"{layer}.alpha"], float("nan")) for layer in unset}
    assert sorted(unset_steps(file)) == sorted(f"{layer}.alpha" for layer in unset)
    model = model_of()
    report = load_official(model, file)
    computed = {"stage2.down.conv.conv", "stage3.block1.attn.k_conv.dw", "head"}
    assert set(report.computed) == {f"{layer}.alpha" for layer in computed}
    assert set(report.dropped[:3]) == set(unset_steps(file))
    assert "step sizes not in the file, computed from its weights" in str(report)
    for name, layer in low_bit_layers(model).items():
        assert has_steps_of_its_weights(layer) == (name in computed), name


def test_segmentation_and_detection_files_load_without_classifier_and_idle_tensors(official):
    backbone = {k: v for k, v in official.items() if not k.startswith("head") and ".act." not in k}
    model = model_of()
    before = values(model)
    wrapped = {f"backbone.{key}": tensor for key, tensor in backbone.items()}
    report = load_official(model, {"state_dict": wrapped | {"neck.conv.weight": torch.zeros(1)}})
    assert report.kept == ("head.weight", "head.bias", "head.alpha")
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in report.kept)
    assert "neck.conv.weight" in report.dropped
    assert not report.computed


@pytest.mark.parametrize(
    "lacking", ["block3.2.mlp.fc1_conv.weight", "block4.0.layer_scale2", "downsample3.encode_bn.running_var"]
)
def test_a_file_that_lacks_a_tensor_is_refused_and_nothing_changes(official, lacking):
    model = model_of()
    before = values(model)
    with pytest.raises(ValueError, match=rf"1 missing \({own_key(lacking)}\)"):
        load_official(model, {key: tensor for key, tensor in official.items() if key != lacking})
    assert unchanged(model, before)


def test_other_networks_and_widths_are_refused_and_nothing_changes(official):
    model = model_of()
    before = values(model)
    with pytest.raises(ValueError, match=r"1 tensors in the file are not of QSDTransformer: block3\.0\.attn\.mprf"):
        load_official(model, official | {"block3.0.attn.mprf.weight": torch.zeros(32)})
    assert unchanged(model, before)
    with pytest.raises(ValueError, match=r"looks like dims=\(8, 16, 32, 40\)"):
        load_official(model_of(dims=(16, 32, 64, 80)), official)
    with pytest.raises(ValueError, match=r"unexpected \(stage3\.block0\.attn_scale"):
        load_official(model_of(layer_scale=0.0), official)
    with torch.device("meta"):
        assert describe_widths(create_model("qsd_transformer_m").state_dict()).startswith("qsd_transformer_m (dims=")


def test_a_file_of_low_bit_weights_names_the_cure_to_a_float_network(official):
    for name, overrides in ((FLOAT, {}), (LOW_BIT, {"bits": 0})):
        model = model_of(name, **overrides)
        before = values(model)
        with pytest.raises(ValueError, match=r"low-bit weights, .*quantize\.plain"):
            load_official(model, official)
        assert unchanged(model, before)


@pytest.mark.parametrize("kind", ["folder", "run", "official"])
def test_a_meta_spikeformer_starts_a_qsd_transformer_with_branches_scaled_by_one(kind, official_float, tmp_path):
    source, path = model_of(FLOAT), tmp_path / "source"
    load_official(source, official_float)
    if kind == "official":
        path = tmp_path / "source.pth"
        torch.save({"model": official_float}, path)
    else:
        source.save_pretrained(path if kind == "folder" else path / "model")
    model = model_of()
    report = load_backbone(model, path)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in source.state_dict().items())
    assert (report.loaded, report.kept, report.dropped) == (len(source.state_dict()), (), ())
    assert len(report.unscaled) == SCALES
    assert all((loaded[key] == 1).all() for key in report.unscaled)
    assert "scales set to 1" in str(report)
    layers = low_bit_layers(model)
    assert set(report.computed) == {f"{name}.alpha" for name in layers}
    assert len(layers) == LAYERS
    assert all(map(has_steps_of_its_weights, layers.values()))


def test_scales_of_a_source_that_has_them_stay_and_new_branches_start_small(official, tmp_path):
    source = model_of(blocks=(1, 1, 2, 5, 2))
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name.endswith("_scale"):
                parameter.fill_(0.3)
    source.save_pretrained(tmp_path / "low")
    model = model_of()
    report = load_backbone(model, tmp_path / "low")
    assert not report.unscaled
    assert (model.stage3.block4.attn_scale == torch.tensor(0.3)).all()
    assert (model.stage3.block5.attn_scale == torch.tensor(1e-6)).all()
    model_of(FLOAT, blocks=(1, 1, 2, 5, 2)).save_pretrained(tmp_path / "float")
    model = model_of()
    report = load_backbone(model, tmp_path / "float")
    assert len(report.unscaled) == SCALES - 2
    assert (model.stage3.block5.mlp_scale == torch.tensor(1e-6)).all()
    assert "stage3.block5.mlp_scale" in report.kept
    new = model.stage3.block5.mlp.conv1.conv
    assert has_steps_of_its_weights(new)
    assert new.weight.abs().max() <= (6 / (32 + 128)) ** 0.5  # Xavier


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_new_classifier_has_step_sizes_of_its_own_weights(official, tmp_path, per_channel):
    source, model = model_of(), model_of(num_classes=3)
    load_official(source, official)
    for each in (source, model):
        prepare(each, bits=4, per_channel=per_channel)
    source.save_pretrained(tmp_path)
    report = load_backbone(model, tmp_path)
    assert set(report.kept) == {"head.weight", "head.bias", "head.alpha"}
    assert not report.computed
    assert has_steps_of_its_weights(model.head)
    assert 0.3 < model.head.weight.abs().max() <= (6 / (40 + 3)) ** 0.5
    other = model.stage2.down.conv.conv
    assert torch.equal(other.alpha, source.stage2.down.conv.conv.alpha)


def test_step_sizes_of_other_bits_are_not_taken(official, tmp_path):
    source, model = model_of(), model_of(bits=2)
    load_official(source, official)
    source.save_pretrained(tmp_path)
    report = load_backbone(model, tmp_path)
    assert len(report.computed) == LAYERS
    assert all(map(has_steps_of_its_weights, low_bit_layers(model).values()))
    assert "quantized={'bits': 2" in str(report)
    assert torch.equal(model.stage4.block0.mlp_scale, source.stage4.block0.mlp_scale)
    same = load_backbone(model_of(), tmp_path)
    assert (same.computed, same.differs) == ((), ())


@pytest.mark.parametrize("converted", [False, True])
def test_a_low_bit_run_does_not_start_a_float_network_but_its_float_copy_does(official, tmp_path, converted):
    source = model_of()
    load_official(source, official)
    (convert(source) if converted else source).save_pretrained(tmp_path / "low")
    model = model_of(bits=0)
    before = values(model)
    with pytest.raises(ValueError, match=r"low-bit weights, .*quantize\.plain"):
        load_backbone(model, tmp_path / "low")
    assert unchanged(model, before)
    plain(from_pretrained(tmp_path / "low")).save_pretrained(tmp_path / "float")
    assert not load_backbone(model, tmp_path / "float").kept
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        low = from_pretrained(tmp_path / "low").double()(images)
        # The copy's weights, integers times step sizes, and norms were rounded to float32 when it was made.
        assert torch.allclose(model.double().eval()(images), low, atol=1e-5, rtol=0)


@pytest.mark.parametrize("offset", [False, True])
def test_strict_loading_computes_step_sizes_that_are_absent_together(offset):
    model, other = (prepare(model_of(), bits=4, offset=offset) for _ in range(2))
    weights = values(other)
    derived = [key for key in weights if key.endswith((".alpha", ".offset"))]
    assert len(derived) == LAYERS * (1 + offset)
    load_strict(model, {key: tensor for key, tensor in weights.items() if key not in derived})
    assert unchanged(model, weights)
    without_weight = {key: tensor for key, tensor in weights.items() if not key.startswith("head.")}
    with pytest.raises(ValueError, match=r"missing \(head.weight, head.bias, head.alpha"):
        load_strict(model, without_weight)
    if offset:
        with pytest.raises(ValueError, match=r"1 missing \(head.alpha\)"):
            load_strict(model, {key: tensor for key, tensor in weights.items() if key != "head.alpha"})


def test_import_writes_a_qsd_transformer_of_the_authors_file(official, tmp_path):
    torch.save({"model": official, "epoch": 299}, tmp_path / "low.pth")
    sizes = {"dims": TINY["dims"]}
    said = import_checkpoint(tmp_path / "low.pth", name=LOW_BIT, out=tmp_path / "out", overrides=sizes)
    assert "dropped from the file" in said
    model = from_pretrained(tmp_path / "out")
    assert model.config.num_classes == 10
    assert torch.equal(model.head.alpha, official["head.alpha"])


def test_import_starts_a_qsd_transformer_from_the_float_networks_file_and_says_so(official_float, tmp_path):
    save_file(official_float, tmp_path / "float.safetensors")
    sizes = {"dims": TINY["dims"]}
    said = import_checkpoint(tmp_path / "float.safetensors", name=LOW_BIT, out=tmp_path / "out", overrides=sizes)
    assert "computed from its weights" in said
    assert "scales set to 1" in said
    model = from_pretrained(tmp_path / "out")
    assert torch.equal(model.head.weight, official_float["head.weight"])
    assert all(map(has_steps_of_its_weights, low_bit_layers(model).values()))


def test_step_sizes_of_four_bits_do_not_enter_layers_of_other_bits(official):
    model = prepare(model_of(), bits={"head": 4, "*": 2})
    report = load_official(model, official)
    assert "head.alpha" not in report.computed
    assert len(report.computed) == LAYERS - 1
    assert all(has_steps_of_its_weights(each) for name, each in low_bit_layers(model).items() if name != "head")
    assert torch.equal(model.head.alpha, official["head.alpha"])
