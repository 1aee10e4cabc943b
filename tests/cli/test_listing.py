"""`list`: models and recipes."""

import re


def test_list_shows_parameters_sizes_paper_and_recipes(said_by, refused):
    code, out, _ = said_by("list")
    assert code == 0
    assert re.search(r"\ndigits +\S", out)
    assert re.search(r"meta_spikeformer_15m +15,112,208 +dims 64-128-256-360, .*ICLR 2024", out)
    assert "meta_spikeformer_55m" in refused("list", "*16m")
