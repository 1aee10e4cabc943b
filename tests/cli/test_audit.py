"""`audit`: the products, what merging changes and the verdict, as trained and merged."""

import json


def test_audit_prints_products_and_the_verdict_and_writes_them(said_by, trained, tmp_path):
    code, out, err = said_by("audit", trained[0], "--images", 3, "--json", tmp_path / "a.json")
    assert code == 0, err
    assert out.startswith(f"{trained[0]}: trained weights, 3 images of its test split\n")
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["images"], found["verdict"]) == (3, "neither")
    assert all(row["name"] in out for row in found["rows"] if row["how"] != "free")
    assert "What merging changes:\n  " in out
    assert "\nVerdict: neither\n" in out
    assert "dw and pw2 inside RepConv" in out


def test_audit_merged_has_no_rep_conv_left(said_by, trained):
    code, out, err = said_by("audit", trained[0], "--merged", "--images", 2)
    assert code == 0, err
    assert out.startswith(f"{trained[0]}: trained weights, 2 images of its test split; merged by fuse\n")
    assert "RepConv" not in out
    assert "pw2 inside SepConv" in out


def test_audit_refuses_no_images(refused, trained):
    assert "--images must be at least 1, got 0" in refused("audit", trained[0], "--images", 0)
