"""Spikformer's three checkpoint layouts: what fits, what is dropped, and what a refusal says."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spikeformers.weights import load_backbone, load_official
from spikeformers.weights.spikformer import LAYERS, STEM, describe_widths, own_key, own_tensor
from spikeformers.zoo import create_model, from_pretrained, import_checkpoint

SIZES = {"dim": 32, "heads": 4, "depth": 2, "num_classes": 10}
CIFAR, IMAGENET = "spikformer_cifar_4_384", "spikformer_8_512"
FILES = {CIFAR: "spikformer_cifar10_train_T4", IMAGENET: "spikformer_imagenet_eval_T1"}
# Two layer norms in each of two blocks.
UNUSED = [f"block.{block}.norm{norm}.{tensor}" for block in (0, 1) for norm in (1, 2) for tensor in ("weight", "bias")]


@pytest.fixture(scope="module")
def official(pytestconfig) -> dict[str, dict[str, torch.Tensor]]:
    """The authors' state_dicts of tiny networks, by our name."""
    folder: Path = pytestconfig.rootpath / "tests" / "parity"
    tensors = {name: load_file(folder / f"{file}.safetensors") for name, file in FILES.items()}
    return {
        name: {key[6:]: tensor for key, tensor in found.items() if key.startswith("state.")}
        for name, found in tensors.items()
    }


