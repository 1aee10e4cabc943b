"""Training an exact network by a recipe: saved as one, and no prediction of the integer engine differs."""

import torch

import spikeformers as sf
from spikeformers.quantize import exact_bits
from spikeformers.train.loop import train
from spikeformers.train.quantization import pack_run
from spikeformers.train.recipe import Quantize
from spikeformers.train.saved import read_run


def test_a_run_trains_packs_and_agrees_with_its_integer_engine_in_every_prediction_and_logit(tiny, tmp_path):
    recipe = tiny(quantize=Quantize(bits=4, exact_integer=True), epochs=1)
    summary = train(recipe, run=tmp_path / "run")
    assert summary.integer_agreement["same"] == summary.integer_agreement["total"]
    model, _, _ = read_run(tmp_path / "run")
    assert model.quantization["exact"]
    images = torch.randn(3, model.door.in_channels, recipe.data.size, recipe.data.size)
    assert max(exact_bits(model, images).values()) <= 24
    packed = sf.from_pretrained(pack_run(tmp_path / "run"))
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(packed(images), logits)
    assert torch.equal(sf.deploy.integer(packed, images)(images), logits)
