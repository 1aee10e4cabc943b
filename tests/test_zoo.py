"""The catalogue: names, overrides, saving and loading."""

import json
import subprocess
import sys

import pytest
import torch

import spikeformers as sf
from spikeformers.zoo import CATALOGUE

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


def test_saving_again_replaces_the_model_keeps_other_files_and_survives_a_full_disk(tmp_path):
    folder = tmp_path / "model"
    sf.create_model("meta_spikeformer_15m", **TINY).save_pretrained(folder)
    second = sf.create_model("meta_spikeformer_15m", **TINY)
    second.save_pretrained(folder)
    assert torch.equal(sf.from_pretrained(folder).head.weight, second.head.weight)

    (folder / "notes.txt").write_text("mine")
    code = (  # a limit on the size of files is what a full disk looks like to a program
        "import resource, signal, sys, spikeformers as sf; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        f"sf.create_model('meta_spikeformer_15m', **{TINY}).save_pretrained(sys.argv[1])"
    )
    for target in (folder, tmp_path / "new"):
        ended = subprocess.run([sys.executable, "-c", code, target], capture_output=True, text=True)
        assert "OSError" in ended.stderr.splitlines()[-1]
    assert torch.equal(sf.from_pretrained(folder).head.weight, second.head.weight)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert not (tmp_path / "new").exists()


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
    with pytest.raises(ValueError, match=rf"is not a saved model.*did you mean {tmp_path}/model\?"):
        sf.from_pretrained(tmp_path)
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"packed is gone from the run {tmp_path}: put it back, or train it again"):
        sf.from_pretrained(tmp_path / "packed")
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


def test_a_whole_number_will_do_for_a_float():
    assert sf.create_model("qsd_transformer_t", **TINY, layer_scale=1).config.layer_scale == 1.0


@pytest.mark.parametrize(
    ("option", "value"), [("mlp_ratio", 2.5), ("shortcut", 5), ("distillation", "false"), ("dims", (8, "16", 3, 4))]
)
def test_options_of_the_wrong_type_are_refused_with_an_example(option, value):
    with pytest.raises(ValueError, match=f"{option} must be"):
        sf.create_model("meta_spikeformer_15m", **(TINY | {option: value}))


@pytest.mark.parametrize(
    "config", ["[]", "{}", '{"format": "spikeformers/1"}', '{"format": "spikeformers/1", "name": 3}']
)
def test_a_strange_config_is_refused(config, tmp_path):
    sf.create_model("meta_spikeformer_15m", **TINY).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"config\.json"):
        sf.from_pretrained(tmp_path)


def test_each_entry_says_what_its_network_is_shown():
    shown = {name: (entry.data, entry.image_size) for name, entry in CATALOGUE.items()}
    assert shown["spikformer_cifar_4_384"] == ("cifar10", 32)
    assert shown["spikformer_dvs_2_256"] == ("events", 128)
    assert shown["spikformer_v2_8_512"] == shown["meta_spikeformer_55m"] == ("imagenet", 224)
