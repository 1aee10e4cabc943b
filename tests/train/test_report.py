"""The run report: what it shows, what it does without, and that it asks nothing of the network."""

import dataclasses
import json
import re
import shutil
import subprocess

import pytest

from spikeformers.data.images import ImageData, load_split
from spikeformers.train.recipe import Recipe, to_json
from spikeformers.train.report import choose, confusion_table, short, ticks, write_report
from spikeformers.train.results import agreement, duration

LAYERS = [f"stage{stage}.block{block}.{part}" for stage in (1, 2, 3) for block in (0, 1) for part in ("mixer", "mlp")]
CURVES = [
    {"kind": "epoch", "step": 22 * (e + 1), "epoch": e, "train_loss": 2.1 / (e + 1), "test_loss": 1.9 / (e + 1)}
    | {"test_accuracy": 1 - 0.5 / (e + 1), "firing_rate": 0.2 + 0.01 * e, "lr": 1e-3 / (e + 1), "seconds": 4.0}
    for e in range(8)
]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe("digits", ImageData(source="digits", size=32, in_channels=1), epochs=8)


@pytest.fixture(scope="module")
def summary(recipe) -> dict:
    """A finished run of which test images 5, 17 and 40 went wrong, each taken for the next class."""
    split = load_split(recipe.data, "test")
    labels = split.labels.tolist()
    guesses = [(label + 1) % 10 if index in (5, 17, 40) else label for index, label in enumerate(labels)]
    confusion = [[0] * 10 for _ in range(10)]
    for label, guess in zip(labels, guesses, strict=True):
        confusion[label][guess] += 1
    return {
        "recipe": to_json(recipe), "model": "meta_spikeformer_15m", "parameters": 493_210, "size_mb": 1.98,
        "accuracy": 1 - 3 / len(labels), "best_accuracy": 0.9944, "loss": 0.04, "epochs": 8, "seconds": 141.2,
        "firing_rate": 0.213, "spikes_per_image": 48_211.0, "energy_mj": 0.00412, "energy_mj_sd": 0.0002,
        "ann_energy_mj": 0.0311, "energy_convention": "meta_spikeformer",
        "energy_by_stage": {
            name: {"mj": mj, "ann_mj": ann}
            for name, mj, ann in (("stage1", 0.0011, 0.004), ("stage2", 0.0014, 0.009), ("head", 1e-6, 2.3e-5))
        },
        "layers": {name: 0.05 + 0.03 * index for index, name in enumerate(LAYERS)},
        "integer_agreement": {"same": len(labels) - 2, "total": len(labels), "different": [17, 40],
                              "accuracy": 0.9861, "float_accuracy": 0.9917},
        "confusion": confusion, "predictions": guesses, "classes": [str(each) for each in split.classes],
        "versions": {"python": "3.11.4", "torch": "2.15.0"}, "threads": 2, "hardware": "A Processor",
        "command": "spikeformers train digits",
    }  # fmt: skip


def write_run(folder, recipe, *, lines=CURVES, summary=None):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(to_json(recipe)))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def run(tmp_path, recipe, summary):
    return write_run(tmp_path / "digits", recipe, summary=summary)


def body(page: str) -> str:
    return page.split("</style>")[1]


def test_report_of_a_finished_run_shows_every_part(run):
    page = write_report(run).read_text()
    for part in ("headline", "curves", "confusion", "samples", "energy", "integer", "firing", "recipe", "versions"):
        assert f'id="{part}"' in page
    for text in (
        "99.17 %",
        "0.00412 mJ",
        "7.5x",
        "48,211",
        "358 of 360",
        "17, 40",
        "2.15.0",
        "2 min 21 s",
    ):
        assert text in page
    assert "On these images its accuracy is 98.61 %, the network&#39;s 99.17 %." in page
    assert all(name in page for name in LAYERS)
    assert "optim" in page
    assert "unfinished" not in body(page)


def test_report_asks_nothing_of_the_network(run):
    page = write_report(run).read_text()
    assert "<script" not in page
    assert not re.findall(r"https?:|//[a-z]|@import|url\(", re.sub(r"data:image/png;base64,[^\"]+", "", page))
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "default-src 'none'" in page


def test_wrong_images_are_shown_with_their_true_class(run, summary):
    page = write_report(run).read_text()
    labels = [(guess - 1) % 10 for index, guess in enumerate(summary["predictions"]) if index in (5, 17, 40)]
    wrong = re.findall(r'<figure class="wrong">.*?</figure>', page, flags=re.DOTALL)
    assert [f"is {label}" in each for label, each in zip(labels, wrong, strict=True)] == [True] * 3
    assert "Wrong (3 of 360)" in page
    assert page.count('<figure class="right">') == 12


def test_report_of_an_unfinished_run_has_the_curves_so_far_and_says_so(tmp_path, recipe):
    run = write_run(tmp_path / "young", recipe, lines=CURVES[:3])
    page = write_report(run).read_text()
    assert "not finished: 3 of 8 epochs" in page
    assert "<polyline" in page
    assert 'id="headline"' not in page


def test_report_before_the_first_epoch_draws_the_steps(tmp_path, recipe):
    steps = [{"kind": "step", "step": 10 * i, "loss": 2.0 / i, "lr": 1e-3} for i in range(1, 6)]
    assert "Loss by step" in write_report(write_run(tmp_path / "new", recipe, lines=steps)).read_text()


