"""`pretrain` from a person's side: what it prints and leaves, how to go on from it, and what it refuses."""

import re

import pytest

import spikeformers.train.loop

SMALL = [
    "data.source=digits",
    "data.in_channels=1",
    "data.size=16",
    "data.train_limit=32",
    "data.test_limit=24",
    "batch_size=8",
    "epochs=1",
    "model.options.dim=16",
    "model.options.depth=1",
    "model.options.heads=2",
]
DECODER = ["pretrain.decoder_dim=16", "pretrain.decoder_depth=1"]


@pytest.fixture(scope="module")
def pretrained(said_by, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "mae"
    code, out, err = said_by("pretrain", "spikformer_v2_cifar10_mae", "--out", run, "--set", *SMALL, *DECODER)
    assert code == 0, err
    return run, out


def test_pretrain_prints_its_loss_and_how_to_go_on(pretrained):
    run, out = pretrained
    assert re.search(r"Loss of hidden patches +\d\.\d{4} at the last epoch \(best \d\.\d{4}\)", out)
    assert re.search(r"Visible patches +4 of 16", out)
    assert out.splitlines()[-1].startswith(f"finetune it: spikeformers train RECIPE --set init.backbone={run}")
    for name in ("report.html", "reconstructions.png", "model/model.safetensors", "summary.json"):
        assert (run / name).is_file()


def test_its_encoder_is_finetuned_by_train(said_by, pretrained, tmp_path):
    start = [f"init.backbone={pretrained[0]}", "testing.energy_images=8"]
    words = ("train", "spikformer_v2_cifar10_finetune", "--out", tmp_path / "tuned", "--set", *SMALL, *start)
    code, out, err = said_by(*words)
    assert code == 0, err
    assert re.search(r"init\.backbone: loaded \d+ tensors", out)
    assert "Test accuracy" in out


def test_resuming_a_finished_pre_training_reads_it(said_by, pretrained):
    code, out, _ = said_by("pretrain", "spikformer_v2_cifar10_mae", "--resume", "--out", pretrained[0])
    assert code == 0
    assert out == pretrained[1][pretrained[1].index("spikformer_v2_cifar10_mae: ") :]


def test_each_command_names_the_other_for_its_recipes(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "use `spikeformers pretrain`" in refused("train", "digits_mae")
    assert "use `spikeformers train`" in refused("pretrain", "digits")
    assert "use `spikeformers train`" in refused("pretrain", "digits_mae", "--set", "pretrain.mask_ratio=0")
    assert "use `spikeformers pretrain`" in refused("train", "digits", "--set", "pretrain.mask_ratio=0.5")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("eval",), ("predict", "x.png"), ("energy",)])
def test_what_needs_a_classifier_says_to_finetune_first(refused, pretrained, words):
    command, *files = words
    assert "finetune it first" in refused(command, pretrained[0], *files)


def test_interrupting_tells_how_to_resume(said_by, monkeypatch, tmp_path):
    def stopped(self, *_):
        (self.run / "checkpoints").mkdir(exist_ok=True)
        raise KeyboardInterrupt("stopped")

    monkeypatch.setattr(spikeformers.train.loop._Work, "train_epoch", stopped)
    run = tmp_path / "run"
    code, _, err = said_by("pretrain", "spikformer_v2_cifar10_mae", "--out", run, "--set", *SMALL, *DECODER)
    assert code == 130
    assert f"resume with: spikeformers pretrain spikformer_v2_cifar10_mae --resume --out {run}" in err


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("pretrain.mask_ratio=1.5", "pretrain.mask_ratio must be at least 0 and below 1, got 1.5"),
        ("pretrain.mask_ratio=0.99", "at least one must be seen"),
        ("data.size=18", "image_size must be a multiple of the patch size 4, got 18"),
        ("pretrain.decoder_heads=3", "decoder_dim"),
    ],
)
def test_settings_that_cannot_be_are_told(refused, tmp_path, setting, told):
    words = ("pretrain", "spikformer_v2_cifar10_mae", "--out", tmp_path / "run", "--set", *SMALL, *DECODER, setting)
    assert told in refused(*words)
