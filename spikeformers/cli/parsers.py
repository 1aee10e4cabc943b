"""What each command accepts, and the help that it prints."""

import argparse
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

if TYPE_CHECKING:
    from jsonargparse._subcommands import ActionSubCommands


def build_parser() -> tuple[ArgumentParser, ArgumentParser]:
    """The parser of the whole command line, and that of `weights`, whose help is shown when it stands alone."""
    top = new_parser(
        "Train spiking vision transformers, count their energy and run them in integers.",
        "spikeformers train digits                     # a first run: minutes on a CPU, data included",
        "spikeformers predict runs/digits seven.png    # what is it, and what did it cost",
        "spikeformers COMMAND --help                   # every command shows examples",
    )
    top.prog = "spikeformers"
    commands = top.add_subcommands(required=False, metavar="COMMAND", dest="command", title="commands")
    adders = (add_list, add_train, add_pretrain, add_eval, add_predict, add_energy, add_audit, add_quantize)
    for add in (*adders, add_export, add_report):
        add(commands)
    weights = new_parser("Weights that others trained.", "spikeformers weights import --help")
    add_command(commands, "weights", weights, "weights that others trained")
    actions = weights.add_subcommands(required=False, metavar="ACTION", dest="action", title="actions")
    add_import(actions)
    return top, weights


def new_parser(description: str, *examples: str) -> ArgumentParser:
    """A parser whose help ends with examples."""
    return ArgumentParser(
        description=description,
        epilog="\n".join(("examples:", *(f"  {example}" for example in examples))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )


def add_command(commands: "ActionSubCommands", name: str, parser: ArgumentParser, summary: str) -> None:
    commands.add_subcommand(name, parser, help=summary)
    parser.prog = parser.prog.replace(" [options]", "")


def add_setting(parser: ArgumentParser, summary: str) -> None:
    parser.add_argument("--set", nargs="+", action="extend", default=[], type=str, metavar="a.b=c", help=summary)


def add_list(commands: "ActionSubCommands") -> None:
    parser = new_parser(
        "Models by name, with parameters, default sizes and paper; and recipes to train them.",
        "spikeformers list",
        "spikeformers list '*15m*'",
    )
    parser.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="part of a name, or shell pattern (default: *)"
    )
    add_command(commands, "list", parser, "models with sizes and papers, and recipes")


def add_train(commands: "ActionSubCommands") -> None:
    parser = new_parser(
        "Train a recipe: a table of results at the end, everything else in the run folder, report.html included.",
        "spikeformers train digits",
        "spikeformers train digits --set epochs=5 optim.lr=2e-3 model.neuron=lif model.steps=4",
        "spikeformers train cifar10_small --set data.source=imagefolder data.root=photos --out runs/photos",
        "spikeformers train digits --seeds 0,1,2           # mean and deviation of three runs",
        "spikeformers train digits --resume                # go on after Ctrl-C or a crash, to the same result",
        "accelerate launch -m spikeformers train cifar10_small --out runs/two    # several processes or devices",
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="name of a recipe, such as digits; `spikeformers list` shows all"
    )
    add_setting(parser, "change fields of the recipe; several at once, or --set again")
    parser.add_argument("--seeds", default="", metavar="0,1,2", help="one run for each seed, then mean and deviation")
    add_run(parser)
    add_command(commands, "train", parser, "train a recipe and report on it")


def add_pretrain(commands: "ActionSubCommands") -> None:
    parser = new_parser(
        "Pre-train an encoder on images without labels: it learns to draw hidden patches. Finetune it by a training "
        "recipe of the same network.",
        "spikeformers pretrain spikformer_v2_cifar10_mae --out runs/mae",
        "spikeformers pretrain spikformer_v2_cifar10_mae --set pretrain.mask_ratio=0.6 epochs=40 --out runs/mae60",
        "spikeformers train spikformer_v2_cifar10_finetune --set init.backbone=runs/mae",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a pre-training recipe; `spikeformers list '*mae*'`")
    add_setting(parser, "change fields of the recipe; several at once, or --set again")
    add_run(parser)
    add_command(commands, "pretrain", parser, "learn from images without labels")


def add_run(parser: ArgumentParser, *, folders: str = "runs/RECIPE, runs/RECIPE-2, ...") -> None:
    """What starting and resuming a run takes; `folders`: where it is without --out."""
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, else the newest; its --set are known",
    )
    parser.add_argument("--out", default="", metavar="DIR", help=f"run folder (default: {folders})")
    parser.add_argument(
        "--threads",
        type=int,
        default=None,
        metavar="N",
        help="CPU threads, whatever OMP_NUM_THREADS is (default: the recipe's)",
    )


