"""QSD-Transformer against the authors' network: every count, every map, logits, and the keys of their files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spikeformers.attention import QSDSA, integer_attention
from spikeformers.energy import record
from spikeformers.weights import load_official
from spikeformers.weights.meta_spikeformer import STAGES
from spikeformers.weights.qsd_transformer import UNUSED, own_key
from spikeformers.zoo import create_model, from_pretrained

HERE = Path(__file__).parent
SIZES = {"dims": (8, 16, 32, 40), "num_classes": 10}
DROPPED = 138 * 5  # of every quantised layer: its flag, and four tensors of a quantiser that quantises nothing
NEURONS = {
    "encode_lif": "neuron",
    "Conv.lif1": "sep_shortcut.neuron",
    "Conv.lif2": "sep_conv.neuron",
    "lif1": "channel_shortcut.neuron",
    "lif2": "channel_conv.neuron",
    "attn.head_lif": "attn_shortcut.neuron",
    "attn.q_lif": "attn.q",
    "attn.k_lif": "attn.k",
    "attn.v_lif": "attn.v",
    "attn.attn_lif": "attn.attn",
    "mlp.fc1_lif": "mlp_shortcut.neuron",
    "mlp.fc2_lif": "mlp.neuron",
}
MAPS = {"": "", ".Conv": ".sep_conv", ".attn": ".attn", ".mlp": ".mlp"}


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return load_file(HERE / "qsd_transformer.safetensors")


@pytest.fixture(scope="module")
def official(reference) -> dict[str, torch.Tensor]:
    return {key.removeprefix("state/"): tensor for key, tensor in reference.items() if key.startswith("state/")}


def official_model(official: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    model = create_model("qsd_transformer_t", **SIZES)
    load_official(model, official)
    return model.to(dtype).eval()


def neuron_of(lif: str) -> str:
    """`block3.0.attn.q_lif` -> `stage3.block0.attn.q`."""
    if lif == "lif":
        return "head_neuron"
    stage = next(stage for stage in STAGES if lif.startswith(f"{stage}."))
    # A stage's table entry for down-sampling names its convolution; the neuron stands beside it.
    return f"{STAGES[stage].removesuffix('.conv')}.{NEURONS[lif.removeprefix(f'{stage}.')]}"


def module_of(map_name: str) -> str:
    """`block3.0.attn` -> `stage3.block0.attn`."""
    stage = max((stage for stage in STAGES if map_name.startswith(stage)), key=len)
    return f"{STAGES[stage]}{MAPS[map_name.removeprefix(stage)]}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_count_of_all_77_neurons_equals_the_authors(reference, official, dtype):
    model = official_model(official, dtype)
    with torch.no_grad(), record(model) as spikes:
        model(reference["input"].to(dtype))
    theirs = {neuron_of(key[7:]): levels for key, levels in reference.items() if key.startswith("spikes/")}
    assert set(theirs) == set(spikes)
    assert len(theirs) == 77
    for name, levels in theirs.items():
        assert torch.equal(spikes[name].flatten(), levels.flatten()), name
    assert len({int(level) for levels in theirs.values() for level in levels.unique()}) == 5  # 0..4 all occur


# Counts are equal, so logits differ by the rounding of the classifier only, and float32 from float64 by a sum of 40.
@pytest.mark.parametrize(
    ("dtype", "key", "tolerance"), [(torch.float32, "logits", 1e-5), (torch.float64, "logits_fp64", 1e-9)]
)
def test_logits_equal_the_authors(reference, official, dtype, key, tolerance):
    with torch.no_grad():
        logits = official_model(official, dtype)(reference["input"].to(dtype))
    assert torch.allclose(logits, reference[key], atol=tolerance, rtol=0)


def test_the_maps_of_every_stage_block_and_attention_equal_the_authors(reference, official):
    model = official_model(official, torch.float32)
    theirs = {module_of(key[6:]): tensor for key, tensor in reference.items() if key.startswith("stage/")}
    modules, heard = dict(model.named_modules()), {}

    def keep(name: str):
        return lambda _, __, out: heard.__setitem__(name, out)

    hooks = [modules[name].register_forward_hook(keep(name)) for name in theirs]
    try:
        with torch.no_grad():
            model(reference["input"])
    finally:
        for hook in hooks:
            hook.remove()
    assert len(heard) == len(theirs) == 21
    for name, tensor in theirs.items():
        # Values reach 5.7; sums of float32 in another order were 1e-6 apart.
        assert torch.allclose(heard[name], tensor.flatten(0, 1), atol=1e-5, rtol=0), name


def test_attention_is_integer_arithmetic_on_the_recorded_counts(reference, official):
    model = official_model(official, torch.float32)
    with torch.no_grad(), record(model) as spikes:
        model(reference["input"])
    attentions = {name: module for name, module in model.named_modules() if isinstance(module, QSDSA)}
    assert len(attentions) == 8
    ties = 0
    for name, module in attentions.items():
        q, k, v = (module.split(spikes[f"{name}.{operand}"].double()).long() for operand in "qkv")
        product = (v @ k.mT) @ q
        emitted = spikes[f"{name}.attn"].long()
        assert torch.equal(integer_attention(product).reshape(emitted.shape), emitted), name
        assert torch.equal((product + 32 >> 6).clamp(0, 4).reshape(emitted.shape), emitted), name
        ties += int((((product + 32) % 64 == 0) & (product < 256)).sum())
    assert ties == 73  # where half up and half to even may part


def test_every_key_of_the_smallest_published_size_is_loaded_or_named_as_dropped():
    shapes = {}
    for line in (HERE / "qsd_transformer_t_keys.txt").read_text().splitlines():
        layer, tensors = line.split("\t")
        for tensor, shape in (each.split("=") for each in tensors.split()):
            shapes[f"{layer}.{tensor}"] = () if shape == "scalar" else tuple(map(int, shape.split("x")))
    with torch.device("meta"):
        model = create_model("qsd_transformer_t")
    ours = {own_key(key): shape for key, shape in shapes.items() if own_key(key) is not None}
    # Their MLPs' kernels lack an axis of length 1.
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == {
        key: (*shape, 1) if len(shape) == 3 else shape for key, shape in ours.items()
    }
    rest = [key for key in shapes if own_key(key) is None]
    assert all(UNUSED.fullmatch(key) for key in rest)
    assert (len(shapes), len(rest)) == (1669, DROPPED)


def test_a_loaded_network_is_the_same_after_saving(official, reference, tmp_path):
    model = official_model(official, torch.float32)
    again = from_pretrained(model.save_pretrained(tmp_path))
    ours, stored = model.state_dict(), again.state_dict()
    assert stored.keys() == ours.keys()
    assert all(torch.equal(stored[key], tensor) for key, tensor in ours.items())
    with torch.no_grad():
        assert torch.equal(again(reference["input"]), model(reference["input"]))
