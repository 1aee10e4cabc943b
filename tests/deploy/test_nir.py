"""Exported graphs, read back and run by a small interpreter, fire what the network fires; what cannot go is named."""

import copy
import json
import sys
from pathlib import Path

import nir
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spikeformers as sf
from spikeformers.backbones.meta_spikeformer import ANN_TWIN
from spikeformers.deploy import export_nir
from spikeformers.neurons import IELIF, ILIF, LIF, NILIF, Neuron

META = {"dims": (4, 8, 8, 8), "heads": 2, "num_classes": 5, "blocks": (1, 0, 0, 1, 0)}
SPIK = {"dim": 16, "depth": 1, "heads": 2, "num_classes": 5, "patch_size": 4}
NETWORKS = [
    ("meta_spikeformer_15m", META | {"neuron": "lif", "steps": 4}),
    ("meta_spikeformer_15m", META | {"neuron": "i_lif", "levels": 3, "steps": 2, "attention": "sdsa4"}),
    ("meta_spikeformer_15m", META | {"neuron": "ni_lif", "attention": "sdsa1", "shortcut": "vs", "distillation": True}),
    ("qsd_transformer_t", META | {"layer_scale": 0.7}),
    ("spikformer_8_384", SPIK | {"steps": 4}),
    ("spikformer_v2_8_384", SPIK | {"steps": 2, "shortcut": "iand"}),
]


def t(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array))


def pair(array: np.ndarray) -> tuple[int, ...]:
    return tuple(map(int, array))