def add_quantize(commands: "ActionSubCommands") -> None:
    parser = new_parser(
        "Fine-tune a run with low-bit weights: by default for a quarter of its epochs, at a third of its rate. Or "
        "--sensitivity: which kind of layer suffers most from few bits.",
        "spikeformers quantize runs/digits --bits 4",
        "spikeformers quantize runs/digits --bits 2 --layers attention=8 first=8 last=8 --set epochs=5 optim.lr=5e-4",
        "spikeformers quantize runs/digits --sensitivity --twin runs/digits_ann --epochs 2",
        "spikeformers quantize runs/digits --resume        # go on after Ctrl-C or a crash, to the same result",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--bits", type=int, default=None, metavar="N", help="bits of a weight, 2 to 8 (default: 4)")
    parser.add_argument(
        "--layers",
        nargs="+",
        action="extend",
        default=[],
        type=str,
        metavar="KIND=BITS",
        help="other bits for attention, conv, linear, first, last, or layers by name, such as 'stage3.*'; 0: float",
    )
    parser.add_argument(
        "--sensitivity",
        action="store_true",
        help="accuracy with only FC, only conv, only attention or all layers quantised, as a table and a picture; to "
        "--resume it, repeat its --bits, --epochs and --set",
    )
    parser.add_argument("--twin", default="", metavar="RUN", help="run of an ANN, drawn beside it in --sensitivity")
    parser.add_argument(
        "--epochs",
        type=int,
        default=None,
        metavar="N",
        help="fine-tuning of each network of --sensitivity (default: 1; 0: none, they are only tested)",
    )
    add_setting(parser, "change fields of the run's recipe; several at once, or --set again")
    add_run(parser, folders="runs/NAME_w4 or runs/NAME_sensitivity, then -2, ...")
    add_command(commands, "quantize", parser, "low-bit weights for a trained run")


def add_eval(commands: "ActionSubCommands") -> None:
    parser = new_parser("Test the final model of a run on its whole test split.", "spikeformers eval runs/digits")
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    add_command(commands, "eval", parser, "test a trained model again")


def add_predict(commands: "ActionSubCommands") -> None:
    parser = new_parser(
        "The five likeliest classes of each image, and the energy of its inference beside that of an ANN; of a file of "
        "`export` the average that its card tells. A segmentation network gives the share of each class among the "
        "pixels instead, a detector its boxes; both draw where into NAME_overlay.png.",
        "spikeformers predict runs/digits seven.png",
        "spikeformers predict imported/55m photos/*.jpg",
        "spikeformers predict model.spk seven.png",
        "spikeformers predict runs/camvid_spike2former street.png --out overlays",
        "spikeformers predict runs/bccd_yolo_small cells.jpg --score 0.5",
        "spikeformers predict runs/nmnist_small recording.bin --stream --confidence 0.95",
    )
    parser.add_argument(
        "model", metavar="RUN_OR_MODEL", help="folder of a finished run or of a saved model, or file of `export`"
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="image files, or recordings of events")
    parser.add_argument(
        "--backend",
        default="torch",
        choices=("torch", "openvino"),
        help="what runs a file of `export` (default: %(default)s)",
    )
    parser.add_argument("--out", default="", metavar="DIR", help="folder of the overlays (default: here)")
    parser.add_argument(
        "--score",
        type=float,
        default=None,
        metavar="S",
        help="least score of boxes to show, 0 to 1 (default: 0.3)",
    )
    parser.add_argument(
        "--stream", action="store_true", help="of a recording of events: what each step decides, one frame at a time"
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=None,
        metavar="P",
        help="end a stream as soon as the likeliest class has this probability, above 0 to 1",
    )
    add_command(commands, "predict", parser, "what image files or recordings show, and where")


def add_energy(commands: "ActionSubCommands") -> None:
    parser = new_parser(
        "Operations and energy by layer and by stage, spiking and as an ANN. A bare name: random weights and images. "
        "Several runs: a row each, and --plot draws their scores over their energy. A model of your own is measured "
        "from Python: docs/guides/energy.md has the three lines.",
        "spikeformers energy runs/digits --images 200 --json energy.json --plot energy.png",
        "spikeformers energy runs/digits --plot rates.png --kind rates --csv layers.csv --latex layers.tex --strict",
        "spikeformers energy runs/digits runs/digits_ann --plot bubbles.png",
        "spikeformers energy meta_spikeformer_15m",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL_OR_RUN", help="folder of a run or of a saved model, or a model's name"
    )
    parser.add_argument("--convention", default="meta_spikeformer", help="whose way of counting (default: %(default)s)")
    parser.add_argument("--images", type=int, metavar="N", help="images to average over (default: 64, of a name 4)")
    parser.add_argument("--strict", action="store_true", help="fail if anything that may multiply is not counted")
    parser.add_argument("--json", default="", metavar="FILE", help="write all numbers there")
    parser.add_argument("--csv", default="", metavar="FILE", help="write the rows there, in full precision")
    parser.add_argument("--latex", default="", metavar="FILE", help="write the rows there, for the package booktabs")
    parser.add_argument("--plot", default="", metavar="FILE", help="draw there (png, svg, pdf)")
    parser.add_argument(
        "--kind",
        default=None,
        choices=("stages", "layers", "rates"),
        help="of one model, what to draw: energy of stages or layers, or firing rates of layers over time steps "
        "(default: stages)",
    )
    add_command(commands, "energy", parser, "energy by layer and stage")


def add_audit(commands: "ActionSubCommands") -> None:
    parser = new_parser(
        "Every product of a network: whether a spike drives it (AC) or not (MAC), its energy, what merging changes, "
        "and the verdict: spike-driven, integer-driven or neither. A bare name: random weights and images.",
        "spikeformers audit runs/digits",
        "spikeformers audit runs/digits --merged --json audit.json",
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="folder of a run or of a saved model, or a model's name")
    parser.add_argument("--merged", action="store_true", help="audit it with RepConv and batch norms merged")
    parser.add_argument("--images", type=int, metavar="N", help="images to average over (default: 64, of a name 4)")
    parser.add_argument("--json", default="", metavar="FILE", help="write all numbers there")
    add_command(commands, "audit", parser, "is it driven by spikes?")


def add_export(commands: "ActionSubCommands") -> None:
    parser = new_parser(
        "Turn a finished run into a file that others run without it: the integer engine with class names, preparation "
        "of pictures and a card (spk), ONNX, or the parts that NIR can express. Says what that keeps of the network. "
        "ONNX and NIR hold only the first stage of a Mask R-CNN, which chooses regions after it.",
        "spikeformers export runs/digits --to spk",
        "spikeformers predict runs/digits/model.spk seven.png",
        "spikeformers export runs/digits_w4 --to spk --out digits.spk --license CC-BY-4.0",
        "spikeformers export runs/digits --to onnx",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run; its packed weights if it has them")
    parser.add_argument("--to", required=True, choices=("spk", "onnx", "nir"), help="spk, onnx or nir")
    parser.add_argument(
        "--out", default="", metavar="FILE", help="file to write or replace; of nir a new folder (default: in RUN)"
    )
    parser.add_argument("--backend", default="torch", choices=("torch", "openvino"), help="what runs the engine (spk)")
    parser.add_argument("--form", default=None, choices=("integer", "qdq"), help="of ONNX operators (default: integer)")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="test images to compare on (default: 200)")
    parser.add_argument("--license", default="", metavar="NOTE", help="licence of the weights, for the card")
    add_command(commands, "export", parser, "one file to deploy: spk, onnx, nir")


def add_report(commands: "ActionSubCommands") -> None:
    parser = new_parser(
        "Write report.html of a run again; also of a run that is going.", "spikeformers report runs/digits"
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    add_command(commands, "report", parser, "one page about a run")


def add_import(actions: "ActionSubCommands") -> None:
    parser = new_parser(
        "Turn a checkpoint of a paper's authors into a model folder; says what was dropped; never runs its code.",
        "spikeformers weights import 55M_kd.pth --model meta_spikeformer_55m --out imported/55m",
        "spikeformers weights import t4.pth --model meta_spikeformer_15m --set steps=4 --out imported/15m_t4",
        "spikeformers weights import FILE --model spike2former_voc --set levels=4 alpha=4.0 layout=released --out voc",
    )
    parser.add_argument("file", metavar="FILE", help="the authors' .pth file, of a classifier or of mmsegmentation")
    parser.add_argument("--model", required=True, metavar="NAME", help="what it is; see `spikeformers list`")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    add_setting(parser, "arguments of the model, such as num_classes=100")
    add_command(actions, "import", parser, "read an authors' checkpoint")
