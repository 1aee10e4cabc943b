"""The transformer decoder equals its equations by loops on counts, and its queries are a set."""

import pytest
import torch
from torch import Tensor, nn

from spikeformers.heads.mask_decoder import (
    FFN,
    DecoderLayer,
    MaskDecoder,
    ReleasedFFN,
    SoftmaxCrossAttention,
    SoftmaxSelfAttention,
    SpikeCrossAttention,
    SpikeSelfAttention,
    sine_position,
)
from spikeformers.neurons import ILIF, NILIF

DIM, HEADS, QUERIES = 8, 2, 5


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def awake(module: nn.Module) -> nn.Module:
    """Float64, evaluation, batch norms shifted so that neurons fire."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, 0, 2)
    return module.double().eval()


def decoder(*, ffn: type[FFN] = FFN, layers: int = 4, memories: int = 3) -> MaskDecoder:
    def layer() -> DecoderLayer:
        attention = {"neuron": NILIF, "heads": HEADS}
        return DecoderLayer(
            SpikeCrossAttention(DIM, **attention), SpikeSelfAttention(DIM, **attention), ffn(DIM, 16, neuron=NILIF)
        )

    return awake(MaskDecoder(DIM, queries=QUERIES, memories=memories, layers=layers, layer=layer))


def test_cross_attention_is_its_equation_by_loops_on_counts():
    attention = awake(SpikeCrossAttention(DIM, neuron=NILIF, heads=HEADS))
    queries, query_positions = double(2, DIM, 1, QUERIES), double(1, DIM, 1, QUERIES)
    memory, memory_positions = double(2, DIM, 2, 3), double(1, DIM, 2, 3)
    seen = {}
    for name in ("q", "k", "v", "attn"):
        module = getattr(attention, name)
        module.register_forward_hook(lambda _, given, out, name=name: seen.update({name: (given[0], out)}))
    attention(queries, query_positions, memory, memory_positions)
    assert torch.equal(seen["q"][0], queries + query_positions)
    assert torch.equal(seen["k"][0], memory + memory_positions)
    assert torch.equal(seen["v"][0], memory)
    counts = {name: (4 * seen[name][1]).round().long().flatten(2) for name in ("q", "k", "v")}
    assert all(count.sum() > 0 for count in counts.values())
    width = DIM // HEADS
    expected = torch.zeros(2, DIM, QUERIES, dtype=torch.long)
    for head in range(HEADS):
        channels = slice(head * width, (head + 1) * width)
        for query in range(QUERIES):
            for pixel in range(6):
                score = (counts["q"][:, channels, query] * counts["k"][:, channels, pixel]).sum(1, keepdim=True)
                expected[:, channels, query] += score * counts["v"][:, channels, pixel]
    # Counts are in quarters, so three of them make 64ths; the scale is a root of the whole width.
    assert torch.allclose(seen["attn"][0].squeeze(2), expected.double() / 64 / DIM**0.5, atol=1e-14, rtol=0)


def test_self_attention_reads_its_own_queries():
    attention = awake(SpikeSelfAttention(DIM, neuron=NILIF, heads=HEADS))
    queries, positions = double(2, DIM, 1, QUERIES), double(1, DIM, 1, QUERIES)
    as_memory = SpikeCrossAttention.forward(attention, queries, positions, queries, positions)
    assert torch.equal(attention(queries, positions), as_memory)


def test_softmax_attention_is_its_equation_by_loops_on_real_numbers():
    attention = awake(SoftmaxCrossAttention(DIM, neuron=nn.GELU, heads=HEADS))
    queries, positions, memory = double(2, DIM, 1, QUERIES), double(1, DIM, 1, QUERIES), double(2, DIM, 2, 3)
    seen = {}
    for name in ("q", "k", "v", "attn"):
        getattr(attention, name).register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out.flatten(2)})
        )
    attention(queries, positions, memory, double(1, DIM, 2, 3))
    assert (seen["q"] < 0).any()
    width = DIM // HEADS
    for head in range(HEADS):
        channels = slice(head * width, (head + 1) * width)
        for query in range(QUERIES):
            scores = torch.einsum("bc,bcn->bn", seen["q"][:, channels, query], seen["k"][:, channels]) / DIM**0.5
            expected = torch.einsum(
                "bn,bcn->bc", scores.exp() / scores.exp().sum(1, keepdim=True), seen["v"][:, channels]
            )
            assert torch.allclose(seen["attn"][:, channels, query], expected, atol=1e-12)


def test_softmax_self_attention_reads_its_own_queries():
    attention = awake(SoftmaxSelfAttention(DIM, neuron=nn.GELU, heads=HEADS))
    queries, positions = double(2, DIM, 1, QUERIES), double(1, DIM, 1, QUERIES)
    as_memory = SoftmaxCrossAttention.forward(attention, queries, positions, queries, positions)
    assert torch.equal(attention(queries, positions), as_memory)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got dim=8, heads=3"):
        SpikeCrossAttention(8, neuron=NILIF, heads=3)
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got dim=8, heads=0"):
        SpikeCrossAttention(8, neuron=NILIF, heads=0)


def test_the_released_ffn_is_the_fixed_one_on_memory_read_in_the_wrong_shape():
    ffn = awake(ReleasedFFN(DIM, 16, neuron=NILIF))
    queries = double(2, DIM, 1, QUERIES)
    tokens = queries[:, :, 0].mT.contiguous()  # [B, Q, C] in memory, as theirs
    plain = FFN.forward(ffn, tokens.view(2, DIM, 1, QUERIES))
    expected = plain.reshape(2, QUERIES, DIM)
    assert torch.equal(ffn(queries)[:, :, 0].mT, expected)
    assert not torch.allclose(ffn(queries), FFN.forward(ffn, queries))


def test_a_layer_adds_each_branch_to_what_the_one_before_left():
    layer = decoder(layers=1).layers[0]
    queries, positions = double(2, DIM, 1, QUERIES), double(1, DIM, 1, QUERIES)
    memory, places = double(2, DIM, 2, 3), double(1, DIM, 2, 3)
    expected = queries + layer.cross_attn(queries, positions, memory, places)
    expected = expected + layer.self_attn(expected, positions)
    expected = expected + layer.ffn(expected)
    assert torch.equal(layer(queries, positions, memory, places), expected)


def test_layers_read_the_memories_in_turn_with_their_level_embedding():
    model = decoder(layers=4, memories=3)
    memories = [double(2, DIM, size, size) for size in (2, 3, 4)]
    read = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, given, __: read.append(given[2]))
    states = model(memories)
    assert len(states) == 5
    assert torch.equal(states[0][1], model.query_features.mT[:, None])
    for index, memory in enumerate(read):
        level = index % 3
        assert torch.equal(memory, memories[level] + model.level_embeddings[level][:, None, None])


def test_queries_are_a_set_in_the_fixed_layout_and_not_in_the_released_one():
    memories = [double(1, DIM, 3, 3)]
    order = torch.randperm(QUERIES)
    for ffn, is_set in ((FFN, True), (ReleasedFFN, False)):
        model = decoder(ffn=ffn, layers=2, memories=1)
        before = model(memories)[-1][..., order]
        with torch.no_grad():
            model.query_features.copy_(model.query_features[order])
            model.query_positions.copy_(model.query_positions[order])
        assert torch.allclose(model(memories)[-1], before, atol=1e-12) == is_set


def test_gradients_of_rows_of_queries_equal_finite_differences():
    """A torch bug gives wrong gradients behind batch norms of maps of width 1; ours have rows of queries."""
    for ffn in (FFN, ReleasedFFN):
        block = awake(ffn(DIM, 16, neuron=nn.Identity))
        queries = double(2, DIM, 1, QUERIES).requires_grad_()
        upstream = double(2, QUERIES, DIM)
        block(queries)[:, :, 0].mT.backward(upstream)  # as it comes where queries are read as tokens
        direction, step = double(2, DIM, 1, QUERIES), 1e-6
        with torch.no_grad():
            ahead, behind = (block(queries + sign * step * direction)[:, :, 0].mT for sign in (1, -1))
        slope = ((ahead - behind) * upstream).sum() / (2 * step)
        assert (queries.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


def test_positions_by_hand():
    positions = sine_position(2, 4, dim=8, like=torch.zeros(1, dtype=torch.float64))
    assert positions.shape == (1, 8, 2, 4)
    # Wavelengths 2 pi and 100 times that (10000 ** (2 / 4)); row 1 of 2 is half way, column 3 of 4 three quarters.
    angles = torch.tensor([torch.pi, torch.pi / 100, 1.5 * torch.pi, 1.5 * torch.pi / 100], dtype=torch.float64)
    expected = torch.stack([angles.sin(), angles.cos()], 1).flatten()
    assert torch.allclose(positions[0, :, 0, 2], expected, atol=1e-5)  # their sizes have 1e-6 added


def test_positions_follow_the_dtype_of_the_map_and_refuse_a_width_they_cannot_share_out():
    assert sine_position(2, 2, dim=8, like=torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"multiple of 4 .* got 6"):
        sine_position(2, 2, dim=6, like=torch.zeros(1))


@pytest.mark.parametrize("size", ["queries", "memories", "layers"])
def test_sizes_below_one_are_refused(size):
    sizes = {"queries": 1, "memories": 1, "layers": 1} | {size: 0}
    with pytest.raises(ValueError, match=f"{size} must be at least 1, got 0"):
        MaskDecoder(DIM, layer=nn.Identity, **sizes)


def test_every_time_step_stands_alone_without_a_membrane():
    model = decoder()
    clip = [double(4, DIM, 2, 2) for _ in range(3)]
    assert torch.allclose(model(clip)[-1][2:], model([each[2:] for each in clip])[-1], atol=1e-12)


def test_un_normalised_neurons_make_mixtures_larger_by_the_cube_of_their_levels():
    inputs = [2 * double(1, DIM, 1, 3), double(1, DIM, 1, 3), 2 * double(1, DIM, 2, 2), double(1, DIM, 2, 2)]
    mixed = []
    for neuron in (NILIF, ILIF):
        attention = awake(SpikeCrossAttention(DIM, neuron=neuron, heads=HEADS))
        attention.q, attention.k, attention.v = neuron(), neuron(), neuron()  # alone: equal counts in both
        attention.attn.register_forward_hook(lambda _, given, __: mixed.append(given[0]))
        attention(*inputs)
    assert mixed[0].any()
    assert torch.allclose(4**3 * mixed[0], mixed[1], atol=1e-12)
