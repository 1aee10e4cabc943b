import dataclasses
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F

from spikeformers.data.augment import Augment
from spikeformers.train.recipe import Distill, Pretrain, override
from spikeformers.train.tasks import Classification, build_task, build_teacher, cross_entropy, distillation_loss

TEACHER = "test_vit"  # a network of timm with 0.4 M parameters
CPU = torch.device("cpu")
DIGITS = SimpleNamespace(classes=range(10), in_channels=1)  # what a task asks of a split


def test_smoothed_cross_entropy_by_hand():
    logits, labels = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 3, 1])
    target = 0.9 * F.one_hot(labels, 4) + 0.1 / 4
    expected = -(target * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(cross_entropy(logits, labels, smoothing=0.1), expected)
    torch.testing.assert_close(cross_entropy(logits, F.one_hot(labels, 4).float(), smoothing=0.1), expected)


def test_hard_distillation_is_half_own_loss_half_the_teachers_class():
    logits, logits_kd, teacher = torch.randn(3, 2, 5, dtype=torch.float64)
    images, labels = torch.zeros(2, 3, 4, 4), torch.tensor([1, 4])
    task = Classification(smoothing=0.1, teacher=lambda _: teacher, distill=Distill(teacher="any"))
    expected = 0.5 * F.cross_entropy(logits, labels, label_smoothing=0.1)
    expected += 0.5 * F.cross_entropy(logits_kd, teacher.argmax(1))
    torch.testing.assert_close(task.loss(lambda _: (logits, logits_kd), images, labels, epoch=0), expected)


def test_soft_distillation_by_hand_and_zero_for_equal_logits():
    student, teacher = torch.randn(2, 2, 5, dtype=torch.float64)
    q, p = (student / 3).softmax(-1), (teacher / 3).softmax(-1)
    expected = (p * (p.log() - q.log())).sum() * 9 / student.numel()
    torch.testing.assert_close(distillation_loss(student, teacher, kind="soft", temperature=3.0), expected)
    assert float(distillation_loss(student, student, kind="soft")) == pytest.approx(0, abs=1e-15)


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(ValueError, match="the teacher gives 1000 classes but the student 10"):
        distillation_loss(torch.randn(2, 10), torch.randn(2, 1000), kind="hard")


def test_the_teacher_comes_from_a_local_file_frozen(tmp_path):
    source = timm.create_model(TEACHER, num_classes=10)
    torch.save(source.state_dict(), tmp_path / "teacher.pth")
    distill = Distill(teacher=TEACHER, weights=str(tmp_path / "teacher.pth"))
    teacher = build_teacher(distill, num_classes=10, in_channels=3)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    for key, value in source.state_dict().items():
        assert torch.equal(teacher.state_dict()[key], value)


def test_a_teacher_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="'caformer_b37' is no model of timm; some like it: caformer"):
        build_teacher(Distill(teacher="caformer_b37"), num_classes=10, in_channels=3)
    with pytest.raises(ValueError, match=r"there is no file nowhere\.pth"):
        build_teacher(Distill(teacher=TEACHER, weights="nowhere.pth"), num_classes=10, in_channels=3)


def test_a_pretrained_teacher_of_other_classes_is_refused_before_any_download():
    with pytest.raises(ValueError, match="'test_vit' know 1000 classes, but the data has 10"):
        build_teacher(Distill(teacher=TEACHER), num_classes=10, in_channels=3)
    with pytest.raises(ValueError, match=r"no pretrained weights for distill\.teacher 'vit_base_patch16_18x2_224'"):
        build_teacher(Distill(teacher="vit_base_patch16_18x2_224"), num_classes=1000, in_channels=3)
    with pytest.raises(ValueError, match=r"'test_vit\.foo'.*timm has test_vit\.r160_in1k"):
        build_teacher(Distill(teacher="test_vit.foo"), num_classes=1000, in_channels=3)


def test_a_teachers_file_that_does_not_fit_or_runs_code_is_refused(tmp_path):
    distill = Distill(teacher=TEACHER, weights=str(tmp_path / "teacher.pth"))
    torch.save(timm.create_model(TEACHER, num_classes=7).state_dict(), tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=r"teacher\.pth is not for test_vit with .*head\.weight is \(7, 64\)"):
        build_teacher(distill, num_classes=10, in_channels=3)
    torch.save(build_teacher, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=r"teacher\.pth refused"):
        build_teacher(distill, num_classes=10, in_channels=3)


def test_the_loss_is_taken_against_the_mixed_targets():
    logits, labels = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 2])
    soft = torch.tensor([[0.7, 0.0, 0.3], [0.3, 0.0, 0.7]])
    task = Classification(smoothing=0.0, mixer=lambda images, _: (images + 1, soft))
    seen = []
    loss = task.loss(lambda images: seen.append(images) or logits, torch.zeros(2, 1, 2, 2), labels, epoch=0)
    torch.testing.assert_close(loss, -(soft * logits.log_softmax(1)).sum(1).mean())
    assert torch.equal(seen[0], torch.ones(2, 1, 2, 2))


def test_mixup_gives_soft_targets_and_wants_even_batches(tiny):
    data = dataclasses.replace(tiny().data, augment=Augment(mixup=0.8, cutmix=1.0))
    task = build_task(tiny(data=data), split=DIGITS, device=CPU)
    seen = []
    images, labels = torch.randn(8, 1, 4, 4), torch.arange(8)
    loss = task.loss(lambda images: seen.append(images) or torch.zeros(8, 10), images, labels, epoch=999)
    assert float(loss) == pytest.approx(torch.log(torch.tensor(10.0)))  # uniform logits: any target costs log 10
    assert seen[0].shape == (8, 1, 4, 4)
    with pytest.raises(ValueError, match="batch_size must be even, got 7"):
        build_task(tiny(data=data, batch_size=7), split=DIGITS, device=CPU)


def test_after_the_mixing_epochs_images_and_labels_are_plain_and_still_smoothed(tiny):
    data = dataclasses.replace(tiny().data, augment=Augment(mixup=0.8, mixing_epochs=2))
    task = build_task(tiny(data=data, label_smoothing=0.1), split=DIGITS, device=CPU)
    logits, images, labels = torch.randn(8, 10), torch.randn(8, 1, 4, 4), torch.arange(8)
    plain = []
    for epoch in range(4):
        seen = []
        loss = task.loss(lambda images, seen=seen: seen.append(images) or logits, images.clone(), labels, epoch=epoch)
        smoothed = F.cross_entropy(logits, labels, label_smoothing=0.1)
        plain.append(torch.equal(seen[0], images) and torch.equal(loss, smoothed))
    assert plain == [False, False, True, True]


def test_pretraining_refuses_what_it_does_not_do(tiny):
    recipe = tiny(pretrain=Pretrain(mask_ratio=0.5))
    for each in (override(recipe, "quantize.bits", "4"), override(recipe, "fgd.teacher", "runs/ann")):
        with pytest.raises(ValueError, match="neither low-bit weights nor a teacher"):
            build_task(each, split=DIGITS, device=CPU)
