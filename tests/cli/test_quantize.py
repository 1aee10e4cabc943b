"""`quantize` from a person's side: what it prints and leaves, how it is resumed, and what it refuses."""

import contextlib
import dataclasses
import io
import json
import re

import pytest
from PIL import Image

import spikeformers.train.loop
import spikeformers.train.quantization
from spikeformers import cli, from_pretrained, recipes
from spikeformers.quantize import quantizable
from spikeformers.train.checkpoint import read_json, write_json
from spikeformers.train.recipe import to_json
from spikeformers.train.summary import PretrainSummary, read_summary

TWIN = ("model.neuron=gelu", "model.options.attention=softmax")


@pytest.fixture(scope="module")
def quantised(said_by, trained, tmp_path_factory):
    """The tiny run at 3 bits, attention at 8, and what the command printed."""
    run = tmp_path_factory.mktemp("runs") / "low"
    words = ("quantize", trained[0], "--bits", 3, "--layers", "attention=8", "--set", "optim.lr=1e-4", "--out", run)
    code, out, err = said_by(*words)
    assert code == 0, err
    return run, out


@pytest.fixture(scope="module")
def twin(said_by, tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "ann"
    assert said_by("train", "digits", "--out", run, "--set", *tiny, *TWIN)[0] == 0
    return run


def test_it_prints_accuracies_bits_and_sizes(trained, quantised):
    run, out = quantised
    lines = [line.strip() for line in out[out.index(f"{run}: digits at few bits") :].splitlines()]
    before, after = (100 * read_summary(each).accuracy for each in (trained[0], run))
    told = dict(re.split(r"  +", line, maxsplit=1) for line in lines[1:])
    assert told["Test accuracy"] == f"{before:.2f} % of {trained[0]}"
    assert told["With few bits"] == f"{after:.2f} % ({after - before:+.2f} points)"
    assert told["Bits, attention"].startswith("8 (")
    assert told["Bits, conv"].startswith("3 (")
    assert all(label in told for label in ("Bits, linear", "32-bit floats", "Param", "Packed"))
    assert re.search(r"Report +\S+/low/report.html", out)
    assert "init.backbone: loaded" in out


def test_it_leaves_a_run_and_its_packed_form(trained, quantised):
    run, _ = quantised
    for name in ("recipe.json", "summary.json", "report.html", "model/config.json", "packed/model.safetensors"):
        assert (run / name).is_file()
    recipe = read_json(run / "recipe.json")
    assert (recipe["name"], recipe["init"]["backbone"]) == ("digits_w3-mixed", str(trained[0]))
    assert (recipe["optim"]["lr"], recipe["quantize"]["layers"]) == (1e-4, {"attention": 8})
    packed = from_pretrained(run / "packed")
    assert packed.quantization["converted"]
    assert {(kind, layer.bits) for _, layer, kind in quantizable(packed)} == {
        ("attention", 8),
        ("conv", 3),
        ("linear", 3),
    }


def test_other_commands_take_the_low_bit_run(said_by, quantised):
    accuracy = read_summary(quantised[0]).accuracy
    assert f"{100 * accuracy:.2f} % of 24 images" in said_by("eval", quantised[0])[1]


def test_resuming_a_finished_one_reads_it_and_knows_its_bits_and_settings(said_by, refused, trained, quantised):
    run, printed = quantised
    code, out, err = said_by("quantize", trained[0], "--resume", "--out", run)
    assert code == 0, err
    assert out == printed[printed.index("digits_w3-mixed: ") :]
    told = refused("quantize", trained[0], "--bits", 2, "--resume", "--out", run)
    assert "quantize.bits: 3 -> 2" in told
    assert "already holds a run" in refused("quantize", trained[0], "--out", run)
    assert f"quantise the run that it started from, {trained[0]}" in refused("quantize", run, "--bits", 2)


def test_interrupting_tells_how_to_resume_to_the_end(said_by, trained, monkeypatch, tmp_path):
    train_step = spikeformers.train.loop._Work._train_step

    def stopped(self, batches):
        if self.step == 2:
            self.save(None)
            raise KeyboardInterrupt("stopped and saved")
        return train_step(self, batches)

    monkeypatch.setattr(spikeformers.train.loop._Work, "_train_step", stopped)
    run = tmp_path / "my run"
    code, _, err = said_by("quantize", trained[0], "--bits", 4, "--layers", "last=8", "--threads", 1, "--out", run)
    assert code == 130
    command = f"spikeformers quantize {trained[0]} --resume --out '{run}' --bits 4 --threads 1 --layers last=8\n"
    assert f"stopped and saved; resume with: {command}" in err
    monkeypatch.undo()
    code, out, err = said_by("quantize", trained[0], "--resume", "--out", run)
    assert code == 0, err
    assert "Packed" in out


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ((), "digits_w4"),
        (("--bits", 2, "--layers", "first=8"), "digits_w2-mixed"),
        (("--sensitivity", "--bits", 3), "digits_sensitivity"),
    ],
)
def test_the_folder_is_called_after_recipe_and_bits_and_given_back_if_nothing_comes_of_it(
    said_by, trained, monkeypatch, tmp_path, words, folder
):
    def interrupted(*_, run, **__):
        assert (tmp_path / "runs" / folder).is_dir()
        raise KeyboardInterrupt

    for module in (spikeformers.train.loop, spikeformers.train.quantization):
        monkeypatch.setattr(module, "train", interrupted)
    monkeypatch.chdir(tmp_path)
    code, _, err = said_by("quantize", trained[0], *words)
    assert (code, err) == (130, "\nspikeformers: interrupted\n")
    assert not any(tmp_path.iterdir())


