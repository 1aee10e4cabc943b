"""The catalogue: names, overrides, saving and loading."""

import errno
import json
import subprocess
import sys

import pytest
import torch

import spikeformers as sf
from spikeformers.layers import pretrained

TINY = {"dims": (8, 16, 16, 24), "num_classes": 5, "blocks": (1, 1, 0, 1, 0), "heads": 4}


def test_every_name_builds_and_patterns_filter():
    assert sf.list_models("*15m") == ["meta_spikeformer_15m"]
    for name in sf.list_models():
        with torch.device("meta"):
            assert sf.create_model(name).origin.name == name


def test_a_wrong_name_or_option_lists_the_closest():
    with pytest.raises(ValueError, match="meta_spikeformer_15m"):
        sf.create_model("metaspikeformer_15m")
    with pytest.raises(ValueError, match="num_classes"):
        sf.create_model("meta_spikeformer_15m", n_classes=3)


def test_a_saved_model_comes_back_with_equal_logits_steps_and_options(tmp_path):
    model = sf.create_model("meta_spikeformer_15m", neuron="i_lif", levels=3, **TINY).eval()
    sf.set_steps(model, 2)
    images = torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path / "model")
    loaded = sf.from_pretrained(tmp_path / "model")
    assert loaded.steps == 2
    assert loaded.config.levels == 3
    assert torch.equal(loaded(images), model(images))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["format"] == "spikeformers/1"
    assert config["overrides"]["dims"] == [8, 16, 16, 24]


def test_saving_again_replaces_the_folder_and_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    sf.create_model("meta_spikeformer_15m", **TINY).save_pretrained(folder)
    second = sf.create_model("meta_spikeformer_15m", **TINY)
    second.save_pretrained(folder)
    assert torch.equal(sf.from_pretrained(folder).head.weight, second.head.weight)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        sf.create_model("meta_spikeformer_15m", **TINY).save_pretrained(folder)
    assert torch.equal(sf.from_pretrained(folder).head.weight, second.head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_options_that_json_cannot_name_are_refused_when_saving(tmp_path):
    from spikeformers.backbones.meta_spikeformer import Pooling

    model = sf.create_model("meta_spikeformer_15m", attention=Pooling, **TINY)
    with pytest.raises(ValueError, match="by its name"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        sf.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        sf.from_pretrained(tmp_path / "nothing" / "here" / "at all")
    sf.create_model("meta_spikeformer_15m", **TINY).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="damaged"):
        sf.from_pretrained(tmp_path / "model")


def test_the_root_exports_its_names_and_help_does_not_wait_for_torch():
    for name in sf.__all__:
        assert getattr(sf, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = sf.nonsense
    code = "import sys, spikeformers.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
