"""Masked autoencoding: nothing hidden is seen, nothing visible is lost, and the loss is what the paper says."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from spikeformers import create_model
from spikeformers.attention import SDSA3
from spikeformers.backbones import ANN_TWIN
from spikeformers.energy import record
from spikeformers.neurons import LIF
from spikeformers.pretrain import MAE
from spikeformers.pretrain.mae import Decoder

V2 = {"dim": 16, "depth": 2, "heads": 2, "patch_size": 4, "num_classes": 10}
META = {"dims": (8, 8, 16, 16), "blocks": (1, 1, 1, 1, 1), "heads": 2, "neuron": "i_lif"}
ENCODERS = {
    "scs": ("spikformer_v2_8_384", V2),
    "scs_t2": ("spikformer_v2_8_384", V2 | {"steps": 2}),
    "sps": ("spikformer_cifar_4_384", {"dim": 16, "depth": 1, "heads": 2, "steps": 2}),
    "iand": ("spikformer_v2_8_384", V2 | {"shortcut": "iand"}),
    "integer": ("spikformer_v2_8_384", V2 | {"neuron": "i_lif"}),
    "ann": ("spikformer_v2_8_384", V2 | ANN_TWIN),
    "meta": ("meta_spikeformer_15m", META | {"strides": (1, 2, 2, 1, 1)}),
    "meta_7x7": ("meta_spikeformer_15m", META | {"strides": (2, 1, 2, 1, 1)}),
}


def autoencoder(kind: str, **options) -> MAE:
    """A small one in float64 whose neurons fire: batch norms get the statistics of some images first."""
    torch.manual_seed(0)
    name, sizes = ENCODERS[kind]
    encoder = create_model(name, **sizes)
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        torch.nn.init.uniform_(norm.bias, 0, 1)
        norm.momentum = 1.0
    encoder.train()(torch.randn(8, 3, 16, 16))
    for norm in norms:
        norm.momentum = 0.1
    return MAE(encoder, image_size=16, decoder_dim=16, decoder_depth=1, decoder_heads=2, **options).double()


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()


def pixels_of(mae: MAE, visible: torch.Tensor) -> torch.Tensor:
    return visible.repeat_interleave(mae.patch_size, 1).repeat_interleave(mae.patch_size, 2)[:, None]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_masked_position_never_influences_a_visible_one(kind, training):
    mae, x = autoencoder(kind).train(training), images()
    visible = mae.draw_mask(x)
    noisy = torch.where(pixels_of(mae, visible), x, 100 * torch.randn_like(x))
    twin = copy.deepcopy(mae)  # training changes statistics, which a second pass would read
    tokens, places = mae.encode(x, visible)
    assert tokens.any()
    assert torch.equal(tokens, twin.encode(noisy, visible)[0])
    # ... while a visible pixel does: otherwise the test above would hold of a dead network.
    other = torch.where(pixels_of(mae, visible), x.flip(0), x)
    assert not torch.equal(tokens, autoencoder(kind).train(training).encode(other, visible)[0])
    assert places.shape == tokens.shape[:2] == (4, 4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ENCODERS)
def test_noise_on_hidden_positions_inside_the_encoder_changes_nothing(kind, training):
    # Covering the image alone would pass the test above: biases and norms make hidden positions non-zero again.
    mae, x = autoencoder(kind).train(training), images()
    visible, noisy = mae.draw_mask(x), copy.deepcopy(mae)
    masked_part = noisy.encoder if kind.startswith("meta") else noisy.encoder.stem

    def spoil(_, __, out):  # registered first, so it comes before the hook that covers
        seen = F.interpolate(visible[:, None].double(), out.shape[2:], mode="nearest")
        seen = seen.repeat(len(out) // len(seen), 1, 1, 1)
        return out + 100 * torch.randn_like(out) * (1 - seen)

    convolutions = [each for each in masked_part.modules() if isinstance(each, torch.nn.Conv2d)]
    for convolution in convolutions:
        convolution.register_forward_hook(spoil)
    assert len(convolutions) > 3
    assert torch.equal(mae.encode(x, visible)[0], noisy.encode(x, visible)[0])


class OracleConv(torch.nn.Conv2d):
    """A convolution, times the mask."""

    def forward(self, x):
        out = super().forward(x)
        return out * resized(self.mask, out)


class OracleNorm(torch.nn.BatchNorm2d):
    """Mean and variance over visible positions, by sums."""

    def forward(self, x):
        seen = resized(self.mask, x)
        count, shape = seen.sum(), (1, -1, 1, 1)
        mean, variance = self.running_mean, self.running_var
        if self.training:
            mean = (x * seen).sum((0, 2, 3)) / count
            variance = ((x - mean.view(shape)).square() * seen).sum((0, 2, 3)) / count
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight / (variance + self.eps).sqrt()
        return ((x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)) * seen


def resized(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    fine = F.interpolate(mask[:, None].double(), like.shape[2:], mode="nearest")
    return fine.repeat(len(like) // len(fine), 1, 1, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["scs", "scs_t2", "sps", "integer", "meta", "meta_7x7"])
def test_the_masked_encoder_is_its_definition_written_out(kind, training):
    mae, x = autoencoder(kind).train(training), images()
    visible = mae.draw_mask(x)
    oracle = copy.deepcopy(mae.encoder)
    part = oracle if kind.startswith("meta") else oracle.stem
    for module in part.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.BatchNorm2d):
            module.__class__ = OracleConv if isinstance(module, torch.nn.Conv2d) else OracleNorm
            module.mask = visible
        elif isinstance(module, torch.nn.MaxPool2d):
            module.register_forward_hook(lambda _, __, out: out * resized(visible, out))
    entered = oracle.door(x * resized(visible, x))
    if kind.startswith("meta"):
        maps = oracle.forward_features(x * resized(visible, x))[-1].flatten(2)
    else:
        maps = oracle.stem(entered)[-1].flatten(2)
    cells = visible.flatten(1).repeat(mae.encoder.steps, 1)
    kept = torch.stack([each[:, seen] for each, seen in zip(maps, cells, strict=True)])
    if not kind.startswith("meta"):
        kept = oracle.blocks(kept.unsqueeze(2)).flatten(2)
    tokens, places = mae.encode(x, visible)
    assert places.tolist() == [seen.nonzero().flatten().tolist() for seen in visible.flatten(1)]
    # Spikes are equal; sums of a batch norm run in another order, which float64 keeps to 1e-9 here.
    assert torch.allclose(tokens, oracle.time_mean(kept).mT, atol=1e-9)
    for name, value in oracle.named_buffers():
        if "running" in name:
            assert torch.allclose(mae.encoder.get_buffer(name), value, atol=1e-9), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ENCODERS)
def test_with_everything_visible_the_masked_encoder_is_the_dense_one(kind, training):
    mae, x = autoencoder(kind).train(training), images()
    dense = copy.deepcopy(mae.encoder).train(training)
    tokens, places = mae.encode(x, torch.ones(4, 4, 4, dtype=torch.bool))
    expected = dense.time_mean(dense.forward_features(x)[-1].flatten(2)).mT
    assert places.tolist() == [list(range(16))] * 4
    # Spikes are equal; sums over pixels in batch norm run in another order, which float64 keeps to 1e-9 here.
    assert torch.allclose(tokens, expected, atol=1e-9)
    for name, value in mae.encoder.state_dict().items():
        assert torch.allclose(value.double(), dense.state_dict()[name].double(), atol=1e-9), name


def test_the_blocks_run_on_visible_tokens_only():
    mae, x = autoencoder("scs").eval(), images()
    with record(mae) as spikes:
        mae(x)
    assert spikes["encoder.blocks.1.mlp.neuron"].shape == (4, 64, 1, 4)
    assert spikes["encoder.stem.blocks.1.neuron"].shape == (4, 16, 4, 4)


def test_hidden_positions_of_every_stem_map_stay_silent():
    mae, x = autoencoder("scs").train(), images()
    visible = mae.draw_mask(x)
    with record(mae) as spikes:
        mae(x, visible)
    for name, counts in spikes.items():
        if "stem" in name:
            scale = counts.shape[-1] // 4
            hidden = ~visible.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            assert not counts[hidden[:, None].expand_as(counts)].any(), name
    assert spikes["encoder.stem.blocks.0.neuron"].any()


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 4), (0.5, 8), (0.6, 6), (0.9, 1), (0.01, 15), (0.0625, 15)])
def test_any_ratio_hides_its_share(ratio, visible):
    mae = autoencoder("scs", mask_ratio=ratio)
    drawn = mae(images())
    assert drawn.visible.flatten(1).sum(1).tolist() == [visible] * 4
    assert torch.isfinite(mae.loss(images(), drawn))


@pytest.mark.parametrize("ratio", [0.0, 0.97, 1.0, -0.5])
def test_a_ratio_that_hides_none_or_all_is_refused(ratio):
    with pytest.raises(ValueError, match="at least one must be seen and one hidden"):
        autoencoder("scs", mask_ratio=ratio)


def test_masks_are_uniform_and_follow_the_generator():
    mae, x = autoencoder("scs"), images(1).expand(4000, -1, -1, -1)
    one, two = (mae.draw_mask(x, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    # A cell is visible in 1000 +- 27 of 4000 draws: five deviations.
    assert (one.sum(0) - 1000).abs().max() < 140


def test_patches_are_pixels_in_rows_and_come_back():
    mae, x = autoencoder("scs"), images()
    patches = mae.patchify(x)
    assert torch.equal(patches[1, 6].view(4, 4, 3), x[1, :, 4:8, 8:12].permute(1, 2, 0))
    assert torch.equal(mae.unpatchify(patches), x)


def test_the_target_of_a_patch_is_normalised_with_the_unbiased_variance():
    mae, x = autoencoder("scs"), images()
    patch = mae.patchify(x)[2, 3]
    variance = (patch - patch.mean()).square().sum() / (len(patch) - 1)
    assert torch.allclose(mae.target(x)[2, 3], (patch - patch.mean()) / (variance + 1e-6).sqrt(), atol=1e-12)
    assert torch.equal(autoencoder("scs", normalise_target=False).target(x), mae.patchify(x))


def test_the_loss_is_the_squared_error_of_hidden_patches_only():
    mae, x = autoencoder("scs"), images()
    drawn = mae(x)
    hidden = ~drawn.visible.flatten(1)
    error = (drawn.patches - mae.target(x)).square().mean(-1)
    assert mae.loss(x, drawn).item() == pytest.approx(error[hidden].mean().item(), rel=1e-12)
    worse = drawn.patches + 10 * drawn.visible.flatten(1)[..., None]
    assert torch.equal(mae.loss(x, type(drawn)(worse, drawn.visible)), mae.loss(x, drawn))


def test_a_perfect_drawing_has_no_loss_and_is_the_image():
    mae, x = autoencoder("scs"), images()
    drawn = mae(x)
    perfect = type(drawn)(mae.target(x), drawn.visible)
    assert mae.loss(x, perfect) == 0
    assert torch.allclose(mae.picture(x, perfect), x, atol=1e-12)


@pytest.mark.parametrize("kind", ENCODERS)
def test_gradients_reach_everything_but_the_classifier(kind):
    mae, x = autoencoder(kind).train(), images()
    mae.loss(x, mae(x)).backward()
    silent = {name for name, parameter in mae.named_parameters() if parameter.grad is None}
    assert silent == {"encoder.head.weight", "encoder.head.bias"}
    assert all(torch.isfinite(each.grad).all() for each in mae.parameters() if each.grad is not None)
    assert mae.encoder.get_parameter(next(n for n, _ in mae.encoder.named_parameters())).grad.any()


def test_the_loss_has_the_gradient_that_differences_give():
    # Through an ANN twin, whose loss is smooth; the mask's part is the same for spikes.
    mae, x = autoencoder("ann").train(), images()
    visible = mae.draw_mask(x)
    weight = mae.encoder.stem.blocks[0].down.conv.weight
    mae.loss(x, mae(x, visible)).backward()
    with torch.no_grad():
        values = []
        for step in (1e-6, -2e-6):
            weight[0, 0, 0, 0] += step
            values.append(mae.loss(x, mae(x, visible)).item())
    # Second-order error of central differences, and their rounding.
    assert weight.grad[0, 0, 0, 0].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-7)


def test_the_decoder_gets_each_token_at_its_place():
    torch.manual_seed(0)
    decoder = Decoder(3, 5, grid=(2, 2), dim=8, depth=0, heads=1)
    places = torch.tensor([[0, 3], [3, 0]])
    tokens = torch.randn(1, 2, 3).repeat(2, 1, 1)
    drawn = decoder(tokens, places)
    # Without blocks every patch depends on its own token and position only.
    assert torch.equal(drawn[0, 1], drawn[1, 1])
    assert torch.equal(drawn[0, 0], decoder(tokens[:1, :1], places[:1, :1])[0, 0])
    assert torch.equal(drawn[1, 3], decoder(tokens[:1, :1], places[:1, 1:])[0, 3])


def test_the_decoder_of_the_paper_has_its_size():
    counts = []
    for dim in (384, 512, 768):
        decoder = Decoder(dim, 768, grid=(14, 14))
        counts.append(sum(each.numel() for each in decoder.parameters()))
    # 3.41 M in the paper: without the first layer, with the positions counted (docs/errata.md).
    assert counts == [3_455_744, 3_488_512, 3_554_048]
    assert [count - (dim * 256 + 256) + 196 * 256 for count, dim in zip(counts, (384, 512, 768), strict=True)] == [
        3_407_360
    ] * 3


def test_the_encoder_loads_straight_into_the_dense_network(tmp_path):
    mae, x = autoencoder("scs"), images()
    mae.train()
    mae.loss(x, mae(x)).backward()
    mae.eval()
    dense = create_model(ENCODERS["scs"][0], **ENCODERS["scs"][1]).double().eval()
    dense.load_state_dict(mae.encoder.state_dict())
    assert torch.equal(dense(x), mae.encoder(x))


def encoded(x=None, visible=None):
    mae = autoencoder("scs")
    x = images() if x is None else x
    return mae.encode(x, mae.draw_mask(images()) if visible is None else visible)


def loss_of_nothing_hidden():
    mae, x = autoencoder("scs"), images()
    return mae.loss(x, mae(x, torch.ones(4, 4, 4, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MAE(torch.nn.Linear(2, 2), image_size=16), "knows Spikformer, MetaSpikeFormer, got Linear"),
        (lambda: MAE(create_model(ENCODERS["scs"][0], **V2), image_size=18), "multiple of the patch size 4, got 18"),
        (lambda: encoded(visible=torch.ones(4, 2, 2, dtype=torch.bool)), r"must be \[4, 4, 4\] of torch.bool, got"),
        (lambda: encoded(visible=torch.ones(1, 4, 4, dtype=torch.bool)), r"got \[1, 4, 4\] of torch.bool"),
        (lambda: encoded(visible=torch.ones(4, 4, 4, dtype=torch.uint8)), "of torch.uint8"),
        (lambda: encoded(visible=torch.zeros(4, 4, 4, dtype=torch.bool)), r"at least one; got \[0\]"),
        (lambda: encoded(visible=torch.rand(4, 4, 4) < torch.rand(4, 1, 1)), "equally many visible cells"),
        (lambda: encoded(x=torch.zeros(4, 3, 32, 32)), r"must be \[B, 3, 16, 16\], got shape \(4, 3, 32, 32\)"),
        (lambda: encoded(x=torch.zeros(2, 4, 3, 16, 16)), r"got shape \(2, 4, 3, 16, 16\)"),
        (lambda: loss_of_nothing_hidden(), "there is no hidden one to draw"),
        (
            lambda: MAE(create_model(ENCODERS["scs"][0], **V2, attention=partial(SDSA3, heads=2)), image_size=16),
            "blocks.0.attn.q_conv.dw mixes neighbours",
        ),
        (
            lambda: MAE(
                create_model(ENCODERS["scs"][0], **(V2 | {"neuron": partial(LIF, v_reset=1.0)})), image_size=16
            ),
            "fires without input",
        ),
        (
            lambda: MAE(create_model(ENCODERS["scs"][0], **V2), image_size=16, decoder_heads=3),
            "decoder_heads=3, got 256",
        ),
    ],
)
def test_mistakes_are_told(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kind", ["scs", "sps", "meta"])
def test_bfloat16_trains_with_a_loss_in_float32(kind):
    mae, x = autoencoder(kind).float().train(), images().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = mae.loss(x, mae(x))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(each.grad).all() for each in mae.parameters() if each.grad is not None)


def test_a_compiled_encoder_is_unwrapped_and_a_compiled_autoencoder_runs_eagerly(unchecked):
    mae, x = autoencoder("scs").eval(), images()
    visible = mae.draw_mask(x)
    wanted = mae.encode(x, visible)[0]
    wrapped = MAE(torch.compile(mae.encoder), image_size=16, decoder_dim=16, decoder_depth=1, decoder_heads=2).double()
    assert torch.equal(wrapped.eval().encode(x, visible)[0], wanted)
    drawn = torch.compile(mae, backend="eager")(x, visible)
    assert torch.equal(drawn.patches, mae(x, visible).patches)