def test_sensitivity_without_epochs_tests_both_networks_at_once(said_by, trained, twin, tmp_path):
    out = tmp_path / "found"
    code, said, err = said_by("quantize", trained[0], "--sensitivity", "--twin", twin, "--epochs", 0, "--out", out)
    assert code == 0, err
    header, none, *rows = said.splitlines()[:6]
    assert header.split("  ")[0] == "4-bit weights"
    accuracies = [100 * read_summary(run).accuracy for run in (trained[0], twin)]
    assert [float(cell) for cell in none.split()[1:]] == pytest.approx([accuracies[0], 0, accuracies[1], 0], abs=0.01)
    assert [re.split(r"  +", row)[0] for row in rows] == ["only FC", "only Conv", "only attention", "all"]
    assert sorted(path.name for path in out.iterdir()) == ["sensitivity.json", "sensitivity.png"]
    assert said.endswith(f"written: {out / 'sensitivity.json'}, {out / 'sensitivity.png'}\n")


def test_sensitivity_trains_resumable_runs(said_by, refused, trained, monkeypatch, tmp_path):
    words = ("quantize", trained[0], "--sensitivity", "--bits", 2, "--out", tmp_path / "found")
    finish = spikeformers.train.loop._Work.finish

    def stopped(self):
        if self.run.name == "snn-conv":
            raise KeyboardInterrupt
        return finish(self)

    monkeypatch.setattr(spikeformers.train.loop._Work, "finish", stopped)
    code, _, err = said_by(*words)
    assert code == 130
    command = f"quantize {trained[0]} --resume --out {tmp_path / 'found'} --sensitivity --bits 2"
    assert err == f"\nspikeformers: interrupted; resume with: spikeformers {command}\n"
    assert not (tmp_path / "found" / "sensitivity.json").exists()
    monkeypatch.undo()
    assert "not empty; continue it with --resume" in refused(*words)
    code, out, err = said_by(*words, "--resume")
    assert code == 0, err
    assert out.count("\nepoch 1/1") == 2  # attention and all
    stored = json.loads((tmp_path / "found" / "sensitivity.json").read_text())
    assert stored["epochs"] == 1
    for kind in ("linear", "conv", "attention", "all"):
        assert stored["accuracies"]["snn"][kind] == read_summary(tmp_path / "found" / f"snn-{kind}").accuracy
    assert "epochs: 1 -> 2" in refused(*words, "--resume", "--epochs", 2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--bits 1", "--bits must be between 2 and 8, got 1"),
        ("--bits 9", "--bits must be between 2 and 8, got 9"),
        ("--bits four", "--bits must be int, got four"),
        ("--layers attention", "--layers takes KIND=BITS, such as attention=8"),
        ("--layers attention=-2", "got 'attention=-2'"),
        ("--layers attention=16", "bits must be between 2 and 8, got 16"),
        ("--layers attenton=8", "closest: attention"),
        ("--set optim.rate=1", "optim."),
        ("--set init.backbone=nowhere", "nowhere"),
        ("--resume --out nowhere", "nothing to resume"),
        ("--epochs 3", "use --set epochs=3"),
        ("--twin nowhere", "--twin goes with --sensitivity"),
        ("--sensitivity --epochs -1", "--epochs must be at least 0 (no fine-tuning), got -1"),
        ("--sensitivity --set epochs=3", "--epochs N instead"),
        ("--sensitivity --layers attention=8", "leave out --layers"),
        ("--sensitivity --twin nowhere", "nowhere is not a run"),
        ("--sensitivity --bits 9", "got 9"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(refused, trained, words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in refused("quantize", trained[0], *words.split())
    assert not any(tmp_path.iterdir())


def test_what_is_no_finished_classifier_is_refused_with_the_reason(refused, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nowhere is not a run" in refused("quantize", "nowhere")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "recipe.json").write_bytes((trained[0] / "recipe.json").read_bytes())
    assert "not finished" in refused("quantize", unfinished)
    recipe = to_json(recipes.get("digits_mae"))
    stored = {field.name: None for field in dataclasses.fields(PretrainSummary)} | {"recipe": recipe}
    write_json(unfinished / "recipe.json", recipe)
    write_json(unfinished / "summary.json", stored)
    assert "is a pre-training, whose classifier learnt nothing: finetune it first" in refused("quantize", unfinished)


def test_help_has_an_example():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        cli.main(["quantize", "--help"])
    assert "\n  spikeformers quantize runs/digits --bits 4\n" in out.getvalue().split("examples:")[1]


def test_predict_and_energy_take_the_packed_form_with_the_images_of_its_run(quantised, said_by, tmp_path):
    run, _ = quantised
    code, out, _ = said_by("energy", run / "packed", "--images", 2)
    assert code == 0
    assert "2 images of its test split" in out
    picture = tmp_path / "picture.png"
    Image.new("L", (9, 9)).save(picture)
    answers = [said_by("predict", run / name, picture) for name in ("model", "packed")]
    assert answers[0] == answers[1]
    assert answers[0][0] == 0
    assert "no recipe beside it" not in answers[0][1]


def test_resuming_without_a_name_takes_the_newest_fine_tuning_of_the_run(trained, said_by, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for bits in (4, 2):
        assert said_by("quantize", trained[0], "--bits", bits, "--set", "optim.lr=1e-4")[0] == 0
    code, out, err = said_by("quantize", trained[0], "--resume")
    assert code == 0, err
    assert "runs/digits_w2: digits at few bits" in out


def test_bits_are_given_in_one_place(trained, said_by):
    code, _, err = said_by("quantize", trained[0], "--set", "quantize.bits=2")
    assert code == 2
    assert "leave out --set quantize.bits" in err
