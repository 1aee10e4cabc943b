"""Time folding and streaming."""

import pytest
import torch
from torch import nn

from spikeformers.neurons import LIF, NILIF, Door, TimeMean, set_steps, streaming


def small_network(steps: int) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 6, 3, padding=1), LIF(steps=steps), nn.Conv2d(6, 6, 3), NILIF(steps=steps, decay=0.9)]
    network = nn.Sequential(Door(in_channels=2, steps=steps), *layers, nn.Flatten(), TimeMean(steps=steps))
    return network.double().eval()


def test_streamed_frames_equal_the_whole_clip():
    model, clip = small_network(5), torch.randn(5, 3, 2, 6, 6, dtype=torch.float64) * 4
    whole = model(clip)
    with streaming(model):
        for frame in clip:
            logits = model(frame)
    # Convolutions over 3 images may round differently from those over 15; the sum over T is in the same order.
    assert torch.allclose(logits, whole, atol=1e-12, rtol=0)
    assert model[2].steps == 5
    assert model[2].stream is None


def test_a_stream_reports_the_mean_of_the_steps_so_far():
    model, clip = small_network(3), torch.randn(3, 2, 2, 6, 6, dtype=torch.float64) * 4
    with streaming(model):
        running = [model(frame) for frame in clip]
    for t in range(1, 4):
        assert torch.allclose(running[t - 1], set_steps(model, t)(clip[:t]), atol=1e-12, rtol=0)


def test_a_new_stream_starts_at_rest():
    model, clip = small_network(2), torch.randn(2, 3, 2, 6, 6, dtype=torch.float64) * 4
    with streaming(model):
        first = model(clip[0])
        model(clip[1])
    with streaming(model):
        assert torch.equal(model(clip[0]), first)


def test_streaming_a_compiled_model_runs_eagerly_and_equal():
    model, clip = small_network(2), torch.randn(2, 3, 2, 6, 6, dtype=torch.float64) * 4
    compiled = torch.compile(model, backend="aot_eager")
    whole = model(clip)
    with streaming(compiled):
        for frame in clip:
            logits = compiled(frame)
    assert torch.allclose(logits, whole, atol=1e-12, rtol=0)


def test_changing_the_batch_inside_a_stream_is_refused():
    model = small_network(2)
    with streaming(model):
        model(torch.zeros(3, 2, 6, 6, dtype=torch.float64))
        with pytest.raises(ValueError, match="keeps its batch"):
            model(torch.zeros(2, 2, 6, 6, dtype=torch.float64))


def test_streaming_in_train_mode_or_twice_is_refused():
    model = small_network(2)
    with pytest.raises(ValueError, match="eval"), streaming(model.train()):
        raise AssertionError("unreachable")
    model.eval()
    with streaming(model), pytest.raises(ValueError, match="already streaming"), streaming(model):
        raise AssertionError("unreachable")
    assert model[2].stream is None


def test_set_steps_reaches_every_temporal_module_and_refuses_nonsense():
    model = set_steps(small_network(2), 7)
    assert {model[i].steps for i in (0, 2, 4, 6)} == {7}
    with pytest.raises(ValueError, match="at least 1, got 0"):
        set_steps(model, 0)
    with pytest.raises(ValueError, match="no neuron"):
        set_steps(nn.Linear(2, 2), 3)


def test_a_clip_of_another_length_is_refused_even_if_it_divides():
    with pytest.raises(ValueError, match="set_steps"):
        small_network(4)(torch.zeros(2, 4, 2, 6, 6, dtype=torch.float64))


def test_images_are_repeated_over_time_in_time_major_order():
    images = torch.arange(2.0).view(2, 1, 1, 1)
    assert Door(in_channels=1, steps=3)(images).flatten().tolist() == [0, 1, 0, 1, 0, 1]


def test_wrong_channels_and_shapes_name_the_cure():
    door = Door(in_channels=3)
    with pytest.raises(ValueError, match="in_channels=1"):
        door(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="expected images"):
        door(torch.zeros(3, 8, 8))
