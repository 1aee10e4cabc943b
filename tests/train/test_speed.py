"""The switches of `recipe.speed`: each trains as without it, and together with what it cannot do it is refused."""

import copy
import io
import re

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import spikeformers as sf
from spikeformers.attention import ssa
from spikeformers.train.loop import _Work, train
from spikeformers.train.recipe import FineGrained, ModelChoice, Optim, Pretrain, Quantize, Speed
from spikeformers.train.saved import read_run
from spikeformers.train.speed import apply_speed, undo_speed

SMALL = {"dims": (8, 16, 32, 40), "num_classes": 5}


def weights(run) -> dict[str, torch.Tensor]:
    return read_run(run)[0].state_dict()


@pytest.fixture
def exact(tiny):
    """The tiny recipe in float64, whose spikes rounding does not turn."""
    return lambda **changes: tiny(precision="float64", ema_decay=0.9, **changes)


def assert_same_end(one, other) -> None:
    """Both runs ended with equal weights, up to rounding."""
    plain = weights(one)
    for name, value in weights(other).items():
        # 8 steps of AdamW, which divides by the root of tiny squares, in float64; saved in it.
        torch.testing.assert_close(value, plain[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("switch", ["fused_qkv", "fused_norms", "fused_optimizer", "recompute"])
def test_a_switch_changes_nothing_but_rounding(exact, tmp_path, switch):
    wanted = train(exact(), run=tmp_path / "plain")
    found = train(exact(speed=Speed(**{switch: True})), run=tmp_path / switch)
    assert (found.accuracy, found.energy_mj) == (wanted.accuracy, wanted.energy_mj)
    assert_same_end(tmp_path / "plain", tmp_path / switch)


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2, "batch_size": 4},
        {"quantize": Quantize(bits=4)},
        {"model": ModelChoice(neuron="lif", steps=2, dims=(8, 8, 8, 8), blocks=(1, 1, 1, 1, 1), options={"heads": 2})},
    ],
    ids=["accumulate", "quantize", "lif"],
)
@pytest.mark.parametrize("speed", [Speed(fused_norms=True, recompute=True), Speed(fused_qkv=True, recompute=True)])
def test_switches_go_with_other_settings(exact, tmp_path, changes, speed):
    train(exact(epochs=1, **changes), run=tmp_path / "plain")
    train(exact(epochs=1, speed=speed, **changes), run=tmp_path / "fast")
    assert_same_end(tmp_path / "plain", tmp_path / "fast")


def test_a_training_step_takes_the_form_that_was_asked_for(exact, tmp_path, monkeypatch):
    together, plain = [], ssa.side_by_side
    monkeypatch.setattr(ssa, "side_by_side", lambda *call: together.append(1) or plain(*call))
    train(exact(epochs=1), run=tmp_path / "plain")
    assert not together
    text = io.StringIO()
    console = Console(file=text, width=200)
    train(exact(epochs=1, speed=Speed(fused_qkv=True)), run=tmp_path / "fused", console=console)
    assert len(together) == 2 * 4  # attentions x steps
    assert "speed.fused_qkv: 2 of 2 attentions" in text.getvalue()


