"""Plain networks and one of spikingjelly beside ours, counted by one convention.

Weights and images are random; norms of the spiking networks saw the images, without which hardly a neuron fires. So
MACs and the energy as an ANN are facts about a network; firing rates and spiking energies are not: they show that all
are counted alike. PVT is timm's v2-B1, a successor of PVT-Tiny (1.9 G MACs), which timm does not have.

    pip install "spikeformers[bench]"
    python benchmarks/energy_baselines.py --json benchmarks/results/energy_baselines.json
"""

import argparse
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from spikingjelly.activation_based import functional, neuron
from spikingjelly.activation_based.model import sew_resnet
from tables import show
from torch import Tensor, nn

from spikeformers import create_model, energy
from spikeformers.train.summary import hardware

PUBLISHED = {  # G MACs at 224 pixels, each by its own paper; SEW-ResNet has those of ResNet-18
    "resnet18": 1.82,
    "pvt_v2_b1": 2.1,
    "vit_base_patch16_224": 17.6,
    "swin_tiny_patch4_window7_224": 4.5,
    "sew_resnet18": 1.82,
}
OURS = ("meta_spikeformer_15m", "qsd_transformer_t", "spikformer_8_512")
STEPS = 4


class Repeated(nn.Module):
    """A network of spikingjelly on images: they are repeated over time, and its outputs averaged."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        functional.set_step_mode(network, "m")
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.repeat(STEPS, 1, 1, 1, 1)).mean(0)


def settled(model: nn.Module, images: Tensor) -> nn.Module:
    """The model with the statistics of `images` in its batch norms."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    functional.reset_net(model)
    return model.eval()


def builders() -> dict[str, Callable[[], nn.Module]]:
    """Every network by name."""
    plain = [name for name in PUBLISHED if name != "sew_resnet18"]

    def sew() -> nn.Module:
        return Repeated(sew_resnet.sew_resnet18(cnf="ADD", spiking_neuron=neuron.IFNode))

    return (
        {name: lambda name=name: timm.create_model(name) for name in plain}
        | {"sew_resnet18": sew}
        | {name: lambda name=name: create_model(name) for name in OURS}
    )


def row_of(name: str, model: nn.Module, images: Tensor) -> dict:
    """What one network is and spends."""
    if name not in PUBLISHED or name == "sew_resnet18":
        settled(model, images)
    report = energy.measure(model.eval(), images, convention="as_executed")
    assert not report.uncounted, report.uncounted
    return {
        "network": name,
        "parameters (M)": sum(each.numel() for each in model.parameters()) / 1e6,
        "published GMACs": PUBLISHED.get(name),
        "GMACs": sum(layer.macs for layer in report.layers) / 1e9,
        "T": report.steps,
        "ANN mJ": report.ann_mj,
        "mJ": report.total_mj,
        "firing rate": report.firing_rate or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2, help="random images (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write rows, versions and command there")
    options = parser.parse_args()
    torch.manual_seed(0)
    images, rows = torch.randn(options.images, 3, 224, 224), []
    for name, build in builders().items():
        rows.append(row_of(name, build(), images))
    show(rows)
    if options.json:
        result = {
            "what": __doc__.partition("\n")[0],
            "command": f"python benchmarks/energy_baselines.py --images {options.images}",
            "hardware": hardware(),
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in ("torch", "timm", "spikingjelly", "spikeformers")},
            "images": options.images,
            "convention": energy.CONVENTIONS["as_executed"].describe(),
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
