"""Spike2Former's deformable encoder and pixel decoder against the authors' code, in float64, in the released layout.

Their points of the 3x3 window are fractions of the padded map in float32, ours are whole pixels: theirs lie up to 1e-6
of a pixel away. Moved there (the first test), ours agree up to the order of sums like all else; where they stay,
gradients through SDDA differ by as much, outputs not: the neurons behind it round the same way.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spikeformers.attention import SDDA, ReleasedSDDA, deformable_sampling
from spikeformers.heads.pixel_decoder import Encoder, PixelDecoder, ReleasedSpikeMLP, SDTELayer
from spikeformers.layers import ESC
from spikeformers.neurons import neuron_builder
from spikeformers.weights.spike2former import own_key

HERE = Path(__file__).parent
SUMS, FLOAT32_POINTS = 1e-12, 1e-6  # of a tensor's largest number, or of 1
# Where the reference's parts stand in the authors' pixel decoder, and in ours.
LAYER = ("encoder.layers.0.", "encoders.0.layer0.")
PARTS = {"dcn.input_proj.": "attn.input_proj.", "dcn.": "attn.", "ffn.": "mlp."}
PLACES = (("", ""), LAYER, *((LAYER[0] + theirs, LAYER[1] + ours) for theirs, ours in PARTS.items()))


def own_name(name: str) -> str:
    """Our name of a tensor of the pixel decoder, or of one of its parts."""
    names = [(own_key(f"decode_head.pixel_decoder.{theirs}{name}"), ours) for theirs, ours in PLACES]
    return next(own.removeprefix(f"head.pixel_decoder.{ours}") for own, ours in names if own is not None)


def load(module: nn.Module, theirs: dict[str, Tensor]) -> nn.Module:
    """Their tensors in `module`, made float64: every one of them has its place, and every place is filled."""
    own = module.double().state_dict()
    found = {own_name(key): tensor.double() for key, tensor in theirs.items()}
    assert {key for key in own if not key.endswith("num_batches_tracked")} == set(found)
    counters = {key: tensor for key, tensor in own.items() if key.endswith("num_batches_tracked")}
    module.load_state_dict({key: tensor.view_as(own[key]) for key, tensor in found.items()} | counters)
    return module


def starting(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value.double() for key, value in arrays.items() if key.startswith(prefix)}


def as_map(x: Tensor) -> Tensor:
    """[..., H, W, C] -> [TB, C, H, W]."""
    return x.flatten(0, -4).permute(0, 3, 1, 2)


def assert_close(ours: Tensor, theirs: Tensor, relative: float, name: str = "") -> None:
    assert ours.shape == theirs.shape, name
    assert (ours - theirs).abs().max() <= relative * max(1.0, float(theirs.abs().max())), name


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(HERE / "spike2former_encoder.safetensors")


def astray(size: int) -> Tensor:
    """How far off their points are along one side: [3, size], for window places -1, 0, 1 and every pixel."""
    window, pixels, padded = torch.arange(-1, 2)[:, None], torch.arange(size) + 1.5, size + 2
    return (window.float() / padded + pixels.float() / padded).double() * padded - (window + pixels.double())


def test_sampling_and_its_three_gradients_equal_the_authors_at_their_rounded_points(reference):
    case = starting(reference, "dcn_core/")
    values = as_map(case["input"]).requires_grad_()
    height, width = values.shape[2:]
    x = astray(width).repeat_interleave(3, 0)[:, None, :].expand(-1, height, -1)
    y = astray(height).repeat(3, 1)[:, :, None].expand(-1, -1, width)
    assert 1e-8 < max(x.abs().max(), y.abs().max()) < 1e-6
    offsets = (as_map(case["offset"]).unflatten(1, (4, 9, 2)) + torch.stack([x, y], 1)).requires_grad_()
    weights = as_map(case["mask"]).unflatten(1, (4, 9)).requires_grad_()
    sampled = deformable_sampling(values, offsets, weights)
    sampled.backward(as_map(case["gy"]))
    assert_close(sampled, as_map(case["y"]), SUMS)
    assert_close(values.grad, as_map(case["g_input"]), SUMS)
    assert_close(offsets.grad.flatten(1, 3), as_map(case["g_offset"]), SUMS)
    assert_close(weights.grad.flatten(1, 2), as_map(case["g_mask"]), SUMS)


released = partial(ReleasedSDDA, groups=4)
mlp = partial(ReleasedSpikeMLP, ratio=2)
CASES = {
    "esc_D4": (partial(ESC, kernel=5), SUMS),
    "sdda_D4": (released, FLOAT32_POINTS),
    "sdte_mlp_D4": (mlp, SUMS),
    "sdte_layer_D8": (partial(SDTELayer, attention=released, mlp=mlp), FLOAT32_POINTS),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_in_both_modes_and_every_gradient_equal_the_authors(reference, name):
    build, of_gradients = CASES[name]
    case = starting(reference, f"{name}/")
    neuron = neuron_builder("ni_lif", levels=int(name[-1]), steps=2)
    module = load(build(16, neuron=neuron), starting(case, "w.")).eval()
    x = as_map(case["in0"]).requires_grad_()
    y = module(x)
    assert_close(y, as_map(case["y"]), SUMS)
    y.backward(as_map(case["gy"]))
    assert_close(x.grad, as_map(case["gin0"]), of_gradients)
    gradients = {own_name(key): gradient for key, gradient in starting(case, "gw.").items()}
    parameters = dict(module.named_parameters())
    assert gradients.keys() == parameters.keys()
    for key, parameter in parameters.items():
        assert_close(parameter.grad, gradients[key].view_as(parameter), of_gradients, key)
    assert_close(module.train()(x), as_map(case["y_train"]), SUMS)


def test_the_fixed_layout_gives_other_numbers_with_the_same_weights(reference):
    case = starting(reference, "sdda_D4/")
    neuron = neuron_builder("ni_lif", steps=2)
    module = load(SDDA(16, neuron=neuron, groups=4), starting(case, "w.")).eval()
    assert (module(as_map(case["in0"])) - as_map(case["y"])).abs().max() > 0.1


def test_the_memories_and_the_embedding_of_a_pyramid_equal_the_authors():
    case = starting(load_file(HERE / "spike2former_head.safetensors"), "head_small_D4_T1/")
    layer = partial(SDTELayer, attention=released, mlp=partial(ReleasedSpikeMLP, ratio=1))
    encoder = partial(Encoder, layer=layer, depth=2)
    decoder = PixelDecoder((4, 8, 16, 20), dim=32, neuron=neuron_builder("ni_lif"), encoder=encoder)
    load(decoder, starting(case, "w.pixel_decoder.")).eval()
    memories, embedding = decoder([case[f"feat{level}"].flatten(0, 1) for level in range(4)])
    assert len(memories) == 3
    for level, memory in enumerate(memories):
        assert_close(memory, case[f"ms{level}"].flatten(0, 1), SUMS, f"memory {level}")
    assert_close(embedding, case["mask_features"].flatten(0, 1), SUMS)
