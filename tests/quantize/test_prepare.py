"""Which layers get how many bits, in the catalogue and plain torch modules; refusals that change nothing; `plain`."""

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

import spikeformers as sf
from spikeformers.quantize import LSQLayer, convert, fold, plain, prepare, quantizable

TINY_META = {"dims": (8, 16, 32, 40), "num_classes": 5, "blocks": (1, 1, 1, 1, 1)}
TINY_SPIKFORMER = {"dim": 32, "depth": 1, "heads": 2, "num_classes": 5}
FAMILIES = {
    "meta_spikeformer_15m": TINY_META,
    "qsd_transformer_t": TINY_META,
    "spikformer_8_384": TINY_SPIKFORMER,
    "spikformer_v2_8_384": TINY_SPIKFORMER,
    "spikformer_cifar_2_384": TINY_SPIKFORMER,
    "spikformer_dvs_2_256": TINY_SPIKFORMER | {"in_channels": 3, "steps": 2},
}


class Attention(nn.Module):
    """By name an attention: its layers are projections."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(torch.tanh(self.qkv(x)))


class Network(nn.Module):
    """stem.0, block.attn.qkv, block.attn.proj, block.mlp.0, head: every kind, in this order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.block = nn.ModuleDict({"attn": Attention(4), "mlp": nn.Sequential(nn.Linear(4, 4), nn.ReLU())})
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block["mlp"](self.block["attn"](self.stem(x))))


NAMES = ["stem.0", "block.attn.qkv", "block.attn.proj", "block.mlp.0", "head"]


def bits_of(model: nn.Module) -> dict[str, int]:
    return {name: each.bits for name, each in model.named_modules() if isinstance(each, LSQLayer)}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(before: dict[str, Tensor], model: nn.Module) -> bool:
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in after)


def kinds(model: nn.Module) -> list[type]:
    return [type(each) for each in model.modules()]


def test_layers_come_in_order_with_their_kind():
    assert [(name, kind) for name, _, kind in quantizable(Network())] == list(
        zip(NAMES, ["conv", "attention", "attention", "linear", "linear"], strict=True)
    )


def test_the_innermost_module_with_a_kind_decides_and_a_module_may_name_its_own():
    model = Network()
    model.block["mlp"].quantize_role = "attention"
    model.block["attn"].value = nn.Sequential(nn.Linear(4, 4))
    model.block["attn"].value.quantize_role = "linear"
    kinds = {name: kind for name, _, kind in quantizable(nn.Sequential(model))}
    assert kinds["0.block.mlp.0"] == kinds["0.block.attn.proj"] == "attention"
    assert kinds["0.block.attn.value.0"] == kinds["0.head"] == "linear"


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (3, [3, 3, 3, 3, 3]),
        ({"*": 3}, [3, 3, 3, 3, 3]),
        ({"attention": 3}, [0, 3, 3, 0, 0]),
        ({"conv": 3}, [3, 0, 0, 0, 0]),
        ({"linear": 3}, [0, 0, 0, 3, 3]),
        ({"first": 8}, [8, 0, 0, 0, 0]),
        ({"last": 8}, [0, 0, 0, 0, 8]),
        ({"*": 4, "linear": None}, [4, 4, 4, 0, 0]),
        # kinds before the rest, first and last before kinds, names before all of them, however the dict is written
        ({"*": 2, "linear": 3, "conv": 4}, [4, 2, 2, 3, 3]),
        ({"*": 2, "linear": 3, "conv": 4, "last": 5, "first": 6}, [6, 2, 2, 3, 5]),
        ({"last": None, "*": 2, "linear": 3, "first": None, "conv": 4}, [0, 2, 2, 3, 0]),
        ({"*": 2, "attention": 3, "first": 4, "last": 5, "head": 6, "stem.*": 7, "*.qkv": 8}, [7, 8, 3, 2, 6]),
        ({"*": 2, "block.attn.*": None}, [2, 0, 0, 2, 2]),
        # among names the first that fits
        ({"block.*": 3, "*.attn.*": 4}, [0, 3, 3, 3, 0]),
        ({"*.attn.*": 4, "block.*": 3}, [0, 4, 4, 3, 0]),
        ({"block.attn.[pq]*": 5, "hea?": 2}, [0, 5, 5, 0, 2]),
    ],
)
def test_bits_of_a_layer_are_those_of_the_most_particular_key(bits, expected):
    model = Network()
    assert prepare(model, bits=bits) is model
    assert bits_of(model) == {name: width for name, width in zip(NAMES, expected, strict=True) if width}
    given = [type(dict(model.named_modules())[name]) for name, width in zip(NAMES, expected, strict=True) if not width]
    assert all(kind in (nn.Conv2d, nn.Linear) for kind in given)
    assert model.quantization["bits"] == bits
    assert model(torch.randn(2, 3, 5, 5)).shape == (2, 2)


