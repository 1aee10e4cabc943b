"""Spikformer V1 against the authors' network: every recorded spike, logits, loss, gradients, batch-norm statistics."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from spikeformers.weights import load_official
from spikeformers.weights.spikformer import own_key
from spikeformers.zoo import create_model

HERE = Path(__file__).parent
SIZES = {"dim": 32, "heads": 4, "depth": 2, "num_classes": 10}
EVALUATIONS = [("cifar10_eval_T4", "spikformer_cifar_4_384", 4), ("imagenet_eval_T1", "spikformer_8_512", 1)]
MODULES = {"sps_out": "stem", "out": "", "attn_out": "attn_shortcut.neuron", "mlp_out": "mlp_shortcut.neuron"}
MODULES |= {f"{name}_lif": f"attn.{name}" for name in ("q", "k", "v", "attn")}


def official(file: str, name: str, *, steps: int, dtype: torch.dtype) -> tuple[dict, nn.Module]:
    reference = load_file(HERE / f"spikformer_{file}.safetensors")
    model = create_model(name, steps=steps, **SIZES)
    load_official(model, {key[6:]: tensor for key, tensor in reference.items() if key.startswith("state.")})
    return reference, model.to(dtype)


def module_of(act: str) -> str:
    """`block0_q_lif` -> `blocks.0.attn.q`."""
    if act == "sps_out":
        return "stem"
    block, part = act.split("_", 1)
    return f"blocks.{block.removeprefix('block')}.{MODULES[part]}".rstrip(".")


def outputs(model: nn.Module, images: torch.Tensor, names: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and what each named module gives."""
    heard, modules = {}, dict(model.named_modules())

    def keep(name: str):
        return lambda _, __, out: heard.__setitem__(name, out[-1] if isinstance(out, list) else out)

    hooks = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        return model(images), heard
    finally:
        for hook in hooks:
            hook.remove()


def assert_acts_equal(reference: dict, heard: dict[str, torch.Tensor]) -> None:
    acts = [key for key in reference if key.startswith("act.")]
    assert len(acts) == 15
    for key in acts:
        name = key.removeprefix("act.")
        ours = heard[module_of(name)].flatten(2)  # [T*B, C, N]
        # They keep tokens as [T, B, N, C] in the CIFAR layout, as [T, B, C, N] or [T, B, C, H, W] in the others.
        theirs = reference[key].flatten(0, 1).flatten(2)
        theirs = theirs.mT if theirs.shape != ours.shape else theirs
        assert torch.equal(ours.to(torch.uint8), theirs), name


@pytest.mark.parametrize(("file", "name", "steps"), EVALUATIONS)
# Spikes are equal, so logits differ by the rounding of pooling and of the classifier only.
@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), [(torch.float32, "", 1e-5), (torch.float64, "_f64", 1e-9)])
def test_every_spike_and_the_logits_equal_the_authors(file, name, steps, dtype, suffix, tolerance):
    reference, model = official(file, name, steps=steps, dtype=dtype)
    names = [module_of(key.removeprefix("act.")) for key in reference if key.startswith("act.")]
    with torch.no_grad():
        logits, heard = outputs(model.eval(), reference["input"].to(dtype), names)
    assert_acts_equal(reference, heard)
    assert torch.allclose(logits, reference[f"logits{suffix}"], atol=tolerance, rtol=0)


def trained_once(dtype: torch.dtype) -> tuple[dict, nn.Module, torch.Tensor, dict[str, torch.Tensor]]:
    reference, model = official("cifar10_train_T4", "spikformer_cifar_4_384", steps=4, dtype=dtype)
    names = [module_of(key.removeprefix("act.")) for key in reference if key.startswith("act.")]
    logits, heard = outputs(model.train(), reference["input"].to(dtype), names)
    loss = F.cross_entropy(logits, reference["target"])
    loss.backward()
    return reference, model, loss.detach(), heard


def test_a_training_step_equals_the_authors():
    reference, model, loss, heard = trained_once(torch.float32)
    assert_acts_equal(reference, heard)
    assert loss.item() == pytest.approx(reference["loss"].item(), abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = set()
    for key, theirs in reference.items():
        if key.startswith("grad."):
            name = own_key(key.removeprefix("grad."))
            ours = gradients[name].view_as(theirs)
            # 1e-5 of the largest element; beside it 1e-6 for biases in front of a batch norm, which get rounding noise.
            assert torch.allclose(ours, theirs, atol=1e-6 + 1e-5 * theirs.abs().max().item(), rtol=0), key
            compared.add(name)
    assert compared == set(gradients)
    buffers = model.state_dict()
    for key, theirs in reference.items():
        if key.startswith("after."):
            ours = buffers[own_key(key.removeprefix("after."))]
            assert torch.allclose(ours.to(theirs.dtype), theirs, atol=1e-6, rtol=1e-5), key


def test_the_training_loss_equals_the_authors_in_float64():
    reference, _, loss, _ = trained_once(torch.float64)
    assert loss.item() == pytest.approx(reference["loss_f64"].item(), abs=1e-9)


@pytest.mark.parametrize(
    ("layout", "name", "unused"),
    [
        ("cifar10", "spikformer_cifar_4_384", 8),
        ("imagenet", "spikformer_8_512", 8),
        ("cifar10dvs", "spikformer_dvs_2_256", 11),
    ],
)
def test_every_key_of_the_three_layouts_is_loaded_or_named_as_dropped(layout, name, unused):
    state = {}
    for line in (HERE / f"spikformer_{layout}_keys.txt").read_text().splitlines():
        key, shape, dtype = line.split("\t")
        size = [int(number) for number in shape.strip("(),").split(",") if number.strip()]
        state[key] = torch.zeros(size, dtype=getattr(torch, dtype.removeprefix("torch.")))
    model = create_model(name, **SIZES)
    report = load_official(model, state)
    assert (report.loaded, len(report.dropped)) == (len(model.state_dict()), unused)
    assert all("norm" in key or key == "pos_embed" for key in report.dropped)
    assert all(not tensor.any() for tensor in model.state_dict().values())
