"""Spike2Former's decoder, mask embedding, matching and losses against the authors' code, everything in float64.

Weights and inputs are equal, so values differ by the order of sums only: 1e-12 of numbers near 1. The reference has its
positions of pixels in float32, but they only enter neurons, where no spike here depends on the difference.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spikeformers.heads.mask_decoder import DecoderLayer, ReleasedFFN, SpikeCrossAttention, SpikeSelfAttention
from spikeformers.heads.mask_loss import MaskLossWeights, all_mask_losses, match, matching_costs
from spikeformers.heads.masks import MaskClassification
from spikeformers.heads.spike2former import Spike2FormerConfig, Spike2FormerHead
from spikeformers.layers import FeatureInfo
from spikeformers.neurons import neuron_builder
from spikeformers.weights.spike2former import own_key

DIM, HEADS, HIDDEN = 32, 4, 64
# Where the reference's parts stand in the authors' head, and in ours.
LAYER = ("transformer_decoder.layers.0.", "decoder.layers.0.")
PLACES = (("", ""), LAYER, *((f"{LAYER[0]}{part}.", f"{LAYER[1]}{part}.") for part in ("cross_attn", "ffn")))


def own_name(name: str) -> str:
    """Our name of a tensor of the head, or of one of its parts."""
    names = [(own_key(f"decode_head.{theirs}{name}"), ours) for theirs, ours in PLACES]
    return next(own.removeprefix(f"head.{ours}") for own, ours in names if own is not None)


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    stored = load_file(Path(__file__).parent / "spike2former_head.safetensors")  # in the smallest type that holds them
    return {key: value.double() if value.is_floating_point() else value.long() for key, value in stored.items()}


def case(reference: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The arrays of one reference file."""
    return {key.removeprefix(f"{name}/"): value for key, value in reference.items() if key.startswith(f"{name}/")}


def load(module: nn.Module, arrays: dict[str, Tensor]) -> nn.Module:
    """Their weights in `module`, which gets float64; every tensor must find its place."""
    state = module.double().state_dict()
    theirs = {own_name(key[2:]): value for key, value in arrays.items() if key.startswith("w.")}
    assert set(theirs) == {key for key in state if not key.endswith("num_batches_tracked")}
    module.load_state_dict({key: value.double().view_as(state[key]) for key, value in theirs.items()}, strict=False)
    return module


def as_map(tokens: Tensor) -> Tensor:
    """[T, B, N, C] or [B, N, C] -> [TB, C, 1, N]: for what the modules do, pixels may as well stand in one row."""
    return tokens.flatten(0, -3).mT[:, :, None]


def as_tokens(maps: Tensor, like: Tensor) -> Tensor:
    return maps.squeeze(2).mT.reshape(like.shape)


def build(name: str) -> nn.Module:
    neuron = neuron_builder("ni_lif", levels=8 if name.endswith("D8") else 4, steps=2)
    attention = {"neuron": neuron, "heads": HEADS}
    if name == "sdca_D4":
        return SpikeCrossAttention(DIM, **attention)
    if name == "sdsa_D4":
        return SpikeSelfAttention(DIM, **attention)
    if name == "sdtd_ffn_D8":
        return ReleasedFFN(DIM, HIDDEN, neuron=neuron)
    return DecoderLayer(
        SpikeCrossAttention(DIM, **attention),
        SpikeSelfAttention(DIM, **attention),
        ReleasedFFN(DIM, HIDDEN, neuron=neuron),
    )


# query, key (= value), query_pos, key_pos -> the order of ours; positions are those of one image, shared by all steps.
ORDER = {
    "sdca_D4": ("in0", "in2", "in1", "in3"),
    "sdsa_D4": ("in0", "in1"),
    "sdtd_ffn_D8": ("in0",),
    "sdtd_layer_D4": ("in0", "in2", "in1", "in3"),
}


