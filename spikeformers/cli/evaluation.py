"""`eval`, `predict` and `report`: what a trained model is good for."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from spikeformers.cli.clips import check_stream, predict_clips, refuse_stream

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from spikeformers.deploy import Artifact, ModelCard
    from spikeformers.energy.report import EnergyReport
    from spikeformers.train.detection_prediction import BoxPredictor, SeenPicture
    from spikeformers.train.prediction import Picture, PixelPredictor
    from spikeformers.train.recipe import Recipe

SEEN = 5  # classes that `predict` prints


def evaluate(arguments: Namespace) -> None:
    """Test the final model of a run again on the whole test split."""
    import torch

    from spikeformers.data.detection import DetectionData
    from spikeformers.data.segmentation import SegmentationData
    from spikeformers.data.splits import load_split
    from spikeformers.train.results import print_facts
    from spikeformers.train.saved import read_run

    model, recipe, _ = read_run(Path(arguments.run))
    if recipe.threads:  # float32 sums depend on the number of threads, and one flipped spike can turn a close call
        torch.set_num_threads(recipe.threads)
    split = load_split(recipe.data, "test", seed=recipe.seed)
    tests = {SegmentationData: segmentation_facts, DetectionData: detection_facts}
    rows = tests.get(type(recipe.data), classification_facts)(model, recipe, split)
    if split.skipped:
        rows.append(("Skipped", f"{len(split.skipped)} images cannot be read or used, first: {split.skipped[0]}"))
    print_facts(arguments.run, rows)


def classification_facts(model: "nn.Module", recipe: "Recipe", split: "Dataset") -> list[tuple[str, str]]:
    from spikeformers.train.evaluate import batches_of
    from spikeformers.train.evaluate import evaluate as run_test

    found = run_test(model, batches_of(split, batch_size=recipe.batch_size, workers=recipe.workers))
    return [("Test accuracy", f"{100 * found.accuracy:.2f} % of {len(split):,} images"), ("Loss", f"{found.loss:.4f}")]


def segmentation_facts(model: "nn.Module", recipe: "Recipe", split: "Dataset") -> list[tuple[str, str]]:
    from spikeformers.train.evaluate import batches_of
    from spikeformers.train.segmentation import windows_of
    from spikeformers.train.segmentation_evaluate import evaluate_segmentation

    loader = batches_of(split, batch_size=recipe.batch_size, workers=recipe.workers)
    found = evaluate_segmentation(model, loader, windows=windows_of(recipe))
    ious = [
        (name, f"{100 * iou:.2f} %" if iou is not None else "absent")
        for name, iou in found.by_class(split.classes).items()
    ]
    accuracy = f"{100 * found.pixel_accuracy:.2f} %, mean of classes {100 * found.mean_accuracy:.2f} %"
    return [("mIoU", f"{100 * found.miou:.2f} % of {len(split):,} images"), ("Pixel accuracy", accuracy), *ious]


def detection_facts(model: "nn.Module", recipe: "Recipe", split: "Dataset") -> list[tuple[str, str]]:
    from spikeformers.train.detection_evaluate import evaluate_detection
    from spikeformers.train.evaluate import batches_of

    loader = batches_of(split, batch_size=recipe.batch_size, workers=recipe.workers)
    found = evaluate_detection(model, loader, num_classes=len(split.classes))
    kinds = {"boxes": found.boxes} | ({"masks": found.masks} if found.masks else {})
    rows = []
    for kind, precision in kinds.items():
        three = (precision.mean(), precision.mean(iou=0.5), precision.mean(iou=0.75))
        rows.append((f"mAP, AP50, AP75 of {kind}", ", ".join(f"{100 * each:.2f} %" for each in three)))
    classes = [
        (name, f"AP50 {100 * ap:.2f} %" if ap is not None else "absent")
        for name, ap in found.boxes.by_class(split.classes, iou=0.5).items()
    ]
    return [*rows, ("Images", f"{found.images:,}"), *classes]


def predict(arguments: Namespace) -> None:
    """What is in each image, or where, and the energy that its inference takes."""
    if arguments.score is not None and not 0 <= arguments.score <= 1:
        raise ValueError(f"--score must lie between 0 and 1, got {arguments.score}")
    check_stream(arguments)
    check_files(arguments)
    if Path(arguments.model).is_file():
        refuse_stream(arguments)
        return predict_by_artifact(arguments)
    if arguments.backend != "torch":
        raise ValueError("--backend goes with a file of `export`: runs and saved models run in torch")
    import torch

    from spikeformers import energy
    from spikeformers.data.detection import DetectionData
    from spikeformers.data.event_clips import EventData
    from spikeformers.data.images import read_image
    from spikeformers.data.segmentation import SegmentationData
    from spikeformers.train.detection_prediction import box_predictor
    from spikeformers.train.saved import read_trained, run_of

    model, spec, classes = read_trained(arguments.model)
    if isinstance(spec, EventData):
        refuse_score(arguments)
        refuse_out(arguments)
        return predict_clips(model, spec, classes, arguments)
    refuse_stream(arguments)
    if isinstance(spec, DetectionData):
        return predict_boxes(box_predictor(model, spec, classes=classes, source=arguments.model), arguments)
    refuse_score(arguments)
    if isinstance(spec, SegmentationData):
        return predict_pixels(arguments)
    refuse_out(arguments)
    images = [read_image(Path(file), spec=spec) for file in arguments.files]  # all of them first: no half answer
    if run_of(Path(arguments.model)) is None:
        print(
            f"{arguments.model}: no recipe beside it, so images are read at {spec.size}x{spec.size} as its paper does"
        )
    for file, image in zip(arguments.files, images, strict=True):
        batch = image[None]
        with torch.no_grad():
            logits = model(batch)[0]
        print(f"{file}: {spent(energy.measure(model, batch))}")
        print_likely(logits, classes)


def check_files(arguments: Namespace) -> None:
    """Raises ValueError for a folder among the files."""
    if folder := next((file for file in map(Path, arguments.files) if file.is_dir()), None):
        raise ValueError(f"{folder} is a folder: name the files in it, such as {folder}/*.png or {folder}/*.bin")


def refuse_out(arguments: Namespace) -> None:
    """Raises ValueError for a folder of overlays, where none are drawn."""
    if arguments.out:
        raise ValueError(
            "--out is for pictures of where something is: this network gives a class to each picture as a whole"
        )


def refuse_score(arguments: Namespace) -> None:
    """Raises ValueError for a least score of boxes, where none are found."""
    if arguments.score is not None:
        raise ValueError(f"--score is for networks that find boxes: {arguments.model} is none, leave it out")


def predict_pixels(arguments: Namespace) -> None:
    """The share of each class among the pixels of each image, and a picture of where they are."""
    from spikeformers import energy
    from spikeformers.train.prediction import trained_predictor

    predictor = trained_predictor(arguments.model)
    for file, image, target in to_paint(predictor, arguments):
        print(f"{file}: {spent(energy.measure(predictor.model, image.input[None]))}")
        paint(predictor, image, target)


def predict_boxes(predictor: "BoxPredictor", arguments: Namespace) -> None:
    """What is found in each image, the most certain first, and a picture of where."""
    from spikeformers import energy

    for file, image, target in to_paint(predictor, arguments):
        print(f"{file}: {spent(energy.measure(predictor.model, image.input[None]))}")
        show_boxes(predictor, image, target, threshold=least_score(arguments))


def least_score(arguments: Namespace) -> float:
    """From which score on boxes are shown."""
    from spikeformers.heads.detections import CERTAIN

    return CERTAIN if arguments.score is None else arguments.score


def show_boxes(predictor: "BoxPredictor", image: "SeenPicture", target: Path, *, threshold: float) -> None:
    """Print each box with its class, and write the overlay."""
    found = predictor.found(image, threshold=threshold)
    for score, label, box in zip(found.scores.tolist(), found.labels.tolist(), found.boxes.tolist(), strict=True):
        x, y, right, bottom = (f"{value:.0f}" for value in box)
        print(f"  {score:.2f}  {predictor.classes[label]}  from ({x}, {y}) to ({right}, {bottom})")
    if not len(found.labels):
        print(f"  nothing with a score of {threshold} or more")
    predictor.picture(image, found).save(target)
    print(f"  written: {target}")


def to_paint(predictor: "PixelPredictor | BoxPredictor", arguments: Namespace) -> "list[tuple[str, Any, Path]]":
    """All files, read, with where their overlays go: first, so that there is no half answer. Makes the folder."""
    folder = Path(arguments.out)
    targets = overlay_files(arguments.files, folder=folder)
    images = [predictor.read(Path(file)) for file in arguments.files]
    folder.mkdir(parents=True, exist_ok=True)
    return list(zip(arguments.files, images, targets, strict=True))


def paint(predictor: "PixelPredictor", image: "Picture", target: Path) -> None:
    """Print the share of each class, and write the overlay."""
    from spikeformers.train.segmentation_pictures import shares_of

    labels = predictor.labels(image)
    for index, share in shares_of(labels):
        print(f"  {100 * share:6.2f} %  {predictor.classes[index]}")
    predictor.picture(image, labels).save(target)
    print(f"  written: {target}")


def overlay_files(files: Sequence[str], *, folder: Path) -> list[Path]:
    """FOLDER/STEM_overlay.png of each file.

    Raises ValueError if one would replace an input or another one, or the folder is a file.
    """
    if folder.is_file():
        raise ValueError(f"--out names a folder, and {folder} is a file: choose another name")
    targets = [folder / f"{Path(file).stem}_overlay.png" for file in files]
    inputs = {Path(file).resolve() for file in files}
    for index, target in enumerate(targets):
        if target.resolve() in inputs or target in targets[:index]:
            raise ValueError(f"{target} would replace an input or another overlay: predict it alone, or with --out DIR")
    return targets


def spent(found: "EnergyReport") -> str:
    """What one inference takes."""
    from spikeformers.train.results import short

    return f"{short(found.total_mj)} mJ ({short(found.ann_mj)} mJ as an ANN, {found.convention})"


def predict_by_artifact(arguments: Namespace) -> None:
    """The same from the one file that `export` writes: the energy is the mean that its card holds."""
    from spikeformers.deploy import load

    try:
        model = load(arguments.model, backend=arguments.backend)
    except ImportError as error:  # an extra that is not installed; the message names it
        raise ValueError(str(error)) from error
    if not model.detects:
        refuse_score(arguments)
    if model.preprocessing is None:
        raise ValueError(
            f"{arguments.model} does not say how to prepare pictures: it takes clips, or was saved without; run it by "
            "spikeformers.deploy.load in Python"
        )
    answer = paint_by_artifact if model.segments else boxes_by_artifact if model.detects else classify_by_artifact
    answer(model, arguments)


def classify_by_artifact(model: "Artifact", arguments: Namespace) -> None:
    from spikeformers.train.saved import class_labels, read_picture

    refuse_out(arguments)
    images = [read_picture(Path(file), model.preprocessing) for file in arguments.files]  # first: no half answer
    classes = model.labels or class_labels(model.engine.config.num_classes)
    print_energy(model.card)
    for file, image in zip(arguments.files, images, strict=True):
        print(f"{file}:")
        print_likely(model(image[None])[0], classes)


def paint_by_artifact(model: "Artifact", arguments: Namespace) -> None:
    from spikeformers.train.prediction import file_predictor

    predictor = file_predictor(model, name=arguments.model)
    jobs = to_paint(predictor, arguments)
    print_energy(model.card)
    for file, image, target in jobs:
        print(f"{file}:")
        paint(predictor, image, target)


def boxes_by_artifact(model: "Artifact", arguments: Namespace) -> None:
    from spikeformers.train.detection_prediction import file_box_predictor

    predictor = file_box_predictor(model, name=arguments.model)
    jobs = to_paint(predictor, arguments)
    print_energy(model.card)
    for file, image, target in jobs:
        print(f"{file}:")
        show_boxes(predictor, image, target, threshold=least_score(arguments))


def print_energy(card: "ModelCard") -> None:
    """What the card of a file tells, if it does."""
    from spikeformers.train.results import short

    if card.energy_mj is not None:
        ann = "" if card.ann_energy_mj is None else f"{short(card.ann_energy_mj)} mJ as an ANN, "
        print(f"By its card {short(card.energy_mj)} mJ a picture on average ({ann}{card.energy_convention})")


def print_likely(logits: "Tensor", classes: Sequence[str]) -> None:
    """The likeliest classes of one image, from its logits."""
    likely = logits.softmax(-1).topk(min(SEEN, len(classes)))
    for share, index in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
        print(f"  {100 * share:6.2f} %  {classes[index]}")


def report(arguments: Namespace) -> None:
    """Write the page again, for example of a run that is still going."""
    from spikeformers.train.report import write_report

    print(write_report(Path(arguments.run)))
