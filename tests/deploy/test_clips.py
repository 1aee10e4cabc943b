"""Networks of event clips in every deployed form."""

import pytest
import torch

import spikeformers as sf
from spikeformers.deploy import load, save
from spikeformers.quantize import prepare
from spikeformers.train.clips import stream

SMALL = {"dim": 16, "depth": 1, "heads": 2, "patch_size": 8, "num_classes": 10, "steps": 4}


@pytest.fixture(params=["lif", "i_lif"])
def subject(request) -> tuple[torch.nn.Module, torch.Tensor]:
    """A network of 4-bit weights in float64 whose norms know counts of events, and clips [T, B, 2, H, W]."""
    torch.manual_seed(0)
    model = prepare(sf.create_model("spikformer_dvs_2_256", neuron=request.param, **SMALL), bits=4).double()
    clips = torch.poisson(torch.full((4, 3, 2, 32, 32), 0.7, dtype=torch.float64))
    for _ in range(4):
        model(clips)
    return model.eval(), clips


def test_merged_and_unrolled_networks_give_the_clip_the_same_logits(subject):
    model, clips = subject
    with torch.no_grad():
        wanted = model(clips)
        torch.testing.assert_close(sf.deploy.fuse(model)(clips), wanted, rtol=0, atol=1e-9)  # merged sums round
        torch.testing.assert_close(sf.deploy.unroll(model)(clips), wanted, rtol=0, atol=1e-12)


def test_the_engine_gives_every_count_of_every_step(subject):
    model, clips = subject
    engine = sf.deploy.integer(model, clips)
    assert sum(engine.compare_layers(model, clips).values()) == 0
    assert engine.compare(model, clips).total == 3


def test_the_engine_streams_to_what_it_gives_for_the_clip(subject):
    model, clips = subject
    engine = sf.deploy.integer(model, clips)
    torch.testing.assert_close(list(stream(engine, clips))[-1], engine(clips), rtol=0, atol=1e-6)  # sums in float32


def test_a_file_gives_the_logits_of_its_engine(subject, tmp_path):
    model, clips = subject
    engine = sf.deploy.integer(model, clips)
    save(engine, tmp_path / "clips.spk", labels=list("0123456789"))
    assert torch.equal(load(tmp_path / "clips.spk")(clips), engine(clips))


def test_audit_counts_the_products_of_clips(subject):
    model, clips = subject
    assert "head" in sf.deploy.audit(model, clips).table()
