"""`weights import`: what it writes, what it says, and that it runs nobody's code."""

import pickle

import pytest
import torch
from safetensors.torch import load_file


def test_import_writes_a_model_and_says_what_it_dropped(said_by, refused, tmp_path, pytestconfig):
    tensors = load_file(pytestconfig.rootpath / "tests" / "parity" / "meta_spikeformer.safetensors")
    official = {key.removeprefix("state."): each for key, each in tensors.items() if key.startswith("state.")}
    torch.save({"model": official}, tmp_path / "official.pth")
    command = ["weights", "import", tmp_path / "official.pth", "--model", "meta_spikeformer_15m"]
    command += ["--out", tmp_path / "ours", "--set", "dims=8,16,32,40"]
    code, out, err = said_by(*command)
    assert code == 0, err
    assert "head_kd" in out
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]
    assert "not empty" in refused(*command)


@pytest.mark.parametrize(
    ("text", "value"), [("distillation=true", True), ("dims=8,16", (8, 16)), ("neuron=lif", "lif")]
)
def test_import_reads_set_as_train_does(said_by, text, value, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr("spikeformers.zoo.import_checkpoint", lambda *_, overrides, **__: given.update(overrides))
    words = ("--model", "meta_spikeformer_15m", "--out", tmp_path / "out", "--set", text)
    assert said_by("weights", "import", tmp_path / "x.pth", *words)[0] == 0
    assert given == {text.split("=")[0]: value}


class Exploit:
    def __reduce__(self):
        return print, ("this must never run",)


def test_import_refuses_code_and_leaves_nothing(refused, tmp_path, capsys):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Exploit()}))
    words = ("--model", "meta_spikeformer_15m", "--out", tmp_path / "out")
    assert "evil.pth" in refused("weights", "import", tmp_path / "evil.pth", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]
    assert "never run" not in capsys.readouterr().out
