"""The command line from a person's side: what it prints, what it writes, and how it refuses."""

import contextlib
import errno
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import spikeformers.train.loop
from spikeformers import cli
from spikeformers.data.augment import to_pil
from spikeformers.data.images import ImageData, load_split

SMALL = (  # one second of training
    "data.size=16 data.train_limit=32 data.test_limit=24 batch_size=8 epochs=1 threads=1 model.dims=8,8,8,8 "
    "model.strides=2,2,2,2,1 model.blocks=1,1,1,1,1 model.options.heads=2 testing.energy_images=8"
)
TINY = SMALL.split()
LABELS = ("Test accuracy", "Firing rate", "Spikes per image", "Energy per image", "as an ANN", "Parameters")


def said_by(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(each) for each in arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """A finished run of a tiny network, and what the command printed."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    code, out, err = said_by("train", "digits", "--out", run, "--set", *TINY)
    assert code == 0, err
    return run, out


@pytest.fixture
def digit(tmp_path) -> Path:
    """Test image 3 as a file."""
    spec = ImageData(source="digits", size=16, in_channels=1)
    to_pil(load_split(spec, "test").picture(3)).save(tmp_path / "digit.png")
    return tmp_path / "digit.png"


def refused(*arguments: str) -> str:
    """What a command says on stderr, which must be one line, with exit code 2 and nothing of a traceback."""
    code, _, err = said_by(*arguments)
    assert code == 2
    assert err.startswith("spikeformers: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("words", ["list", "train", "eval", "predict", "energy", "report", "weights import"])
def test_help_of_every_command_has_an_example(words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as leaving:
        cli.main([*words.split(), "--help"])
    assert leaving.value.code == 0
    assert f"\n  spikeformers {words}" in out.getvalue().split("examples:")[1]


def test_alone_it_prints_help():
    code, out, _ = said_by()
    assert code == 0
    assert all(f"\n    {name} " in out for name in (*cli.COMMANDS, "weights"))
    assert "spikeformers weights import" in said_by("weights")[1]


def test_help_needs_no_torch():
    code = "import sys; from spikeformers import cli; cli.main([]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_set_takes_several_values_and_repeats():
    top, _ = cli.build_parser()
    command = "train digits --set data.source=imagefolder data.root=DIR --set epochs=3 optim.lr=1e-2 --threads 1"
    recipe = cli.configured(top.parse_args(command.split()).train, Path("unused"))
    assert (recipe.data.source, recipe.data.root, recipe.epochs, recipe.threads) == ("imagefolder", "DIR", 3, 1)
    assert recipe.optim.lr == 0.01


def test_train_prints_the_results_in_aligned_lines(trained):
    run, out = trained
    lines = out[out.index("digits: ") :].splitlines()
    assert all(any(label in line for line in lines) for label in LABELS)
    assert "convention meta_spikeformer" in out
    assert re.search(r"Integer engine +same prediction for (all )?\d+", out)
    assert lines[-1].split() == ["Report", str(run / "report.html")]
    columns = {re.match(r" +\S.*?  +", line).end() for line in lines[1:]}
    assert len(columns) == 1
    assert "\x1b" not in out


def test_train_leaves_a_whole_run(trained):
    run, _ = trained
    for name in ("recipe.json", "log.jsonl", "summary.json", "report.html", "model/config.json"):
        assert (run / name).is_file()
    assert "could not be read" not in (run / "report.html").read_text()


def test_a_terminal_gets_a_table(trained, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "│" in said_by("eval", trained[0])[1]


def test_a_run_is_never_overwritten(trained):
    before = (trained[0] / "summary.json").read_bytes()
    assert "--resume" in refused("train", "digits", "--out", trained[0], "--set", *TINY)
    assert (trained[0] / "summary.json").read_bytes() == before


def test_resuming_a_finished_run_reads_it(trained):
    code, out, _ = said_by("train", "digits", "--resume", "--out", trained[0], "--set", *TINY)
    assert code == 0
    assert out == trained[1][trained[1].index("digits: ") :]


def test_resuming_needs_no_setting_again_and_takes_new_ones(trained):
    top, _ = cli.build_parser()

    def recipe(*more: str):
        return cli.configured(top.parse_args(["train", "digits", *more]).train, trained[0])

    assert recipe("--resume").data.size == 16
    changed = recipe("--resume", "--set", "workers=1")
    assert (changed.data.size, changed.workers) == (16, 1)
    assert recipe().data.size != 16
    assert said_by("train", "digits", "--resume", "--out", trained[0])[0] == 0
    assert "digits" in refused("train", "cifar10_small", "--resume", "--out", trained[0])


def test_seeds_give_mean_and_deviation(tmp_path):
    code, out, err = said_by("train", "digits", "--seeds", "0,1", "--out", tmp_path / "both", "--set", *TINY)
    assert code == 0, err
    assert re.search(r"mean ± sd of seeds 0, 1\n  Test accuracy +[\d.]+ ± [\d.e-]+ %", out)
    assert (tmp_path / "both" / "seed-1" / "report.html").is_file()
    assert "--seeds" in refused("train", "digits", "--resume", "--out", tmp_path / "both")
    assert said_by("train", "digits", "--resume", "--seeds", "0,1", "--out", tmp_path / "both")[0] == 0


def test_runs_are_numbered_and_resume_takes_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    top, _ = cli.build_parser()

    def folder(*more: str) -> str:
        return str(cli.run_folder("digits", top.parse_args(["train", "digits", *more]).train))

    with pytest.raises(ValueError, match="nothing to resume"):
        folder("--resume")
    assert folder() == "runs/digits"
    assert (folder("--resume"), folder("--out", "here")) == ("runs/digits", "here")
    assert folder() == "runs/digits-2"  # the first is taken as soon as it is chosen: another training may start now
    assert (folder("--resume"), folder()) == ("runs/digits-2", "runs/digits-3")
    assert not Path("here").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--out"):
        folder()


def test_eval_finds_the_accuracy_of_training_again(trained):
    run, _ = trained
    accuracy = json.loads((run / "summary.json").read_text())["accuracy"]
    assert f"{100 * accuracy:.2f} % of 24 images" in said_by("eval", run)[1]


def test_predict_gives_five_classes_and_energy(trained, digit):
    code, out, _ = said_by("predict", trained[0], digit, digit)
    first, *likely = out.splitlines()[:6]
    shares = [float(line.split()[0]) for line in likely]
    assert code == 0
    assert re.match(rf"{re.escape(str(digit))}: \S+ mJ \(\S+ mJ as an ANN, meta_spikeformer\)", first)
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 100.03  # five roundings
    predicted = json.loads((trained[0] / "summary.json").read_text())["predictions"][3]
    assert likely[0].split()[2] == str(predicted)
    assert len(out.splitlines()) == 12


def test_predict_reads_a_saved_model_as_its_run_does_or_says_how(trained, digit, tmp_path):
    assert said_by("predict", trained[0] / "model", digit) == said_by("predict", trained[0], digit)
    shutil.copytree(trained[0] / "model", tmp_path / "alone")
    code, out, err = said_by("predict", tmp_path / "alone", digit)
    assert code == 0, err
    assert out.startswith(f"{tmp_path / 'alone'}: no recipe beside it, so images are read as ImageNet's: 224x224\n")
    assert out.count(" %  ") == 5


def test_energy_prints_layers_and_writes_numbers_and_a_chart(trained, tmp_path):
    written = ("--json", tmp_path / "e.json", "--plot", tmp_path / "e.png")
    code, out, err = said_by("energy", trained[0], "--images", "5", *written)
    assert code == 0, err
    assert out.startswith(f"{trained[0]}: trained weights, 5 images of its test split\n")
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["images"] == 5
    assert all(layer["name"] in out for layer in found["layers"])
    assert all(f"\n{stage} " in out for stage in found["stages"])
    assert Image.open(tmp_path / "e.png").width > 100


@pytest.mark.slow
def test_energy_of_a_name_says_that_nothing_is_real():
    out = said_by("energy", "meta_spikeformer_15m", "--images", "1")[1]
    assert "RANDOM weights, 1 RANDOM images" in out
    assert float(re.search(r"Firing rate ([\d.]+) %", out)[1]) > 1  # batch norm settled: the network is not silent


def test_list_shows_parameters_sizes_paper_and_recipes():
    code, out, _ = said_by("list")
    assert code == 0
    assert re.search(r"\ndigits +\S", out)
    assert re.search(r"meta_spikeformer_15m +15,112,208 +dims 64-128-256-360, .*ICLR 2024", out)
    assert "meta_spikeformer_55m" in refused("list", "*16m")


def test_report_prints_where_it_lies(trained):
    assert said_by("report", trained[0])[1] == f"{trained[0] / 'report.html'}\n"


def test_import_writes_a_model_and_says_what_it_dropped(tmp_path, pytestconfig):
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
def test_import_reads_set_as_train_does(text, value, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr("spikeformers.zoo.import_checkpoint", lambda *_, overrides, **__: given.update(overrides))
    words = ("--model", "meta_spikeformer_15m", "--out", tmp_path / "out", "--set", text)
    assert said_by("weights", "import", tmp_path / "x.pth", *words)[0] == 0
    assert given == {text.split("=")[0]: value}


class Exploit:
    def __reduce__(self):
        return print, ("this must never run",)


def test_import_refuses_code_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Exploit()}))
    words = ("--model", "meta_spikeformer_15m", "--out", tmp_path / "out")
    assert "evil.pth" in refused("weights", "import", tmp_path / "evil.pth", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("nothing", "invalid choice: 'nothing'"),
        ("train", "required: recipe"),
        ("train digit", "digits"),
        ("train digits --set epoch=3", "epochs"),
        ("train digits --set optim.learning_rate=3", "optim."),
        ("train digits --set epochs=many", "epochs must be of type int, got 'many'"),
        ("train digits --set epochs=0", "epochs must be at least 1"),
        ("train --set epochs=3 digits", "required: recipe; what follows --set belongs to it"),
        ("train digits --set epochs", "--set takes a.b=c, got 'epochs'"),
        ("train digits --set model.name=meta_spikeformer_16m", "meta_spikeformer_15m"),
        ("train digits --set model.neuron=i_life", "i_lif"),
        ("train digits --set data.source=imagefolder data.root=nowhere", "nowhere"),
        ("train digits --set data.source=imagefolder", "data.root"),
        ("train digits --seeds 0,x", "0,1,2"),
        ("train digits --seeds 1,1", "twice"),
        ("train digits --threads two", "--threads must be int, got two"),
        ("train digits --resume --out nowhere", "nothing to resume"),
        ("train digits --set init.backbone=nowhere.pth", "nowhere.pth"),
        ("eval nowhere", "nowhere is not a run"),
        ("predict nowhere x.png", "no such folder: nowhere"),
        ("predict meta_spikeformer_15m x.png", "without weights"),
        ("energy meta_spikeformer_16m", "meta_spikeformer_15m"),
        ("energy runs/nowhere", "no such folder: runs/nowhere"),
        ("energy meta_spikeformer_15m --images -1", "--images must be at least 1, got -1"),
        ("energy meta_spikeformer_15m --images 0", "--images must be at least 1, got 0"),
        ("report nowhere", "nowhere"),
        ("weights import nowhere.pth --model meta_spikeformer_15m --out out", "nowhere.pth"),
        ("weights import nowhere.pth --out out", "required: model"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in refused(*words.split())
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_image_is_named(trained, digit):
    broken = digit.with_name("broken.png")
    broken.write_bytes(digit.read_bytes()[:60])
    code, out, err = said_by("predict", trained[0], digit, broken)
    assert (code, out) == (2, "")  # nothing of the good image either: no half answer
    assert "broken.png" in err
    assert "gone.png" in refused("predict", trained[0], digit.with_name("gone.png"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten pictures in two classes, one of them cut off."""
    for index in range(10):
        path = tmp_path / "photos" / ("dark", "light")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20, 24), 20 + 60 * (index % 2)).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:200])
    return tmp_path / "photos"