def react(node: nir.NIRNode, x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One Euler step of dt = 1: what `node` gives for x [B, ...], and its membrane afterwards."""
    if isinstance(node, nir.LIF):
        v = t(node.v_leak) if v is None else v
        v = v + ((t(node.v_leak) - v) + t(node.r) * x) / t(node.tau)
        z = (v > t(node.v_threshold)).to(x.dtype)
        return z, torch.where(z > 0, t(node.v_reset), v)
    if isinstance(node, nir.Threshold):
        return (x > t(node.threshold)).to(x.dtype), None
    if isinstance(node, nir.Conv2d):
        padding = node.padding if isinstance(node.padding, str) else pair(node.padding)
        geometry = pair(node.stride), padding, pair(node.dilation), int(node.groups)
        return F.conv2d(x, t(node.weight), t(node.bias), *geometry), None
    if isinstance(node, nir.Affine):
        return F.linear(x, t(node.weight), t(node.bias)), None
    if isinstance(node, nir.Linear):
        return F.linear(x, t(node.weight)), None
    if isinstance(node, nir.Scale):
        return x * t(node.scale), None
    if isinstance(node, nir.Flatten):
        return x.flatten(1), None
    if isinstance(node, nir.AvgPool2d | nir.SumPool2d):
        divisor = 1 if isinstance(node, nir.SumPool2d) else None
        sizes = map(pair, (node.kernel_size, node.stride, node.padding))
        return F.avg_pool2d(x, *sizes, divisor_override=divisor), None
    assert isinstance(node, nir.Input | nir.Output)
    return x, None


def run(graph: nir.NIRGraph, feeds: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """What every node gives, [T*B, ...]; `feeds`: of the Input nodes, [T*B, ...]."""
    heard = {name: [] for name in graph.nodes}
    membranes = dict.fromkeys(graph.nodes)
    for step in range(steps):
        now = {name: feeds[name].chunk(steps)[step] for name in graph.inputs}
        while len(now) < len(graph.nodes):
            for name, node in graph.nodes.items():
                senders = [sender for sender, taker in graph.edges if taker == name]
                if name not in now and all(sender in now for sender in senders):
                    total = now[senders[0]]
                    for sender in senders[1:]:
                        total = total + now[sender]
                    now[name], membranes[name] = react(node, total, membranes[name])
        for name, value in now.items():
            heard[name].append(value)
    return {name: torch.cat(values) for name, values in heard.items()}


def lively(model: nn.Module) -> nn.Module:
    """Random batch norm statistics, float64: neurons fire, and no current lies on a threshold."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 1.5)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, 0.8, 0.5)
    return model.eval().double()


def heard_by(model: nn.Module, images: Tensor) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Input and output of every layer, [T*B, ...], and the logits."""
    heard = {}
    handles = [
        module.register_forward_hook(lambda _, args, out, name=name: heard.__setitem__(name, (args[0], out)))
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        logits = model(images)
    for handle in handles:
        handle.remove()
    return heard, logits


def run_all(report, folder, model: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], dict, Tensor]:
    """Nodes of all parts, run in order; what layers left out hand to a neuron is taken from the model."""
    wanted, logits = heard_by(model, images)
    found: dict[str, Tensor] = {}
    for part in report.parts:
        graph = nir.read(folder / part.file)
        feeds = {}
        for name in graph.inputs:
            taker = next(taker for sender, taker in graph.edges if sender == name).rstrip(".0123456789")
            whole = images.repeat(report.steps, 1, 1, 1)
            before = name.removesuffix(".input") + ".output"
            feeds[name] = whole if name == "input" else found[before] if before in found else wanted[taker][0]
        found |= run(graph, feeds, report.steps)
    return found, wanted, logits


@pytest.mark.parametrize(("name", "sizes"), NETWORKS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_neuron_fires_in_the_graphs_as_in_the_network(name, sizes, tmp_path):
    model, images = lively(sf.create_model(name, **sizes)), torch.randn(2, 3, 16, 16).double()
    report = export_nir(model, images, tmp_path / "net")
    found, wanted, logits = run_all(report, tmp_path / "net", model, images)
    spikes = {name: wanted[name][1] for name, module in model.named_modules() if isinstance(module, Neuron)}
    for neuron, fired in spikes.items():
        assert torch.equal(found[neuron], fired), neuron
    assert sum(bool(fired.any()) for fired in spikes.values()) > 0.8 * len(spikes)
    assert report.share > 0.98
    if "head.output" in found and not sizes.get("distillation"):
        mean = found["head.output"].unflatten(0, (report.steps, -1)).mean(0)
        torch.testing.assert_close(mean, logits, rtol=0, atol=1e-12)  # merged layers round otherwise


NEURONS = {
    "lif": LIF(steps=3),
    "lif, whole input": LIF(steps=3, decay_input=False),
    "lif, other constants": LIF(steps=3, tau=3.0, threshold=0.3, v_reset=-0.25),
    "half to even": ILIF(steps=3, levels=5, threshold=0.7),
    "half to even, of D": NILIF(steps=3, levels=3),
    "half up": IELIF(steps=3, levels=4),
    "half up, other constants": IELIF(steps=3, levels=3, gain=1.7, threshold=nn.Parameter(torch.tensor(0.6))),
    "binary": ILIF(steps=3, levels=1),
}


@pytest.mark.parametrize("case", NEURONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neurons_agree_at_thresholds_and_at_the_floats_beside_them(case, dtype, tmp_path):
    neuron = copy.deepcopy(NEURONS[case])
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), neuron).eval().to(dtype)
    nn.init.ones_(model[0].weight)
    place = torch.as_tensor(neuron.threshold).item() / getattr(neuron, "gain", 1.0)
    ties = torch.cat([torch.arange(-2, 8), torch.arange(8) - 0.5]).to(dtype) * place
    ties = torch.cat([ties, 2 * ties, ties / 2])
    values = torch.cat([ties, *(torch.nextafter(ties, torch.full_like(ties, end)) for end in (-9, 9))])
    images = torch.stack([values, values.roll(1), values.roll(7)])[:, None, None]
    (found,) = exported(model, images, tmp_path, steps=3)
    with torch.no_grad():
        wanted = model(images)
    assert torch.equal(found["1"], wanted)
    assert wanted.unique().numel() == neuron.levels + 1


def exported(model: nn.Module, images: Tensor, folder: Path, *, steps: int = 1) -> list[dict[str, Tensor]]:
    """What the nodes of each part of a model without a door give for `images` [T*B, C, H, W]."""
    report = export_nir(model, images, folder / "net")
    return [run(nir.read(folder / "net" / part.file), {"images": images}, steps) for part in report.parts]


class Mixed(nn.Module):
    """Everything that NIR has a node for and the catalogue's networks do not use alike."""

    def __init__(self) -> None:
        super().__init__()
        self.spikes, self.more = LIF(steps=2), ILIF(steps=2, levels=2)
        self.wide = nn.Conv2d(4, 8, 3, padding="same", dilation=2, groups=2)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1)
        self.scale = nn.Parameter(torch.rand(8, 1, 1).double())
        self.last = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(self.spikes(2 * x))
        z = self.scale * y
        z += self.wide(self.spikes(x))
        return self.last(self.more(self.pool(z) / 0.25).mean((-2, -1), keepdim=True).flatten(1))


def test_a_network_of_ones_own_is_read_back_with_groups_scales_pools_and_layers_that_run_twice(tmp_path):
    model, images = Mixed().double().eval(), 2 * torch.randn(4, 4, 8, 8).double()
    (found,) = exported(model, images, tmp_path, steps=2)
    wanted, logits = heard_by(model, images)
    assert torch.equal(found["more"], wanted["more"][1])
    assert torch.equal(found["spikes_2"], wanted["spikes"][1])
    torch.testing.assert_close(found["last"], logits, rtol=0, atol=1e-14)  # sums of a mean in another order