def test_report_of_an_empty_log_is_a_page(tmp_path, recipe):
    assert "no epoch yet" in write_report(write_run(tmp_path / "empty", recipe, lines=[])).read_text()


def test_names_from_outside_are_escaped(tmp_path, recipe, summary):
    sneaky = summary | {"classes": ["<b>0</b>", *"123456789"], "command": "train '<script>x</script>'"}
    named = dataclasses.replace(recipe, name="<i>digits</i>")
    page = write_report(write_run(tmp_path / "sneaky", named, summary=sneaky)).read_text()
    assert "<script" not in page
    assert "<b>0" not in page
    assert "<i>d" not in page


def test_report_without_the_images_says_why(tmp_path, recipe, summary):
    moved = dataclasses.replace(recipe, data=ImageData(source="imagefolder", root=str(tmp_path / "gone")))
    page = write_report(write_run(tmp_path / "moved", moved, summary=summary)).read_text()
    assert "could not be read" in page
    assert "<figure" not in page


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path):
    with pytest.raises(ValueError, match=rf"^no file {tmp_path}/recipe\.json: is {tmp_path} the folder of a run\?$"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_many_classes_become_a_picture_with_the_worst_pairs():
    confusion = [[9 if i == j else 0 for j in range(100)] for i in range(100)]
    confusion[3][7] = 5
    table = confusion_table({"confusion": confusion, "classes": [f"c{i}" for i in range(100)]})
    assert table["rows"] == []
    assert table["picture"].startswith("data:image/png;base64,")
    assert table["pairs"] == [("c3", "c7", 5)]


def test_right_samples_take_every_class_in_turn():
    right, wrong = choose([0, 0, 1, 1, 2, 2, 0], [0, 0, 1, 1, 2, 2, 1])
    assert right == [0, 2, 4, 1, 3, 5]
    assert wrong == [6]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (97.2, 99.7), (3.0, 3.0), (0.0, 0.0), (1e-6, 1e-3), (-2, 70)])
def test_ticks_are_few_and_cover_the_range(low, high):
    places = ticks(low, high)
    assert places[0] <= low
    assert places[-1] >= high
    assert 2 <= len(places) <= 9


def test_the_integer_engine_is_told_with_its_accuracy(summary):
    assert agreement(summary["integer_agreement"]) == (
        "same prediction for 358 of 360 test images, not for 17, 40; its accuracy is 98.61 %, the network's 99.17 %"
    )
    assert agreement({"same": 360, "total": 360, "different": []}) == "same prediction for all 360 test images"


def test_numbers_keep_three_digits():
    assert [short(value) for value in (0.00041234, 3.14159, 48211.3, 15112208, 0)] == [
        "0.000412", "3.14", "48,211", "15.1 M", "0",
    ]  # fmt: skip
    assert [duration(value) for value in (3.2, 75, 7322)] == ["3 s", "1 min 15 s", "2 h 02 min"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_without_network_renders_the_whole_page(run, tmp_path, width):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium installed")
    # The measuring script is the test's own addition. A frame gives the page a phone's width, which windows refuse.
    script = (
        "<script>onload = () => parent.postMessage([document.documentElement.scrollWidth, innerWidth,"
        "[...document.images].filter(i => !i.naturalWidth).length, performance.getEntriesByType('resource')"
        ".filter(r => !r.name.startsWith('data:')).length, document.querySelectorAll('figure').length,"
        "document.querySelectorAll('polyline').length].join(' '), '*')</script></body>"
    )
    text = write_report(run).read_text().replace("style-src", "script-src 'unsafe-inline'; style-src")
    (tmp_path / "page.html").write_text(text.replace("</body>", script))
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<script>onmessage = e => document.title = e.data</script><title></title>"
        f"<iframe src='page.html' style='width: {width}px; height: 2000px; border: 0'></iframe>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
    shown = subprocess.run([browser, *options, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    needed, given, broken, requests, figures, lines = map(
        int, re.search(r"<title>(.*?)</title>", shown.stdout)[1].split()
    )
    assert given == width
    assert needed <= width  # nothing sticks out to the side
    assert (broken, requests) == (0, 0)
    assert (figures, lines) == (15, 5)


def test_low_bit_weights_and_a_teacher_have_tiles_and_other_runs_have_none(tmp_path, recipe, summary):
    write_run(tmp_path / "plain", recipe, summary=summary)
    sizes = {"parameters": 493_210, "fp32_mb": 1.97, "paper_m": 0.06, "packed_mb": 0.31}
    cost = {"teacher_accuracy": 0.634, "seconds": 0.2, "seconds_plain": 0.1, "kept_mb": 30.0, "kept_plain_mb": 20.0}
    write_run(tmp_path / "low", recipe, summary=summary | {"quantized": sizes, "distillation": cost})
    plain, low = (write_report(tmp_path / name).read_text() for name in ("plain", "low"))
    for text in ("0.310 MB", "1.97 MB as 32-bit floats", "63.4 %", "2.00x the time, 1.50x the memory"):
        assert text in low
    assert "Packed weights" not in plain
    assert "Teacher" not in plain