def test_training_on_a_folder_names_the_broken_image_or_skips_it(folder, tmp_path):
    command = ["train", "digits", "--out", tmp_path / "run", "--set", *TINY, "data.train_limit=0", "data.test_limit=0"]
    command += ["data.source=imagefolder", f"data.root={folder}", "data.in_channels=3", "batch_size=2"]
    assert f"{folder}/light/9.png" in refused(*command)
    assert not (tmp_path / "run").exists()
    code, out, err = said_by(*command, "data.skip_unreadable=true")
    assert code == 0, err
    assert "images skipped because they cannot be read: 1; first: " in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["classes"] == ["dark", "light"]


def test_weights_of_other_widths_are_refused(trained, tmp_path):
    command = ["train", "digits", "--out", tmp_path / "run", "--set", *TINY, "model.dims=8,8,8,16"]
    assert "8, 8, 8, 8" in refused(*command, f"init.backbone={trained[0]}")
    assert not (tmp_path / "run").exists()


def test_an_unfinished_run_is_reported_but_not_tested(trained, tmp_path):
    for name in ("recipe.json", "log.jsonl"):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    assert "not finished" in refused("eval", tmp_path)
    assert said_by("report", tmp_path)[0] == 0


def test_a_full_disk_is_told_in_one_line(monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/model.safetensors")

    monkeypatch.setattr(spikeformers.train.loop, "train", full)
    assert refused("train", "digits", "--out", tmp_path / "x").endswith("model.safetensors: No space left on device\n")


def test_interrupting_tells_how_to_resume(monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt("stopped and saved")

    monkeypatch.setattr(spikeformers.train.loop, "train", interrupted)
    run = tmp_path / "my run"
    run.mkdir()
    (run / "recipe.json").touch()
    code, _, err = said_by("train", "digits", "--out", run, "--set", "epochs=2")
    assert code == 130
    assert f"stopped and saved; resume with: spikeformers train digits --resume --out '{run}' --set epochs=2" in err


def test_interrupted_before_anything_is_written_there_is_nothing_to_resume(monkeypatch, tmp_path):
    def interrupted(*_, run: Path, **__):
        assert run.is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(spikeformers.train.loop, "train", interrupted)
    monkeypatch.chdir(tmp_path)
    code, _, err = said_by("train", "digits")
    assert (code, err) == (130, "\nspikeformers: interrupted\n")
    assert not any(tmp_path.iterdir())


def test_our_own_mistakes_keep_their_traceback(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr(spikeformers.train.loop, "train", broken)
    with pytest.raises(TypeError, match="a bug"):
        cli.main(["train", "digits", "--out", str(tmp_path / "x")])