def test_four_bits_a_channel_are_what_is_done_unasked():
    model = prepare(Network())
    assert set(bits_of(model).values()) == {4}
    assert len(model.stem[0].alpha) == 4
    assert model.stem[0].offset is None
    assert model.quantization == {
        "bits": 4,
        "per_channel": True,
        "offset": False,
        "converted": False,
        "folded": False,
        "layers": dict.fromkeys(NAMES, 4),
    }


@pytest.mark.parametrize("bits", [1, 0, 9, -4, True, 4.0, "4", [4]])
def test_bits_that_no_weight_can_have_are_refused_and_nothing_changes(bits, unchecked):
    for given in (bits, {"head": 3, "*": bits}):
        model = prepare(Network(), bits={"attention": 2}, offset=True)
        before, types, told = state(model), kinds(model), model.quantization
        with pytest.raises(ValueError, match="bits must be between 2 and 8, got"):
            prepare(model, bits=given)
        assert kinds(model) == types
        assert same(before, model)
        assert model.quantization == told


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("atention", r"no layer is called 'atention'; closest: attention"),
        ("block.attn.qvk", r"no layer is called 'block.attn.qvk'; closest: block.attn.qkv"),
        ("stage9.*", r"no layer is called 'stage9.\*'; closest: "),
        ("stem", r"no layer is called 'stem'; closest: stem.0"),
    ],
)
def test_a_key_that_fits_no_layer_is_refused_with_the_closest_and_nothing_changes(key, message):
    model = Network()
    before, types = state(model), kinds(model)
    with pytest.raises(ValueError, match=message):
        prepare(model, bits={"*": 4, key: 3})
    assert kinds(model) == types
    assert same(before, model)


@pytest.mark.parametrize("bits", [{}, {"*": None}, {"first": None, "head": None}])
def test_bits_that_leave_every_layer_in_float_are_refused_and_nothing_changes(bits):
    model = prepare(Network(), bits=3)
    before, told = state(model), model.quantization
    with pytest.raises(ValueError, match="leaves every layer in float"):
        prepare(model, bits=bits)
    assert bits_of(model) == dict.fromkeys(NAMES, 3)
    assert same(before, model)
    assert model.quantization == told


def test_a_kind_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match="this model has no attention layer, only conv and linear"):
        prepare(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(2, 2)), bits={"attention": 4})


@pytest.mark.parametrize("model", [nn.BatchNorm2d(3), nn.Sequential(nn.ReLU()), nn.Conv3d(1, 1, 1), nn.Embedding(3, 4)])
def test_a_model_without_layers_to_quantise_is_refused(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no convolution or linear layer"):
        prepare(model)


def test_a_converted_model_is_refused_and_stays():
    model = convert(prepare(Network()))
    before, types = state(model), kinds(model)
    with pytest.raises(ValueError, match="its float weights are gone"):
        prepare(model, bits=2)
    assert kinds(model) == types
    assert same(before, model)


def test_preparing_again_is_preparing_the_float_weights():
    model = Network()
    wanted = prepare(copy.deepcopy(model), bits=3, per_channel=False)
    for options in ({"bits": 2, "offset": True}, {"bits": 8}, {"bits": {"attention": 5}}, {"bits": 3}, {"bits": 3}):
        prepare(model, **options)
    prepare(model, bits=3, per_channel=False)
    assert kinds(model) == kinds(wanted)
    assert same(state(wanted), model)
    assert model.quantization == wanted.quantization
    assert bits_of(prepare(model, bits={"head": 4})) == {"head": 4}
    assert torch.equal(model.block["mlp"][0].weight, wanted.block["mlp"][0].weight)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_the_catalogue_is_quantised_whole_and_trains(name):
    model = sf.create_model(name, **FAMILIES[name])
    names = [layer for layer, each in model.named_modules() if isinstance(each, nn.Conv1d | nn.Conv2d | nn.Linear)]
    before = {key: value for key, value in model.named_parameters() if not key.endswith("alpha")}
    prepare(model, bits=4)
    assert list(bits_of(model)) == names
    assert all(parameter is before[key] for key, parameter in model.named_parameters() if not key.endswith("alpha"))
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    grads = [each.alpha.grad for each in model.modules() if isinstance(each, LSQLayer)]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", FAMILIES)
def test_kinds_of_the_catalogue_are_projections_perceptrons_and_classifiers_and_other_convolutions(name):
    model = sf.create_model(name, **FAMILIES[name])
    for layer, _, kind in quantizable(model):
        expected = "attention" if ".attn." in layer else "linear" if ".mlp." in layer or layer == "head" else "conv"
        assert kind == expected
    assert {kind for _, _, kind in quantizable(model)} == {"attention", "conv", "linear"}


def test_a_lone_layer_is_a_model():
    layer = nn.Linear(4, 3)
    x, weight = torch.randn(2, 4), layer.weight
    assert list(quantizable(layer)) == [("", layer, "linear")]
    assert prepare(layer, bits={"first": 2}) is layer
    assert layer.bits == 2
    assert layer.weight is weight
    y = layer(x)
    assert torch.equal(convert(layer)(x), y)
    assert torch.equal(plain(layer)(x), y)
    assert type(layer) is nn.Linear


def test_a_network_of_torchvision_is_quantised_whole():
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    names = [name for name, each in model.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    prepare(model, bits={"*": 4, "first": 8, "last": 8})
    bits = bits_of(model)
    assert list(bits) == names
    assert len(names) == 21
    assert bits["conv1"] == bits["fc"] == 8
    assert {width for name, width in bits.items() if name not in ("conv1", "fc")} == {4}
    assert {kind for name, _, kind in quantizable(model) if name != "fc"} == {"conv"}


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_torchs_encoder_multiplies_by_low_bit_weights_in_eval_mode_too(inference):
    # In eval mode it has a short cut that reads linear1.weight itself, in float.
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True), 2)
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    prepare(encoder, bits=2)
    names = [f"layers.{index}.linear{number}" for index in (0, 1) for number in (1, 2)]
    assert list(bits_of(encoder)) == names  # attention computes with its projections' weights: they stay in float
    assert type(encoder.layers[0].self_attn.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    trained, padded = encoder(x), encoder(x, src_key_padding_mask=padding)
    with inference():
        # float32, and attention has a short cut of its own
        torch.testing.assert_close(encoder.eval()(x), trained, rtol=0, atol=2e-6)
        masked = encoder(x, src_key_padding_mask=padding)
        torch.testing.assert_close(masked[~padding], padded[~padding], rtol=0, atol=2e-6)
        before = encoder(x)
        for change in (convert, plain):
            assert torch.equal(change(encoder)(x), before)
            assert torch.equal(encoder(x, src_key_padding_mask=padding), masked)


def test_torchs_encoder_keeps_its_short_cut_where_its_layers_stay_in_float():
    stack = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    prepare(stack, bits={"last": 4})
    assert stack[0].activation_relu_or_gelu == 1


def test_a_layer_in_two_places_is_quantised_once_and_stays_one():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(layer), Attention(4), nn.Sequential(layer))
    assert [name for name, _, _ in quantizable(model)] == ["0.0", "1.qkv", "1.proj"]
    prepare(model, bits={"last": 2, "*": 3})
    assert model[0][0] is model[2][0]
    assert (layer.bits, model[1].proj.bits) == (3, 2)
    x = torch.randn(2, 4)
    y = model(x)
    assert torch.equal(convert(model)(x), y)
    assert torch.equal(plain(model)(x), y)
    assert model[0][0] is model[2][0]


