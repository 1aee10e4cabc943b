"""Reading one picture: harmless conversions are made, everything else is refused by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from spikeformers.data import ImageData, UnreadablePictureError, read_image
from spikeformers.data.decode import decode

SPECS = {channels: ImageData(source="imagefolder", size=16, in_channels=channels) for channels in (1, 3)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_harmless_mode_becomes_what_the_model_wants(tmp_path, draw, mode, channels):
    image = read_image(draw(tmp_path / "x.png", value=200, mode=mode), spec=SPECS[channels])
    assert image.shape == (channels, 16, 16)
    assert image.dtype == torch.float32


def test_cmyk_jpeg_is_read(tmp_path, draw):
    assert read_image(draw(tmp_path / "x.jpg", value=200, mode="CMYK"), spec=SPECS[3]).shape == (3, 16, 16)


def test_grey_is_repeated_for_rgb_and_rgb_becomes_luma_for_grey(tmp_path, draw):
    grey = np.asarray(decode(draw(tmp_path / "x.png", value=90, mode="L"), name="x", channels=3))
    assert (grey == grey[..., :1]).all()
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    red = np.asarray(decode(tmp_path / "red.png", name="red", channels=1))
    assert (red == 76).all()  # 0.299 of 255, ITU-R 601


@pytest.mark.parametrize("kind", ["RGBA", "P"])
def test_transparency_is_laid_over_white(tmp_path, kind):
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    if kind == "P":
        picture = Image.new("P", (4, 4), 0)
        picture.putpalette([0, 0, 0, 255, 0, 0])
        picture.save(tmp_path / "x.png", transparency=0)
    else:
        picture.save(tmp_path / "x.png")
    assert (np.asarray(decode(tmp_path / "x.png", name="x", channels=3)) == 255).all()


@pytest.mark.parametrize(("mode", "bands"), [("I;16", "1 channel of"), ("F", "1 channel of"), ("LAB", "3 channels of")])
def test_pictures_without_a_harmless_conversion_say_what_they_have_and_what_is_wanted(tmp_path, mode, bands):
    path = tmp_path / "deep.tif"
    Image.new(mode, (4, 4)).save(path)
    message = rf"deep.tif has {bands} mode .*, the model wants 3 of 8 bits \(RGB\): convert the file to 8-bit"
    with pytest.raises(ValueError, match=message):
        read_image(path, spec=SPECS[3])


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif"])
def test_a_file_truncated_anywhere_is_refused_by_name(tmp_path, draw, suffix):
    whole = draw(tmp_path / f"whole.{suffix}", value=200).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for kept in (0, 1, 10, len(whole) // 2):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=f"cannot read image .*cut.{suffix}: .+") as caught:
            read_image(path, spec=SPECS[3])
        assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_text_file_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read image .*none.png: No such file"):
        read_image(tmp_path / "none.png", spec=SPECS[3])
    (tmp_path / "note.png").write_text("hello")
    with pytest.raises(ValueError, match=r"cannot read image .*note.png: not a picture format that pillow knows"):
        read_image(str(tmp_path / "note.png"), spec=SPECS[3])


def test_the_error_keeps_to_its_own_line_when_a_worker_process_wraps_it():
    wrapped = (
        "Caught UnreadablePictureError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n'
        "spikeformers.data.decode.UnreadablePictureError: cannot read image a.png: broken\n"
    )
    assert str(UnreadablePictureError(wrapped)) == "cannot read image a.png: broken"
