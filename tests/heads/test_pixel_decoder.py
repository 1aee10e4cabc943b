"""The pixel decoder: what its memories and its embedding depend on, its sizes, and the encoders of Table 3."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from spikeformers.attention import SDDA, ReleasedSDDA
from spikeformers.attention.sdda import read_channels_last
from spikeformers.energy import record
from spikeformers.heads.pixel_decoder import (
    Encoder,
    PixelDecoder,
    ReleasedSDTELayer,
    ReleasedSpikeMLP,
    SDTELayer,
    SpikeMLP,
    TopDown,
    VanillaEncoderLayer,
)
from spikeformers.neurons import NILIF, neuron_builder

NI_LIF = neuron_builder("ni_lif")
CHANNELS = (4, 6, 8, 10)
SIZES = ((17, 22), (9, 11), (5, 6), (3, 3))  # odd ones, as whole images have
SMALL = partial(SDTELayer, attention=partial(SDDA, groups=4), layer_scale=0.5)


def maps(*, channels: tuple[int, ...] = CHANNELS, batch: int = 2) -> list[Tensor]:
    return [3 * torch.randn(batch, c, *s, dtype=torch.float64) for c, s in zip(channels, SIZES, strict=False)]


def decoder(
    *, channels: tuple[int, ...] = CHANNELS, layer=SMALL, depth: int = 1, neuron=NI_LIF, query_levels: int = 1
) -> PixelDecoder:
    encoder = partial(Encoder, layer=layer, depth=depth)
    return PixelDecoder(channels, dim=16, neuron=neuron, encoder=encoder, query_levels=query_levels).double()


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_memories_are_all_maps_but_the_finest_of_pyramids_of_any_depth_and_odd_sizes(levels):
    channels, sizes = CHANNELS[:levels], SIZES[:levels]
    module = decoder(channels=channels)
    memories, embedding = module(maps(channels=channels))
    assert embedding.shape == (2, 16, *sizes[0])
    assert [tuple(memory.shape[2:]) for memory in memories] == list(reversed(sizes[1:] or sizes))
    assert module.num_memories == len(memories)


def test_each_map_reaches_what_is_as_fine_or_finer_and_nothing_coarser():
    module = decoder()
    inputs = [x.requires_grad_() for x in maps()]
    memories, embedding = module(inputs)
    for place, out in enumerate((*memories, embedding)):  # coarse to fine
        reached = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True, retain_graph=True)
        coarsest_first = [gradient is not None and bool(gradient.any()) for gradient in reversed(reached)]
        assert coarsest_first == [index <= place for index in range(4)]


def test_a_step_down_adds_the_upsampled_map_to_the_lateral_one():
    step = TopDown(2, 1, neuron=NI_LIF).double().eval()
    for parameter in (*step.lateral.parameters(), step.output.conv.weight):
        nn.init.zeros_(parameter)
    step.lateral.conv.bn.bias.data.fill_(1.0)
    step.output.conv.weight.data[0, 0, 1, 1] = 1  # hands on what its neuron fires
    coarse = torch.tensor([[[[0.0, 2.0]]]], dtype=torch.float64)
    # Pixel centres of a row of 4 fall on 0, 0.5, 1.5 and 2 of that; with 1 beside it counts are 1, 2 (1.5), 2 (2.5), 3.
    fired = step(torch.zeros(1, 2, 1, 4, dtype=torch.float64), coarse) * (1 + 1e-5) ** 0.5
    assert torch.allclose(fired, torch.tensor([[[[0.25, 0.5, 0.5, 0.75]]]], dtype=torch.float64))


def test_the_layer_adds_its_three_branches_one_after_the_other():
    layer = SMALL(16, neuron=NI_LIF).double().eval()
    u = x = 3 * torch.randn(2, 16, 3, 5, dtype=torch.float64)
    for scale, branch in ((layer.esc_scale, layer.esc), (layer.attn_scale, layer.attn), (layer.mlp_scale, layer.mlp)):
        x = x + scale[:, None, None] * branch(x)
    assert torch.equal(layer(u), x)
    assert not torch.equal(x, u)


def test_a_fresh_layer_of_the_paper_almost_hands_its_input_on():
    layer = SDTELayer(32, neuron=NI_LIF)
    u = 3 * torch.randn(2, 32, 3, 5)
    assert 0 < (layer(u) - u).abs().max() < 1e-4  # branches of a few units times 1e-6


def test_the_released_mlp_scrambles_what_the_fixed_one_gives():
    fixed, released = SpikeMLP(8, neuron=NI_LIF), ReleasedSpikeMLP(8, neuron=NI_LIF)
    released.load_state_dict(fixed.state_dict())
    u = 3 * torch.randn(2, 8, 3, 5)
    assert torch.equal(released(u), read_channels_last(fixed(u)))


def test_the_released_layer_has_the_same_parameters():
    layers = [kind(32, neuron=NI_LIF).state_dict() for kind in (SDTELayer, ReleasedSDTELayer)]
    assert layers[0].keys() == layers[1].keys()


@pytest.mark.parametrize(("ratio", "parameters"), [(4, 9_796_544), (8, 12_960_704)])
def test_the_papers_sizes_have_the_authors_number_of_parameters(ratio, parameters):
    layer = partial(SDTELayer, mlp=partial(SpikeMLP, ratio=ratio))
    with torch.device("meta"):
        module = PixelDecoder((32, 64, 128, 360), dim=256, neuron=NI_LIF, encoder=partial(Encoder, layer=layer))
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


def test_no_layers_hand_the_projected_map_on():
    module = decoder(depth=0).eval()
    inputs = maps()
    assert torch.equal(module(inputs).memories[0], module.output_proj(module.input_proj(inputs[-1])))
    assert not [name for name, _ in module.named_parameters() if name.startswith("encoders")]


ENCODERS = {
    "sdte": SMALL,
    "released": partial(ReleasedSDTELayer, attention=partial(ReleasedSDDA, groups=4), layer_scale=0.5),
    "vanilla": VanillaEncoderLayer,
}


@pytest.mark.parametrize("layer", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("query_levels", [1, 3])
def test_every_encoder_gives_every_parameter_a_finite_gradient_and_fires_each_neuron_once(layer, query_levels):
    module = decoder(layer=layer, depth=2, query_levels=query_levels)
    neurons, fired = [each for each in module.modules() if isinstance(each, NILIF)], []
    for neuron in neurons:
        neuron.register_forward_hook(lambda each, *_: fired.append(each))
    with record(module) as spikes:
        memories, embedding = module(maps())
    assert len(fired) == len(set(fired)) == len(neurons) == len(spikes)
    sum(x.square().sum() for x in (*memories, embedding)).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_queries_of_more_scales_have_an_encoder_each_that_changes_their_memory():
    single, multi = decoder().eval(), decoder(query_levels=3).eval()
    left = multi.load_state_dict(single.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert {key.split(".")[1] for key in left.missing_keys} == {"1", "2"}
    inputs = maps()
    ours, theirs = single(inputs), multi(inputs)
    assert torch.equal(ours.memories[0], theirs.memories[0])
    for level in (1, 2):
        assert not torch.equal(ours.memories[level], theirs.memories[level])


def test_steps_without_a_membrane_are_images_of_their_own():
    module = decoder().eval()
    inputs = maps()
    stepped = decoder(neuron=neuron_builder("ni_lif", steps=2)).eval()
    stepped.load_state_dict(module.state_dict())
    assert torch.equal(stepped(inputs).embedding, module(inputs).embedding)


def test_what_does_not_fit_is_told():
    with pytest.raises(ValueError, match="expected 4 maps, fine to coarse, got 3"):
        decoder()(maps()[1:])
    with pytest.raises(ValueError, match="at least one map"):
        decoder(channels=())
    with pytest.raises(ValueError, match=r"query_levels must be from 1 to 3 \(the memories\), got 4"):
        decoder(query_levels=4)
