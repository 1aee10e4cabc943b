"""`list`: models and recipes."""

import re


def test_list_shows_parameters_sizes_paper_and_recipes(said_by, refused):
    code, out, _ = said_by("list")
    assert code == 0
    assert re.search(r"\ndigits +\S", out)
    assert re.search(r"meta_spikeformer_15m +15,112,208 +dims 64-128-256-360, .*ICLR 2024", out)
    complaint = refused("list", "meta_spikeformer_56m")
    assert "meta_spikeformer_55m" in complaint
    shown = re.search(r"closest: (.*) \(", refused("list", "nonsense"))[1].split(", ")
    assert len(set(shown)) == len(shown) == 5
    listed = said_by("list", "meta_spikeformer_15m_fpn")[1]
    told = [line.split("  ")[-1] for line in listed.splitlines() if "iterations" in line]
    assert len(set(told)) == len(told) == 3  # at T=1: one for each set