def model_of(name: str, **overrides) -> torch.nn.Module:
    return create_model(name, **(SIZES | overrides))


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def unchanged(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", [CIFAR, IMAGENET])
def test_every_official_key_that_is_used_has_one_name_of_ours(name, official):
    names = {key: own_key(key) for key in official[name]}
    assert sorted(key for key, own in names.items() if own is None) == sorted(UNUSED)
    used = [own for own in names.values() if own is not None]
    assert set(used) == set(model_of(name).state_dict())
    assert len(set(used)) == len(used)
    assert own_key("block.0.attn.q_linear.gamma") is None
    assert own_key("patch_embed.proj_conv4.weight") is None


def test_the_names_of_both_commits_and_of_both_kinds_of_layers_meet_in_ours():
    assert len(STEM) == 4 * 4 + 2  # 4 blocks, conv and norm, two names each; RPE has one
    assert len(set(STEM.values())) == 4 * 2 + 2
    assert len(LAYERS) == 6 * 3  # q, k, v, proj, fc1, fc2, each linear, conv and norm
    assert len(set(LAYERS.values())) == 6 * 2


def test_weights_of_linear_and_1d_layers_get_axes_of_length_1():
    for shape in ((6, 4), (6, 4, 1), (6, 4, 1, 1)):
        weight = torch.randn(shape)
        assert torch.equal(own_tensor("block.0.mlp.fc1_linear.weight", weight), weight.view(6, 4, 1, 1))
    for key, shape in (("head.weight", (6, 4)), ("block.0.attn.q_bn.weight", (6,)), ("block.0.attn.q_conv.bias", (6,))):
        assert own_tensor(key, torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("name", [CIFAR, IMAGENET])
def test_unused_tensors_are_dropped_and_reported(name, official):
    report = load_official(model_of(name), official[name])
    assert sorted(report.dropped) == sorted(UNUSED)
    assert report.kept == ()
    assert "dropped from the file: block.0.norm1" in str(report)
    assert "and 5 more" in str(report)


def test_the_layout_of_cifar_does_not_fit_imagenets_and_the_message_says_what_the_file_is(official):
    model = model_of(IMAGENET)
    before = values(model)
    with pytest.raises(ValueError, match=r"6 unexpected \(blocks\.0\.attn\.[kqv]_conv\.conv\.bias") as refusal:
        load_official(model, official[CIFAR])
    assert "looks like dim=32, depth=2, in_channels=3, tokens='linear'" in str(refusal.value)
    assert unchanged(model, before)
    model = model_of(CIFAR)
    before = values(model)
    with pytest.raises(ValueError, match=r"6 missing .*tokens='conv'"):
        load_official(model, official[IMAGENET])
    assert unchanged(model, before)
    load_official(model_of(IMAGENET, tokens="linear"), official[CIFAR])  # the cure


@pytest.mark.parametrize(
    ("overrides", "says"), [({"dim": 64}, "dim=32"), ({"depth": 3}, "depth=2"), ({"depth": 1}, "")]
)
def test_another_size_is_refused_and_nothing_changes(overrides, says, official):
    model = model_of(CIFAR, **overrides)
    before = values(model)
    with pytest.raises(ValueError, match=f"looks like .*{says}"):
        load_official(model, official[CIFAR])
    assert unchanged(model, before)


def test_events_images_and_v2_are_told_apart(official):
    for name, overrides in (("spikformer_dvs_2_256", {}), ("spikformer_v2_8_384", {})):
        model = model_of(name, **overrides)
        before = values(model)
        with pytest.raises(ValueError, match="looks like dim=32, depth=2, in_channels=3, tokens='conv'"):
            load_official(model, official[IMAGENET])
        assert unchanged(model, before)


def test_a_file_of_a_catalogue_size_is_called_by_its_name():
    for name in ("spikformer_8_384", "spikformer_10_512", "spikformer_cifar_2_384", "spikformer_dvs_2_256"):
        with torch.device("meta"):
            assert describe_widths(create_model(name).state_dict()).startswith(f"{name} (dim=")
    with torch.device("meta"):
        assert describe_widths(create_model("spikformer_v2_8_384").state_dict()) == "another architecture"
        assert describe_widths(create_model("meta_spikeformer_15m").state_dict()) == "another architecture"


def test_missing_and_foreign_tensors_are_refused_and_nothing_changes(official):
    model = model_of(CIFAR)
    before = values(model)
    short = {key: tensor for key, tensor in official[CIFAR].items() if key != "block.1.mlp.fc1_linear.weight"}
    with pytest.raises(ValueError, match=r"1 missing \(blocks\.1\.mlp\.conv1\.conv\.weight\)"):
        load_official(model, short)
    with pytest.raises(ValueError, match=r"1 tensors in the file are not of Spikformer: block\.0\.norm3\.weight"):
        load_official(model, official[CIFAR] | {"block.0.norm3.weight": torch.zeros(1)})
    assert unchanged(model, before)


def test_names_of_the_first_commit_load(official):
    def name_then(match: re.Match) -> str:
        return f"patch_embed.block{int(match[2] or 0) + 1}_{match[1]}."

    now = r"patch_embed\.proj_(conv|bn)(\d?)\."
    renamed = {re.sub(now, name_then, key): tensor for key, tensor in official[CIFAR].items()}
    assert "patch_embed.block1_conv.weight" in renamed
    assert "patch_embed.block4_bn.running_var" in renamed
    new, old = model_of(CIFAR), model_of(CIFAR)
    load_official(new, official[CIFAR])
    report = load_official(old, renamed)
    assert report.loaded == len(values(old))
    assert unchanged(old, values(new))


@pytest.mark.parametrize("name", [CIFAR, IMAGENET])
def test_the_authors_backbone_starts_a_model_with_other_classes(name, official, tmp_path):
    torch.save({"state_dict": official[name], "epoch": 3, "arch": "spikformer"}, tmp_path / "authors.pth")
    whole, model = model_of(name), model_of(name, num_classes=3)
    load_official(whole, official[name])
    report = load_backbone(model, tmp_path / "authors.pth")
    assert sorted(report.dropped) == sorted(UNUSED)
    assert set(report.kept) == {"head.weight", "head.bias"}
    found = model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in values(whole).items() if not key.startswith("head"))


def test_import_writes_a_model_that_loads_and_says_what_it_dropped(official, tmp_path):
    torch.save({"state_dict": official[CIFAR]}, tmp_path / "authors.pth")
    sizes = {key: value for key, value in SIZES.items() if key != "num_classes"}
    said = import_checkpoint(tmp_path / "authors.pth", name=CIFAR, out=tmp_path / "out", overrides=sizes)
    assert "block.0.norm1" in said
    model = from_pretrained(tmp_path / "out")
    assert torch.equal(model.head.weight, official[CIFAR]["head.weight"])
    assert model.config.num_classes == 10


@pytest.mark.parametrize("steps", [2, 4, 6])
def test_weights_of_one_step_start_a_network_of_more_and_its_first_step_is_theirs(official, tmp_path, steps):
    single = model_of(IMAGENET, steps=1)
    load_official(single, official[IMAGENET])
    single.save_pretrained(tmp_path)
    more = model_of(IMAGENET, steps=steps)
    assert not load_backbone(more, tmp_path).kept
    images = load_file(Path(__file__).parents[1] / "parity" / f"{FILES[IMAGENET]}.safetensors")["input"].double()
    with torch.no_grad():
        one, many = (model.double().eval().forward_features(images)[-1] for model in (single, more))
    # A pass starts from rest, so step 0 knows nothing of the others: spikes in float64, equal.
    assert torch.equal(many[: len(images)], one)
    assert not torch.equal(many[-len(images) :], one)


def test_a_backbone_built_with_another_neuron_or_heads_is_taken_and_said(tmp_path):
    model_of(CIFAR, neuron="lif").save_pretrained(tmp_path)
    report = load_backbone(model_of(CIFAR, neuron="i_lif", heads=2, num_classes=3), tmp_path)
    assert "built otherwise than the source: heads=2, there 4, neuron=i_lif, there lif" in str(report)
    assert not load_backbone(model_of(CIFAR, neuron="lif", steps=2), tmp_path).differs
