"""What a step with a teacher costs: memory by hand, the student untouched, the precision that is asked for."""

import copy

import pytest
import torch
from torch import nn

from spikeformers.backbones.meta_spikeformer import ANN_TWIN
from spikeformers.distill import FineGrainedDistillation, cost
from spikeformers.distill.cost import kept_mb
from spikeformers.zoo import create_model

TINY = {"dims": (8, 8, 8, 8), "num_classes": 3, "blocks": (0, 0, 0, 1, 0), "heads": 2}


@pytest.fixture
def pair() -> tuple[nn.Module, FineGrainedDistillation]:
    student = create_model("meta_spikeformer_15m", neuron="ie_lif", **TINY)
    return student, FineGrainedDistillation(student, create_model("meta_spikeformer_15m", **(TINY | ANN_TWIN)))


def test_kept_memory_by_hand_is_the_input_of_the_layer_and_of_the_square_and_no_weight():
    layer = nn.Linear(1000, 500)
    x = torch.randn(20, 1000)
    assert kept_mb(layer, lambda: layer(x).square().sum()) == (20 * 1000 + 20 * 500) * 4 / 1e6


def test_the_student_stays_as_it_is_and_the_teacher_costs_time_and_memory(pair):
    student, distillation = pair
    before = copy.deepcopy(student.state_dict())
    found = cost(student.eval(), distillation, torch.randn(4, 3, 64, 64), repeats=1)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert not student.training
    assert all(each.grad is None for each in student.parameters())
    assert found.kept_mb > found.kept_plain_mb > 0
    assert min(found.seconds, found.seconds_plain) > 0


def test_the_step_runs_in_the_precision_that_is_asked_for(pair):
    student, distillation = pair
    seen = set()
    student.head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    cost(student, distillation, torch.randn(2, 3, 64, 64), autocast=torch.bfloat16, repeats=1)
    assert seen == {torch.bfloat16}
    cost(student, distillation, torch.randn(2, 3, 64, 64), repeats=1)
    assert seen == {torch.bfloat16, torch.float32}
