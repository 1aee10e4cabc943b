"""Overlays by hand, legends, and the pictures that only a head with queries has."""

import dataclasses

import numpy as np
import torch
from PIL import Image

from spikeformers.data.splits import load_split
from spikeformers.train.loop import build_model
from spikeformers.train.recipe import ModelChoice
from spikeformers.train.report import class_bars
from spikeformers.train.segmentation_pictures import (
    draw_queries,
    draw_samples,
    draw_sampling,
    numbered,
    overlay,
    placed,
    shares_of,
    with_legend,
    with_titles,
)
from spikeformers.train.segmentation_report import PER_CLASS, in_percent, tiles


def test_an_overlay_mixes_picture_and_colour_and_leaves_ignored_pixels_bare():
    picture = torch.full((1, 1, 3), 100, dtype=torch.uint8)
    colours = torch.tensor([[200, 0, 0], [0, 0, 50]], dtype=torch.uint8)
    found = overlay(picture, torch.tensor([[0, 1, 255]]), colours=colours)
    assert found[:, 0].T.tolist() == [[150, 50, 50], [50, 50, 75], [100, 100, 100]]  # half picture, half colour
    assert torch.equal(overlay(picture, torch.full((1, 3), 255), colours=colours), picture.expand(3, -1, -1))


def test_shares_are_sorted_and_sum_to_one():
    assert shares_of(torch.tensor([[2, 2], [0, 2]])) == [(2, 0.75), (0, 0.25)]


def test_a_legend_has_a_line_for_each_entry_below_the_picture():
    picture = torch.zeros(3, 20, 330, dtype=torch.uint8)
    entries = [(f"class {i}", torch.tensor([i, 0, 0])) for i in range(5)]
    pages = [with_legend(picture, entries[:count]) for count in (1, 5)]
    assert [page.width for page in pages] == [330, 330]
    assert pages[1].height - pages[0].height == 4 * 18


def test_small_pictures_are_enlarged_by_a_whole_factor_and_letters_grow_with_large_ones():
    entry = [("tree", torch.tensor([0, 255, 0]))]
    small = with_legend(torch.tensor([[[10, 20] * 25] * 4] * 3, dtype=torch.uint8), entry)
    assert small.width == 7 * 50
    assert [small.getpixel((x, 27))[0] for x in (0, 6, 7, 13)] == [10, 10, 20, 20]
    large = with_legend(torch.zeros(3, 20, 2560, dtype=torch.uint8), entry)
    green = [sum(colour == (0, 255, 0) for colour in page.getdata()) for page in (small, large)]
    assert green[1] > 15 * green[0]  # four times as wide and high, less the frame
    assert large.height == 20 + 4 * (18 + 2 * 4)


def test_titles_stand_above_their_columns_and_numbers_in_their_tiles():
    page = Image.new("RGB", (300, 20), "white")
    titled = np.asarray(with_titles(page, ("left", "", "right"))).min(2) < 128
    assert [bool(titled[:18, start : start + 100].any()) for start in (0, 100, 200)] == [True, False, True]
    assert not titled[18:].any()
    tiles = np.asarray(numbered(Image.new("RGB", (132, 132), "grey"), count=3, columns=2, side=66))
    corners = [tiles[y : y + 20, x : x + 20] for y, x in ((0, 0), (0, 66), (66, 0), (66, 66))]
    assert [bool((corner > 160).any()) for corner in corners] == [True, True, True, False]
    assert not np.array_equal(corners[0], corners[1])


def test_pictures_of_queries_and_sampling_are_drawn_where_the_head_has_them(segmenting, tmp_path):
    recipe, split = segmenting(), load_split(segmenting().data, "test")
    plain = build_model(recipe, num_classes=3, in_channels=3).eval()
    sizes = {"dim": 16, "queries": 12, "encoder_layers": 1, "decoder_layers": 1, "groups": 4, "decoder_heads": 2}
    hidden = {"heads": 2, "encoder_hidden": 32, "decoder_hidden": 32}
    choice = dataclasses.replace(recipe.model, name="spike2former_ade20k", options=sizes | hidden)
    assert isinstance(choice, ModelChoice)
    queries = build_model(dataclasses.replace(recipe, model=choice), num_classes=3, in_channels=3).eval()
    for model, there in ((plain, False), (queries, True)):
        assert draw_queries(model, split, tmp_path / "queries.png") is there
        assert draw_sampling(model, split, tmp_path / "sampling.png") is there
        assert (tmp_path / "queries.png").exists() is (tmp_path / "sampling.png").exists() is there
    assert Image.open(tmp_path / "queries.png").size == (10 * 66 + 2, 2 * 66 + 2)  # 12 queries, ten a row
    assert Image.open(tmp_path / "sampling.png").width == 640
    draw_samples(queries, split, tmp_path / "samples.png")
    samples = Image.open(tmp_path / "samples.png")
    assert samples.width == 3 * 324 + 4
    legend = set(samples.crop((0, samples.height - 40, samples.width, samples.height)).getdata())
    assert {tuple(colour) for colour in split.colours.tolist()} <= legend  # every class is in the labels


def test_sampling_points_go_by_the_stride_where_it_does_not_divide_the_picture():
    """180 rows seen by 12 cells of 16: the middle of the map is row 96 of 180, on a page of 90 row 48."""
    middle = placed(torch.tensor([7.0, 5.5]), stride=16, seen=(180, 240), page=(90, 120))
    assert middle.tolist() == [(7.5 * 16) / 2, 48.0]


def test_the_report_lists_classes_best_first_with_their_colours():
    summary = {
        "per_class_iou": {"sky": 0.25, "road": 0.5, "nothing": None},
        "classes": ["sky", "road", "nothing"],
        "colours": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        "confusion": [[3, 1, 0], [0, 2, 0], [0, 0, 0]],
    }
    assert [(each["name"], each["width"], each["colour"]) for each in class_bars(summary, PER_CLASS)] == [
        ("road", 50.0, "rgb(4, 5, 6)"),
        ("sky", 25.0, "rgb(1, 2, 3)"),
    ]
    assert in_percent(summary)["confusion"] == [[75, 25, 0], [0, 100, 0], [0, 0, 0]]
    costs = {"energy_mj": 2.0, "ann_energy_mj": 6.0, "firing_rate": 0.1, "parameters": 10, "size_mb": 1.0}
    shares = {"miou": 0.375, "best_miou": 0.4, "pixel_accuracy": 0.5, "mean_accuracy": 0.5}
    agreed = {"integer_agreement": {"same": 9, "total": 10}, "layers": {"head.embedding.mask_spikes.neuron": 0.266}}
    found = {label: value for label, value, _ in tiles(summary | costs | shares | agreed)}
    assert found["mIoU"] == "37.50 %"
    assert found["Classes"] == "2 of 3"
    assert found["Firing of masks"] == "26.6 %"
    assert found["Integer engine"] == "90.00 %"
