"""Semantic FPN's checkpoints in both forms: every tensor in its place, and what a refusal says."""

import pytest
import torch
from safetensors.torch import save_file

from spikeformers.quantize import LSQLayer
from spikeformers.weights import load_official
from spikeformers.weights.semantic_fpn import own_key
from spikeformers.zoo import create_model, from_pretrained, import_checkpoint
from tests.weights.conftest import as_their_file, randomised

SMALL = {"dims": (8, 16, 32, 40), "neck_dim": 12, "fpn_dim": 10}
CONV, NORM = {"weight": 4, "bias": 1}, {"weight": 1, "bias": 1, "running_mean": 1, "running_var": 1}
NORM |= {"num_batches_tracked": 0}
LIF, INTEGER = "meta_spikeformer_15m_fpn_ade20k", "qsd_transformer_t_fpn_ade20k"


def head_keys(form: str) -> dict[str, tuple[int, ...]]:
    """Keys of neck and head by the authors; of shapes only the number of axes."""
    layers = {"decode_head.conv_seg": CONV}
    for level in range(4):
        for kind in ("lateral", "fpn"):
            neck = f"neck.{kind}_convs.{level}"
            layers |= {f"{neck}.1.0.conv": CONV} if form == LIF else {f"{neck}.0": CONV, f"{neck}.1": NORM}
        for layer in range(max(1, level)):
            branch = f"decode_head.scale_heads.{level}"
            if form == LIF:
                layers |= {f"{branch}.{layer}.1.0.conv": {"weight": 4}, f"{branch}.{layer}.1.0.bn": NORM}
            else:
                layers |= {f"{branch}.{2 * layer}.1": {"weight": 4}, f"{branch}.{2 * layer}.2": NORM}
    return {f"{name}.{part}": (1,) * axes for name, parts in layers.items() for part, axes in parts.items()}


@pytest.fixture(scope="module")
def stages(listed) -> dict[str, dict[str, tuple[int, ...]]]:
    """Keys of the backbones: with low-bit weights, as in files of segmentation, no idle tensors and no classifier."""
    low_bit = {f"backbone.{key}": shape for key, shape in listed("qsd_transformer_t_keys.txt").items()}
    plain = {key: shape for key, shape in listed("spike2former_ade20k_keys.txt").items() if key.startswith("backbone.")}
    return {LIF: plain, INTEGER: {key: s for key, s in low_bit.items() if ".act." not in key and ".head" not in key}}


def model_of(name: str, **overrides) -> torch.nn.Module:
    return create_model(name, **(SMALL | {"num_classes": 5} | overrides))


def file_of(name: str, stages: dict) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A network of ours and its tensors in the authors' form, flags of step sizes included."""
    model = randomised(model_of(name))
    flags = {key: torch.ones(1) for key in stages[name] if key.endswith(".init_state")}
    return model, as_their_file(model, stages[name] | head_keys(name)) | flags


@pytest.mark.parametrize("name", [LIF, INTEGER])
def test_all_tensors_of_a_file_are_imported_and_its_classes_read(name, stages, tmp_path):
    source, file = file_of(name, stages)
    save_file(file, tmp_path / "file.safetensors")
    said = import_checkpoint(tmp_path / "file.safetensors", name=name, out=tmp_path / "out", overrides=SMALL)
    assert "mmsegmentation" in said
    assert "does not tell" not in said
    model, theirs = from_pretrained(tmp_path / "out"), source.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.state_dict().items())
    assert model.config.num_classes == 5
    # The authors' heads have float weights, whatever the backbone's.
    low_bit = {key.split(".")[0] for key, layer in model.named_modules() if isinstance(layer, LSQLayer)}
    assert low_bit == ({"backbone"} if name == INTEGER else set())
    assert set(theirs) - set(model.state_dict()) == {key for key in theirs if "head." in key and "alpha" in key}


def test_forms_do_not_pass_for_each_other(stages):
    _, file = file_of(LIF, stages)
    with pytest.raises(ValueError, match=r"head.neck.lateral.0.conv.*looks like .* with a head of neck='plain'"):
        load_official(model_of(LIF, neck="batch_norm"), file)
    with pytest.raises(ValueError, match="neck='plain', neck_dim=12, fpn_dim=10, num_classes=5"):
        load_official(model_of(LIF, fpn_dim=12, num_classes=7), file)


@pytest.mark.parametrize("key", ["neck.lateral_convs.0.conv.weight", "decode_head.scale_heads.1.1.1.weight"])
def test_another_form_is_refused_by_name(key, stages):
    assert own_key(key) is None
    _, file = file_of(LIF, stages)
    with pytest.raises(ValueError, match=rf"{key}; what is read: .* LIF form .* integer form"):
        load_official(model_of(LIF), file | {key: torch.zeros(1)})
    with pytest.raises(ValueError, match="no segmentation head"):
        load_official(model_of(LIF), {each: file[each] for each in file if each.startswith("backbone.")})
