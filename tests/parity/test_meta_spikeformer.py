"""Meta-SpikeFormer against the authors' network: every spike count, logits, loss, gradients, batch-norm statistics."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from spikeformers.neurons import Neuron
from spikeformers.weights import load_official
from spikeformers.weights.meta_spikeformer import own_key
from spikeformers.zoo import create_model

SIZES = {"dims": (8, 16, 32, 40), "num_classes": 10}
# The authors' neurons in the order they fire, which is ours: names differ, order does not.
LEVELS = ("downsample1_1", "ConvBlock1_1.0", "downsample1_2", "ConvBlock1_2.0", "downsample2", "ConvBlock2_1.0")
LEVELS += ("ConvBlock2_2.0", "downsample3", *(f"block3.{i}" for i in range(6)), "downsample4", "block4.0", "block4.1")
IN_LEVEL = {
    "downsample1_1": (),
    "downsample": ("encode_lif",),
    "ConvBlock": ("Conv.lif1", "Conv.lif2", "lif1", "lif2"),
    "block": ("attn.head_lif", "attn.q_lif", "attn.k_lif", "attn.v_lif", "attn.attn_lif", "mlp.fc1_lif", "mlp.fc2_lif"),
}
FIRING_ORDER = [
    f"{level}.{lif}"
    for level in LEVELS
    for lif in next(lifs for prefix, lifs in IN_LEVEL.items() if level.startswith(prefix))
] + ["lif"]


@pytest.fixture(scope="module")
def reference():
    return load_file(Path(__file__).parent / "meta_spikeformer.safetensors")


def official_model(reference, *, steps: int, distillation: bool) -> torch.nn.Module:
    model = create_model("meta_spikeformer_15m", steps=steps, distillation=distillation, **SIZES)
    load_official(model, {key[6:]: tensor for key, tensor in reference.items() if key.startswith("state.")})
    return model


def counts_in_order(model: torch.nn.Module, images: torch.Tensor, steps: int) -> list[list[int]]:
    """Spikes of every neuron at every step, in the order the neurons fire."""
    counts = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: counts.append(out.unflatten(0, (steps, -1)).flatten(1).sum(1)))
        for module in model.modules()
        if isinstance(module, Neuron)
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [count.long().tolist() for count in counts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_spike_count_at_every_step_equals_the_authors(reference, dtype):
    model = official_model(reference, steps=4, distillation=True).to(dtype).eval()
    with torch.no_grad():
        ours = counts_in_order(model, reference["eval.input"].to(dtype), 4)
    assert len(FIRING_ORDER) == len(ours) == 77
    for name, counts in zip(FIRING_ORDER, ours, strict=True):
        assert counts == reference[f"eval.spikecount.{name}"].tolist(), name


# Spikes are equal, so logits differ by the rounding of the last linear layer only.
@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), [(torch.float32, "", 1e-5), (torch.float64, "_f64", 1e-9)])
def test_logits_equal_the_authors(reference, dtype, suffix, tolerance):
    images = reference["eval.input"].to(dtype)
    with torch.no_grad():
        pair = official_model(reference, steps=4, distillation=True).to(dtype).eval()(images)
        single = official_model(reference, steps=4, distillation=False).to(dtype).eval()(images)
    assert torch.allclose(pair, reference[f"eval.out.logits_kd_eval{suffix}"], atol=tolerance, rtol=0)
    assert torch.allclose(single, reference[f"eval.out.logits{suffix}"], atol=tolerance, rtol=0)


def trained_once(reference, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.Tensor]:
    model = official_model(reference, steps=1, distillation=False).to(dtype).train()
    logits = model(reference["train.input"].to(dtype))
    loss = F.cross_entropy(logits, reference["train.target"], label_smoothing=0.1)
    loss.backward()
    return model, loss.detach()


def test_training_loss_and_gradient_norms_equal_the_authors_in_float64(reference):
    model, loss = trained_once(reference, torch.float64)
    assert loss.item() == pytest.approx(reference["train.loss_f64"].item(), abs=1e-9)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = 0
    for key, norm in reference.items():
        if key.startswith("train.gradnorm_f64."):
            ours = gradients[own_key(key.removeprefix("train.gradnorm_f64."))].norm().item()
            # Parameters in front of a batch norm have a gradient of rounding noise: an absolute tolerance beside.
            assert ours == pytest.approx(norm.item(), rel=1e-7, abs=1e-9), key
            compared += 1
    assert compared == len(gradients)


def test_batch_norm_statistics_after_a_training_step_equal_the_authors(reference):
    model, loss = trained_once(reference, torch.float32)
    assert loss.item() == pytest.approx(reference["train.loss"].item(), abs=1e-5)
    buffers = model.state_dict()
    for key, theirs in reference.items():
        if key.startswith("train.buffer_after."):
            ours = buffers[own_key(key.removeprefix("train.buffer_after."))]
            assert torch.allclose(ours.to(theirs.dtype), theirs, atol=1e-5, rtol=1e-5), key


def test_every_gradient_element_equals_the_authors(shared_data):
    path = shared_data.parent / "reference" / "meta_spikeformer_train_T1.safetensors"
    if not path.is_file():
        pytest.skip("the full gradients (2.3 MB) are not part of the project")
    full = load_file(path)
    renamed = {key if key.startswith("state.") else f"train.{key}": tensor for key, tensor in full.items()}
    model, _ = trained_once(renamed, torch.float32)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for key, theirs in full.items():
        if key.startswith("grad."):
            ours = gradients[own_key(key.removeprefix("grad."))].view_as(theirs)
            # 1e-5 of the largest element; beside it 1e-6 for the gradients that are zero but for rounding.
            assert torch.allclose(ours, theirs, atol=1e-6 + 1e-5 * theirs.abs().max().item(), rtol=0), key