def test_a_run_of_all_of_them_resumes_to_the_very_weights(exact, tmp_path, monkeypatch):
    recipe = exact(speed=Speed(fused_norms=True, fused_optimizer=True, recompute=True))
    train(recipe, run=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("spikeformers.train.loop._Work.close_epoch", stopping_in_epoch(2))
        with pytest.raises(ConnectionError):
            train(recipe, run=tmp_path / "broken")
    train(recipe, run=tmp_path / "broken", resume=True)
    wanted = weights(tmp_path / "whole")
    assert all(torch.equal(value, wanted[name]) for name, value in weights(tmp_path / "broken").items())


def stopping_in_epoch(number: int):
    """The end of an epoch at which the power goes."""
    usual = _Work.close_epoch

    def close(work, show, logs):
        if work.epoch + 1 == number:
            raise ConnectionError("power cut")
        usual(work, show, logs)

    return close


def test_a_compiled_run_hears_its_first_step_and_ends_as_a_plain_one(exact, tmp_path, unchecked, monkeypatch):
    compiled, compile_module = [], nn.Module.compile

    def quick(module, **options):
        """torch.compile without the minutes of a C++ compiler: the same graph, run as it was traced."""
        assert options.pop("mode") == "default"  # CUDA graphs are for GPUs
        compiled.append(options)
        return compile_module(module, **options, backend=counted)

    monkeypatch.setattr(nn.Module, "compile", quick)
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    texts = [io.StringIO(), io.StringIO()]
    wanted = train(exact(epochs=1), run=tmp_path / "plain", console=Console(file=texts[0], width=500))
    speed = Speed(compile=True, fused_qkv=True)
    found = train(exact(epochs=1, speed=speed), run=tmp_path / "fast", console=Console(file=texts[1], width=500))
    assert compiled == [{"fullgraph": True, "dynamic": False}]
    assert len(graphs) == 1  # of training steps; tests and energy run as written
    assert (found.accuracy, found.energy_mj) == (wanted.accuracy, wanted.energy_mj)
    silent = [re.findall(r"silent in the first step.*?\(", text.getvalue()) for text in texts]
    assert silent[0] == silent[1]
    assert_same_end(tmp_path / "plain", tmp_path / "fast")


def test_afterwards_the_network_is_what_it_was():
    model = sf.create_model("meta_spikeformer_15m", **SMALL)
    kinds = [type(module) for module in model.modules()]
    twin = copy.deepcopy(model)
    apply_speed(twin, Speed(fused_qkv=True, fused_norms=True, recompute=True, compile=True), torch.rand(2, 3, 32, 32))
    assert [type(module) for module in twin.modules()] != kinds
    undo_speed(twin)
    assert [type(module) for module in twin.modules()] == kinds
    assert not any(getattr(module, "fused", False) for module in twin.modules())
    assert [vars(module).keys() for module in twin.modules()] == [vars(module).keys() for module in model.modules()]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"speed": Speed(compile=True, recompute=True)}, "speed.compile=true does not go with recompute"),
        ({"speed": Speed(compile=True, fused_norms=True)}, "does not go with fused_norms"),
        ({"speed": Speed(compile=True), "fgd": FineGrained(teacher="x")}, "does not go with fgd.teacher"),
        ({"speed": Speed(recompute=True), "pretrain": Pretrain(mask_ratio=0.5)}, "go with pretrain.mask_ratio"),
        ({"speed": Speed(fused_qkv=True, fused_norms=True)}, "does not go with fused_norms"),
        ({"speed": Speed(fused_qkv=True), "sync_bn": True}, "does not go with sync_bn: .*; set speed.fused_qkv=false"),
        ({"speed": Speed(recompute=True), "quantize": Quantize(bits=4, exact_integer=True)}, "quantize.exact_integer"),
        ({"speed": Speed(fused_qkv=True), "model": ModelChoice(options={"attention": "identity"})}, "no attention of"),
        ({"speed": Speed(fused_optimizer=True), "optim": Optim(name="lamb")}, "'lamb' has no fused form"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(tiny, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        train(tiny(**changes), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dense_networks_recompute_and_fuse_but_do_not_compile(segmenting, tmp_path):
    with pytest.raises(ValueError, match="does not go with segmentation or detection"):
        train(segmenting(speed=Speed(compile=True)), run=tmp_path / "compiled")
    train(segmenting(epochs=1, precision="float64"), run=tmp_path / "plain")
    speed = Speed(fused_norms=True, recompute=True)
    train(segmenting(epochs=1, precision="float64", speed=speed), run=tmp_path / "fast")
    states = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("plain", "fast")]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_a_run_that_lacks_memory_resumes_with_recomputation(exact, tmp_path, monkeypatch):
    train(exact(), run=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("spikeformers.train.loop._Work.close_epoch", stopping_in_epoch(2))
        with pytest.raises(ConnectionError):
            train(exact(), run=tmp_path / "broken")
    train(exact(speed=Speed(recompute=True)), run=tmp_path / "broken", resume=True)
    wanted = weights(tmp_path / "whole")
    assert all(torch.equal(value, wanted[name]) for name, value in weights(tmp_path / "broken").items())
