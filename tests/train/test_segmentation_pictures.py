"""Overlays by hand, legends, and the pictures that only a head with queries has."""

import dataclasses

import torch
from PIL import Image

from spikeformers.data.splits import load_split
from spikeformers.train.loop import build_model
from spikeformers.train.recipe import ModelChoice
from spikeformers.train.segmentation_pictures import (
    draw_queries,
    draw_samples,
    draw_sampling,
    overlay,
    placed,
    shares_of,
    with_legend,
)
from spikeformers.train.segmentation_report import class_bars, in_percent, tiles


def test_an_overlay_mixes_picture_and_colour_and_leaves_ignored_pixels_bare():
    picture = torch.full((1, 1, 3), 100, dtype=torch.uint8)
    colours = torch.tensor([[200, 0, 0], [0, 0, 50]], dtype=torch.uint8)
    found = overlay(picture, torch.tensor([[0, 1, 255]]), colours=colours)
    assert found[:, 0].T.tolist() == [[160, 40, 40], [40, 40, 70], [100, 100, 100]]  # 0.4 picture + 0.6 colour
    assert torch.equal(overlay(picture, torch.full((1, 3), 255), colours=colours), picture.expand(3, -1, -1))


def test_shares_are_sorted_and_sum_to_one():
    assert shares_of(torch.tensor([[2, 2], [0, 2]])) == [(2, 0.75), (0, 0.25)]


def test_a_legend_has_a_line_for_each_entry_below_the_picture():
    picture = torch.zeros(3, 20, 200, dtype=torch.uint8)
    entries = [(f"class {i}", torch.tensor([i, 0, 0])) for i in range(5)]
    pages = [with_legend(picture, entries[:count]) for count in (1, 5)]
    assert [page.width for page in pages] == [200, 200]
    assert pages[1].height - pages[0].height == 4 * 18


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
    draw_samples(queries, split, tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").width == 3 * 324 + 4


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
    assert [(each["name"], each["width"], each["colour"]) for each in class_bars(summary)] == [
        ("road", 50.0, "rgb(4, 5, 6)"),
        ("sky", 25.0, "rgb(1, 2, 3)"),
    ]
    assert in_percent(summary)["confusion"] == [[75, 25, 0], [0, 100, 0], [0, 0, 0]]
    assert class_bars(None) == []
    costs = {"energy_mj": 2.0, "ann_energy_mj": 6.0, "firing_rate": 0.1, "parameters": 10, "size_mb": 1.0}
    shares = {"miou": 0.375, "best_miou": 0.4, "pixel_accuracy": 0.5, "mean_accuracy": 0.5}
    agreed = {"integer_agreement": {"same": 9, "total": 10}, "layers": {"head.embedding.mask_spikes.neuron": 0.266}}
    found = {label: value for label, value, _ in tiles(summary | costs | shares | agreed)}
    assert found["mIoU"] == "37.50 %"
    assert found["Classes"] == "2 of 3"
    assert found["Firing of masks"] == "26.6 %"
    assert found["Integer engine"] == "90.00 %"