def run(name: str, module: nn.Module, arrays: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """What the module makes of the reference's inputs, laid out as the reference's output, and these inputs."""
    inputs = {key: arrays[key].double().requires_grad_() for key in ORDER[name]}
    steps = arrays["in0"].shape[0]
    maps = [as_map(each if each.ndim == 4 else each.expand(steps, *each.shape)) for each in inputs.values()]
    return as_tokens(module(*maps), arrays["in0"]), inputs


@pytest.mark.parametrize("name", list(ORDER))
def test_parts_of_the_decoder_and_their_gradients_equal_the_authors(reference, name):
    arrays = case(reference, name)
    module = load(build(name), arrays).eval()
    out, inputs = run(name, module, arrays)
    assert torch.allclose(out, arrays["y"], atol=1e-12, rtol=0)
    out.backward(arrays["gy"])
    for key, leaf in inputs.items():
        assert torch.allclose(leaf.grad, arrays[f"g{key}"], atol=1e-12, rtol=1e-12), key
    gradients = {key: parameter.grad for key, parameter in module.named_parameters()}
    compared = {own_name(key[3:]): value for key, value in arrays.items() if key.startswith("gw.")}
    assert set(compared) == set(gradients)
    for key, theirs in compared.items():
        assert torch.allclose(gradients[key].view_as(theirs), theirs, atol=1e-12, rtol=1e-12), key


@pytest.mark.parametrize("name", list(ORDER))
def test_parts_of_the_decoder_in_training_equal_the_authors(reference, name):
    arrays = case(reference, name)
    out, _ = run(name, load(build(name), arrays).train(), arrays)
    assert torch.allclose(out, arrays["y_train"], atol=1e-11, rtol=0)  # divided by standard deviations of the batch


def prediction(arrays: dict[str, Tensor]) -> tuple[MaskClassification, Tensor, Tensor]:
    """Logits of all layers as a head gives them, and the leaves behind."""
    classes, masks = arrays["cls"].requires_grad_(), arrays["mask"].requires_grad_()
    earlier = tuple(MaskClassification(*each) for each in zip(classes[:-1], masks[:-1], strict=True))
    return MaskClassification(classes[-1], masks[-1], earlier), classes, masks


def test_costs_and_matches_equal_the_authors(reference):
    arrays = case(reference, "matcher_loss")
    labels, weights = arrays["gt"][:, 0], MaskLossWeights()
    for layer in range(2):
        output = MaskClassification(arrays["cls"][layer], arrays["mask"][layer])
        matches = match(output, labels, weights=weights)
        for image in range(2):
            present = arrays[f"labels.{image}"]
            small = labels[image, ::2, ::2]  # the nearest pixel at half the size
            costs = matching_costs(
                output.class_logits[image],
                output.mask_logits[image],
                classes=present,
                targets=small == present[:, None, None],
                weights=weights,
            )
            for name, cost in zip(("cls", "mask", "dice"), costs, strict=True):
                # They add 1e-12 inside their logarithms.
                assert torch.allclose(cost, arrays[f"cost_{name}.{layer}.{image}"], atol=1e-9, rtol=0), name
            assigned = torch.zeros(10, dtype=torch.long)
            here = matches.images == image
            assigned[matches.queries[here]] = torch.searchsorted(present, matches.classes[here]) + 1
            assert torch.equal(assigned, arrays[f"assigned_gt.{layer}.{image}"])


def test_losses_of_all_layers_and_their_gradients_equal_the_authors(reference):
    arrays = case(reference, "matcher_loss")
    output, classes, masks = prediction(arrays)
    losses = all_mask_losses(output, arrays["gt"][:, 0], weights=MaskLossWeights())
    assert set(losses) == {key.removeprefix("loss.") for key in arrays if key.startswith("loss.")}
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(arrays[f"loss.{name}"].item(), abs=1e-14, rel=1e-14), name
    sum(losses.values()).backward()
    assert torch.allclose(classes.grad, arrays["g_cls"], atol=1e-15, rtol=1e-12)
    assert torch.allclose(masks.grad, arrays["g_mask"], atol=1e-15, rtol=1e-12)


@pytest.fixture(scope="module")
def whole(reference) -> tuple[Spike2FormerHead, dict[str, Tensor]]:
    """The whole head at small sizes with the authors' weights, and their numbers."""
    arrays = case(reference, "head_small_D4_T1")
    features = FeatureInfo(("a", "b", "c", "d"), (4, 8, 16, 20), (2, 4, 8, 16))
    config = Spike2FormerConfig(
        dim=DIM,
        queries=10,
        encoder_layers=2,
        encoder_hidden=32,
        groups=4,
        decoder_layers=3,
        decoder_heads=HEADS,
        decoder_hidden=HIDDEN,
        layout="released",
    )
    head = config.build(features, num_classes=5, neuron=neuron_builder("ni_lif", levels=4), steps=1)
    return load(head, arrays), arrays


def predicting(head: Spike2FormerHead, *, batch_statistics: bool) -> Spike2FormerHead:
    """`head` giving what every layer predicts, its batch norms in training or not."""
    head.train(batch_statistics)
    head.training = True
    return head


def maps_of(arrays: dict[str, Tensor]) -> list[Tensor]:
    return [arrays[f"feat{level}"][0].clone().requires_grad_() for level in range(4)]


def by_layer(rows: Tensor) -> Tensor:
    """[TB, C, L, Q] -> their [L, 1, TB, Q, C], T = 1."""
    return rows.permute(2, 0, 3, 1)[:, None]


def test_the_whole_head_and_what_passes_inside_equal_the_authors(whole):
    head, arrays = whole
    head = predicting(head, batch_statistics=False)
    seen = {}
    watched = {"pixels": head.pixel_decoder, "query": head.embedding.query_spikes, "mask": head.embedding.mask_spikes}
    hooks = [
        module.register_forward_hook(lambda _, given, out, name=name: seen.update({name: (given[0], out)}))
        for name, module in watched.items()
    ]
    output = head(maps_of(arrays))
    for hook in hooks:
        hook.remove()
    memories, pixels = seen["pixels"][1]
    for level, memory in enumerate(memories):
        assert torch.allclose(memory, arrays[f"ms{level}"][0], atol=1e-12, rtol=0)
    assert torch.allclose(pixels, arrays["mask_features"][0], atol=1e-12, rtol=0)
    assert torch.allclose(by_layer(seen["query"][0]), arrays["dec_sigmoid"], atol=1e-12, rtol=0)
    assert torch.equal(by_layer(seen["query"][1]), 4 * arrays["dec_spike"])
    assert torch.allclose(by_layer(seen["mask"][0]), arrays["mask_embed_spike_in"], atol=1e-12, rtol=0)
    assert torch.equal(by_layer(seen["mask"][1]), 4 * arrays["mask_embed_spike_out"])
    every = (*output.auxiliary, output)
    assert torch.allclose(torch.stack([each.class_logits for each in every]), arrays["cls"], atol=1e-12, rtol=0)
    assert torch.allclose(torch.stack([each.mask_logits for each in every]), arrays["mask"], atol=1e-11, rtol=0)
    assert torch.allclose(head.semantic(output, (32, 48)), arrays["seg"], atol=1e-12, rtol=0)


def tolerance(name: str) -> float:
    """Relative. Gradients that pass the reference's sampling, at points in float32, have no more digits than that."""
    return 1e-6 if "encoders." in name or "input_proj" in name else 1e-12


def test_losses_and_gradients_of_the_whole_head_equal_the_authors(whole):
    head, arrays = whole
    maps = maps_of(arrays)
    head.zero_grad()
    losses = head.losses(predicting(head, batch_statistics=False)(maps), arrays["gt"][:, 0])
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(arrays[f"loss.{name}"].item(), rel=1e-13), name
    sum(losses.values()).backward()
    gradients = {f"feat{level}": leaf.grad for level, leaf in enumerate(maps)}
    gradients |= {name: parameter.grad for name, parameter in head.named_parameters()}
    theirs = {f"feat{level}": arrays[f"gfeat{level}"][0] for level in range(4)}
    theirs |= {own_name(key[3:]): value for key, value in arrays.items() if key.startswith("gw.")}
    for name, expected in theirs.items():
        relative = tolerance("encoders." if name == "feat3" else name)
        near = relative * max(1, expected.abs().max().item())
        assert torch.allclose(gradients[name].view_as(expected), expected, atol=near, rtol=0), name
    norms = {own_name(key[6:]): norm.item() for key, norm in arrays.items() if key.startswith("gnorm.")}
    assert set(norms) == {name for name, _ in head.named_parameters()}
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=tolerance(name), abs=1e-12), name


def test_training_losses_of_the_whole_head_equal_the_authors(whole):
    head, arrays = whole
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    losses = head.losses(predicting(head, batch_statistics=True)(maps_of(arrays)), arrays["gt"][:, 0])
    head.load_state_dict(before)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(arrays[f"train_loss.{name}"].item(), rel=1e-11), name
