import io

from rich.console import Console

from spikeformers.train.progress import Display


def shown(*, terminal: bool, unit: str = "images") -> str:
    text = io.StringIO()
    with Display(Console(file=text, force_terminal=terminal, width=120), steps=2, unit=unit) as display:
        for loss in (2.0, 1.0):
            display.step(epoch="1/1", loss=loss, rate=1e-3, speed=50.0)
        if display.bar is not None:
            display.bar.refresh()
        display.line("epoch 1/1  loss 1.5")
    return text.getvalue()


def test_a_terminal_sees_a_bar_with_metrics_and_time_left():
    text = shown(terminal=True)
    assert "loss 1.000" in text
    assert "50 images/s" in text
    assert "50 clips/s" in shown(terminal=True, unit="clips")
    assert "left" in text
    assert "epoch 1/1  loss 1.5" in text


def test_a_file_sees_plain_lines_only():
    assert shown(terminal=False) == "epoch 1/1  loss 1.5\n"


def test_no_console_is_silent(capsys):
    with Display(None, steps=1) as display:
        display.step(epoch="1/1", loss=1.0, rate=1e-3, speed=1.0)
        display.line("nothing")
    assert capsys.readouterr() == ("", "")