def test_what_stays_behind_is_named_with_its_reason_and_its_share(tmp_path):
    model = lively(sf.create_model("spikformer_8_384", **SPIK, neuron="i_lif", steps=2))
    report = export_nir(model, torch.randn(1, 3, 16, 16).double(), tmp_path / "net")
    reasons = {each.module: each.reason for each in report.left_out}
    assert "maximum" in reasons["stem.blocks.2.pool"]
    assert "product of two signals" in reasons["blocks.0.attn"]
    assert "mean over time" in reasons["time_mean"]
    assert "one step at a time" in reasons["head"]
    assert report.share + sum(each.share for each in report.left_out) == pytest.approx(1)
    stored = json.loads((tmp_path / "net" / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.to_json()))
    files = {path.name for path in (tmp_path / "net").iterdir()}
    assert files == {"report.json", *(part.file for part in report.parts)}
    for words in (*files - {"report.json"}, "stem.blocks.2.pool (MaxPool2d)", "image", "blocks.0.attn"):
        assert words in report.table()


def test_a_later_part_says_which_earlier_one_it_reads(tmp_path):
    model = lively(sf.create_model("meta_spikeformer_15m", **META))
    first, second = export_nir(model, torch.randn(1, 3, 16, 16).double(), tmp_path / "net").parts
    assert second.inputs["stage3.down.conv.input"] == f"stage3.down.conv.output of {first.file}"
    assert first.outputs["stage3.down.conv.output"] == second.file
    assert second.inputs["stage3.block0.attn.reshape.input"] == "what reshape gives in stage3.block0.attn"


SILENT = {
    "soft reset": (nn.Sequential(LIF(v_reset=None)), "soft reset"),
    "membrane of counts": (nn.Sequential(IELIF(decay=0.5)), "membrane keeps"),
    "no neuron": (nn.Sequential(nn.Conv2d(3, 3, 1)), "no spiking neuron"),
    "other equations": (nn.Sequential(type("Own", (LIF,), {})()), "equations of Own"),
    "numbers": (
        nn.Sequential(LIF(), type("Own", (nn.ReLU,), {"forward": lambda _, x: x * x.max().item()})()),
        "reads numbers",
    ),
}


@pytest.mark.parametrize("case", SILENT)
def test_a_model_without_an_expressible_neuron_is_refused_and_nothing_is_written(case, tmp_path):
    model, words = SILENT[case]
    with pytest.raises(ValueError, match=words):
        export_nir(model.eval(), torch.randn(1, 3, 4, 4), tmp_path / "net")
    assert not (tmp_path / "net").exists()


LEFT = {
    "itself": (lambda x: x + x, "signal to itself"),
    "constant": (lambda x: x + 0.5, "no constants"),
    "two shapes": (lambda x: x + x.mean((2, 3), keepdim=True), "one shape"),
    "quotient": (lambda x: x / (x.mean((2, 3), keepdim=True) + 1), "product of two signals"),
    "mean over channels": (lambda x: x.mean(1), "averages over pixels"),
    "moved": (lambda x: x.permute(0, 1, 3, 2), "moves no elements"),
    "other rows": (lambda x: F.linear(x.flatten(0, 1), torch.eye(4).double()), "no linear"),
    "scaled by image": (lambda x: x * torch.arange(2.0).view(2, 1, 1, 1).double(), "same for every image"),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_function_that_graphs_cannot_express_is_left_out_and_the_rest_stays(case, tmp_path):
    change, words = LEFT[case]
    own = type("Own", (nn.ReLU,), {"forward": lambda _, x: change(x)})()
    model = nn.Sequential(nn.Conv2d(3, 3, 1), LIF(steps=2), own).eval().double()
    report = export_nir(model, torch.randn(2, 3, 4, 4).double(), tmp_path / "net")
    (part,) = report.parts
    assert "1.output" in part.outputs
    assert words in " ".join(each.reason for each in report.left_out if each.module == "2")


def test_an_ann_is_refused_and_so_is_a_folder_with_files(tmp_path):
    twin = sf.create_model("meta_spikeformer_15m", **META | ANN_TWIN)
    with pytest.raises(ValueError, match="MetaSpikeFormer has no spiking neuron"):
        export_nir(twin, torch.randn(1, 3, 16, 16), tmp_path / "net")
    (tmp_path / "old.nir").touch()
    with pytest.raises(ValueError, match="is not empty: name a new folder"):
        export_nir(twin, torch.randn(1, 3, 16, 16), tmp_path)


def test_without_the_package_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(ImportError, match=r"spikeformers\[nir\]"):
        export_nir(nn.Sequential(LIF()), torch.randn(1, 3, 4, 4), tmp_path / "net")


def test_the_model_stays_as_it_is_and_numbers_keep_its_precision(tmp_path):
    model = lively(sf.create_model("meta_spikeformer_15m", **META)).float().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = export_nir(model, torch.randn(2, 3, 16, 16), tmp_path / "net")
    assert model.training
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    node = nir.read(tmp_path / "net" / report.parts[0].file).nodes["stage1a.down.conv"]
    assert node.weight.dtype == np.float32