def test_layers_that_share_a_weight_still_share_it_and_have_step_sizes_of_their_own():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    for tied in (model[1], model[2]):
        tied.weight = model[0].weight
    prepare(model, bits=3)
    assert model[0].weight is model[1].weight
    assert model[1].weight is model[2].weight
    assert model[1].alpha is not model[2].alpha
    with torch.no_grad():
        model[2].alpha.mul_(1.7)
    x = torch.arange(4)
    y, embedded = model(x), model[0](x)
    restored = plain(copy.deepcopy(model))
    assert torch.equal(restored(x), y)
    assert torch.equal(restored[0](x), embedded)
    assert torch.equal(convert(model)(x), y)


@pytest.mark.parametrize("options", [{}, {"bits": 2, "offset": True}, {"bits": 8, "per_channel": False}])
def test_plain_gives_torchs_layers_back_with_equal_predictions(options):
    model = prepare(Network(), **options).eval()
    x = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        for layer in (each for each in model.modules() if isinstance(each, LSQLayer)):
            layer.alpha.mul_(0.5)
            if layer.offset is not None:
                layer.offset.normal_(0, 0.1)
    y, integers = model(x), model.head.integers()
    assert plain(model) is model
    assert torch.equal(model(x), y)
    assert kinds(model) == kinds(Network())
    assert model.state_dict().keys() == Network().state_dict().keys()
    assert model.quantization is None
    assert all(each.requires_grad for each in model.parameters())
    assert len(model.head.weight[0].unique()) <= len(integers[0].unique())
    assert plain(model)(x).equal(y)


def test_what_a_model_says_of_itself_is_never_what_an_outer_call_made_untrue(tmp_path):
    inner = sf.create_model("qsd_transformer_t", **TINY_META)
    model = nn.Sequential(inner, nn.Linear(5, 5))
    prepare(model, bits={"1": 2, "*": 3})
    assert inner.quantization is None  # "1" is no name of its own
    with pytest.raises(ValueError, match=r"low-bit layers are not those that quantize\.prepare made"):
        inner.save_pretrained(tmp_path)
    assert model.quantization["bits"] == {"1": 2, "*": 3}
    prepare(inner, bits=2)
    plain(model)
    assert model.quantization is inner.quantization is None


def test_a_sequence_folds_its_norms():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double().eval()
    nn.init.uniform_(model[1].running_mean)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    convert(prepare(model, bits=4))
    expected = model(x)
    assert torch.allclose(fold(model)(x), expected, atol=1e-12, rtol=0)  # one product for two
    assert type(model[1]) is nn.Identity
