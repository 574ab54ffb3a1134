"""The whitepaper's section 4 as experiments: what training practice does, with curves.

    python -m eval.practice --dataset=cifar10
    python -m eval.practice --dataset=cifar10_jpeg.npz --experiments=stochastic,batch_norm

A CIFAR-size MobileNet-v1 is trained in float first; then every run fine-tunes it under one schedule,
and differs from the first run ("base": deterministic rounding, corrected batch norms that freeze at
half of the steps, quantized activations from the first step) in what its experiment is about.  Each
run is a process of its own; its row goes to OUTPUT_DIR/practice.csv, its accuracy on the validation
images in between to practice_curves.csv, and the page and the picture are drawn from these.  A run
that was killed goes on, and a second call measures only what is missing.
"""

import dataclasses
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping

from eval import networks, processes
from lowbit import cli, files, results, spec
from lowbit.data import datasets


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run: how it differs from "base"."""

    flags: tuple[str, ...] = ()  # of qat.train; {steps}, {half} and {quarter} are numbers of steps
    network: str = "mobilenet_cifar"
    alpha: float | None = None  # None: the command's
    scheme: str | None = None  # None: the command's
    scratch: bool = False  # quantized from random weights on, for as many steps as float and base


HALF = "--freeze_batch_norm_step={half}"
CORRECTION = "--batch_norm=correction"
BASE = (HALF, CORRECTION, "--ema_decay=0.99")
WIDTHS = (0.25, 0.5, 1.0)
RUNS = {
    "base": Run(BASE),
    "scratch": Run((HALF, CORRECTION), scratch=True),
    "stochastic": Run((HALF, CORRECTION, "--quantizer=stochastic")),
    "no_correction": Run(("--freeze_batch_norm_step={steps}", "--batch_norm=none")),
    "correction": Run(("--freeze_batch_norm_step={steps}", CORRECTION)),
    "frozen": Run(("--freeze_batch_norm_step=0",)),
    "relu": Run((HALF, CORRECTION), network="mobilenet_cifar_relu"),
    "delay": Run((HALF, CORRECTION, "--quant_delay={quarter}")),
    **{
        # With base's flags: where a width and a scheme are the command's own, base's row serves.
        f"width_{width:g}_{scheme}": Run(BASE, alpha=width, scheme=scheme)
        for width in WIDTHS
        for scheme in ("w8a8", "w4a8")
    },
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Runs side by side."""

    title: str
    paper: str  # what the whitepaper says
    curves: Mapping[str, tuple[str, str]]  # label: run, and which of its weights


EXPERIMENTS = {
    "scratch": Experiment(
        "Fine-tuning against training from scratch (Figure 13)",
        "a float checkpoint that is fine-tuned ends higher than training quantized from scratch",
        {"fine-tuned": ("base", "last"), "from scratch": ("scratch", "last")},
    ),
    "stochastic": Experiment(
        "Stochastic against deterministic rounding (Figure 12)",
        "stochastic rounding in training does not improve accuracy",
        {"deterministic": ("base", "last"), "stochastic": ("stochastic", "last")},
    ),
    "batch_norm": Experiment(
        "Batch norm (Figures 14 and 15)",
        "statistics of the batch in the weights jitter; correction is better, freezing is best",
        {
            "none": ("no_correction", "last"),
            "correction": ("correction", "last"),
            "correction, frozen at half": ("base", "last"),
            "frozen from the start": ("frozen", "last"),
        },
    ),
    "ema": Experiment(
        "Moving averages of the weights (section 4, Figure 15)",
        "averages help in float; of quantized weights they can do worse than the last ones",
        {"instantaneous": ("base", "last"), "average": ("base", "average")},
    ),
    "relu6": Experiment(
        "ReLU against ReLU6 (Figure 16)",
        "with ReLU training finds the range, slightly more accurate than a fixed 6",
        {"ReLU6": ("base", "last"), "ReLU": ("relu", "last")},
    ),
    "delay": Experiment(
        "Delay of activation quantization (section 3.2)",
        "activations are quantized only once the weights are stable: of use in training from "
        "scratch, in Jacob et al. after 50,000 to 2,000,000 steps",
        {"from the first step": ("base", "last"), "after a quarter": ("delay", "last")},
    ),
    "width": Experiment(
        "Width against precision (Figure 17)",
        "a wider network of 4-bit weights can beat a narrower one of 8 bits at the same size",
        {name: (name, "last") for name in RUNS if name.startswith("width")},
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    dataset: str = cli.field("cifar10", "Training images: a name or a path.")
    val_dataset: str | None = cli.field(
        None, "Images to measure on; default: the data set's own split."
    )
    experiments: str = cli.field(",".join(EXPERIMENTS), "Comma list of experiments.")
    scheme: str = cli.field("w4a8", f"Of every run but width's: {spec.ALLOWED}.")
    alpha: float = cli.field(0.5, "Width of the MobileNet.")
    float_epochs: int = cli.field(6, "Passes over the training images in float, at first.")
    float_learning_rate: float = cli.field(0.1, "Of that training, and of training from scratch.")
    epochs: int = cli.field(2, "Passes with quantizers in place.")
    learning_rate: float = cli.field(0.01, "Of SGD, for every run that fine-tunes.")
    weight_decay: float = cli.field(1e-4, "As qat.train's.")
    batch_size: int = cli.field(64, "Images a step.")
    points: int = cli.field(12, "Of a curve.")
    limit: int | None = cli.field(None, "Validation images, the first ones; default all.")
    root: str | None = cli.field(
        None, "Folder in which relative paths are looked for first; written $ROOT in the rows."
    )
    output_dir: str = cli.field("results", "Where rows, page and picture go.")
    work_dir: str = cli.field("runs/practice", "Where the runs and log.txt lie.")

    def __post_init__(self):
        for name in ("epochs", "float_epochs", "batch_size", "points"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; at least 1 is needed")
        spec.scheme(self.scheme)


def measure(config: Config) -> dict:
    """Runs the command; returns its result row.

    Raises:
      ValueError: for bad input at once, and at the end where runs failed.
    """
    start = time.monotonic()
    networks.check_root(config.root)
    chosen = {
        name: EXPERIMENTS[name]
        for name in networks.picked(config.experiments, EXPERIMENTS, "--experiments", "experiments")
    }
    images = len(
        datasets.open_dataset(
            networks.real(networks.located(config.dataset, config.root), config.root),
            "train" if config.val_dataset is None else "train_whole",
        )
    )
    for folder in (config.output_dir, config.work_dir):
        os.makedirs(folder, exist_ok=True)
    names = dict.fromkeys(
        run for experiment in chosen.values() for run, _ in experiment.curves.values()
    )
    path, curves_path = (
        os.path.join(config.output_dir, name) for name in ("practice.csv", "practice_curves.csv")
    )
    measured, found = 0, {}
    for number, name in enumerate(names, 1):
        commands = commands_of(config, RUNS[name], images)
        text = processes.joined(commands)
        stored = [row for row in results.read_rows(path) if row["commands"] == text]
        if not stored or stored[0]["status"] != "ok":
            minutes, seconds = divmod(int(time.monotonic() - start), 60)
            print(f"run {number} of {len(names)}, {minutes}:{seconds:02d}: {name}", file=sys.stderr)
            row, curve = _measure(config, name, commands)
            measured += 1
            done = f"top-1 {row['top1']}" if row["status"] == "ok" else row["status"]
            print(f"  {done}, {row['seconds']} s", file=sys.stderr)
            others = [old for old in results.read_rows(curves_path) if old["run"] != name]
            results.write_rows(curves_path, [*others, *curve])
            others = [old for old in results.read_rows(path) if old["run"] != name]
            results.write_rows(path, [*others, row])
            stored = [row for row in results.read_rows(path) if row["commands"] == text]
        found[name] = stored[0]
    page_path = os.path.join(config.output_dir, "practice.md")
    files.save_bytes(page(config, chosen, found).encode(), page_path)
    _draw(config, chosen, found, results.read_rows(curves_path))
    failed = [row["status"] for row in found.values() if row["status"] != "ok"]
    if failed:
        raise ValueError(f"{len(failed)} of {len(found)} runs failed, the first: {failed[0]}")
    return {
        "tool": "eval.practice",
        "experiments": list(chosen),
        "runs": len(found),
        "measured": measured,
        "dataset": config.dataset,
        "output": page_path,
        "seconds": round(time.monotonic() - start, 3),
        "versions": results.versions(),
    }


# --- measuring -----------------------------------------------------------------------------------


def commands_of(config: Config, run: Run, images: int) -> list[list[str]]:
    """Returns the commands of a run: float training, and QAT; their folders are named by a digest.

    Args:
      config: see above.
      run: of RUNS.
      images: the number of training images.
    """
    steps = math.ceil(config.epochs * images / config.batch_size)
    float_steps = math.ceil(config.float_epochs * images / config.batch_size)
    alpha, scheme = run.alpha or config.alpha, run.scheme or config.scheme
    data = [f"--dataset={networks.located(config.dataset, config.root)}"]
    if config.val_dataset is not None:
        data.append(f"--val_dataset={networks.located(config.val_dataset, config.root)}")
    data += [f"--batch_size={config.batch_size}", f"--weight_decay={config.weight_decay:g}"]
    if config.limit is not None:
        data.append(f"--limit={config.limit}")
    begin = ["qat.train", f"--model={run.network}", f"--alpha={alpha:g}", *data]
    rate = config.learning_rate
    if run.scratch:
        steps, rate = steps + float_steps, config.float_learning_rate
        commands, train = [], [*begin, "--float_epochs=0"]
    else:
        command = [
            *begin,
            f"--float_epochs={config.float_epochs}",
            f"--float_learning_rate={config.float_learning_rate:g}",
            *("--steps=1", "--scheme=w8a8"),
        ]
        folder = processes.folder(config.work_dir, f"{run.network}_{alpha:g}_float", command)
        commands = [[*command, f"--output_dir={folder}"]]
        train = ["qat.train", f"--model={folder}/float.keras", *data]
    places = {"steps": steps, "half": steps // 2, "quarter": steps // 4}
    train += [
        f"--scheme={scheme}",
        f"--steps={steps}",
        f"--learning_rate={rate:g}",
        f"--evaluate_every={math.ceil(steps / config.points)}",
        *(flag.format(**places) for flag in run.flags),
    ]
    folder = processes.folder(config.work_dir, f"{run.network}_{alpha:g}_{scheme}", train)
    return [*commands, [*train, f"--output_dir={folder}"]]


def _measure(config, name, commands):
    """Runs a run's commands; returns its row, and its curve's rows."""
    row = dict.fromkeys(
        ("float_top1", "ptq_top1", "top1", "average_top1", "images", "steps", "training_seconds")
    )
    row = {"run": name} | row | {"status": "ok", "seconds": 0.0, "peak_mib": 0}
    row |= {
        "commands": processes.joined(commands),
        "versions": results.versions(),
    }
    curve = []
    try:
        log = os.path.join(config.work_dir, "log.txt")
        *_, (command, last) = processes.run_all(commands, config.root, log, row)
        folder = command[-1].partition("=")[2]
        averaged = "top1_qat_last_weights" in last
        row |= {
            "float_top1": last["top1_float"],
            "ptq_top1": last["top1_ptq"],
            "top1": last["top1_qat_last_weights" if averaged else "top1_qat"],
            "average_top1": last["top1_qat"] if averaged else None,
        }
        row |= {name: last[name] for name in ("images", "steps", "training_seconds")}
        curve = [
            {"run": name} | {key: point[key] for key in ("step", "weights", "top1")}
            for point in results.read_rows(os.path.join(folder, "validation.csv"))
            if point["stage"] == "QAT"
        ]
    except processes.StepFailedError as error:
        row["status"] = f"failed: {error}"
    return row, curve


# --- showing -------------------------------------------------------------------------------------


def page(
    config: Config, chosen: Mapping[str, Experiment], found: Mapping[str, Mapping[str, str]]
) -> str:
    """Returns the experiments as a page of Markdown."""
    images = pathlib.Path(config.val_dataset or config.dataset).name
    text = [
        "# Training practice: the whitepaper's section 4",
        "",
        "Generated by `python -m eval.practice`. *paper*: Krishnamoorthi, arXiv 1806.08342, section "
        f"4, on ImageNet. The figures are measured on the validation images of {images}, percent, "
        "simulated in Keras, whose inference computes the kernels' codes; one seed.",
        "",
    ]
    for experiment in chosen.values():
        lines = []
        for label, (run, weights) in experiment.curves.items():
            row = found[run]
            last = row["average_top1" if weights == "average" else "top1"]
            figures = (row["float_top1"], row["ptq_top1"], last)
            if row["status"] != "ok":
                figures = ("nan",) * 3
            lines.append(
                {"": label}
                | {
                    name: f"{100 * float(value):.2f}"
                    for name, value in zip(
                        ("float", "before training", "measured"), figures, strict=True
                    )
                }
                | {"steps": row["steps"], "run": run}
            )
        text += [f"## {experiment.title}", "", f"Paper: {experiment.paper}.", ""]
        text += [*results.markdown(lines, list(lines[0])), ""]
    text += processes.heading(found.values())
    commands = processes.each_once(found.values())
    return "\n".join([*text, *(f"    {command}" for command in commands), ""])


def _draw(config, chosen, found, curves):
    """Draws the curves, and accuracy over width as the paper's Figure 17."""
    from lowbit import plots  # matplotlib takes a second: only once there is something to draw

    panels = {
        experiment.title: {
            label: [
                (int(row["step"]), float(row["top1"]))
                for row in curves
                if row["run"] == run and row["weights"] == weights
            ]
            for label, (run, weights) in experiment.curves.items()
        }
        for name, experiment in chosen.items()
        if name != "width"
    }
    if panels:
        plots.learning_curves(panels, os.path.join(config.output_dir, "practice.png"))
    if "width" not in chosen:
        return
    lines: dict[str, list] = {"float": [], "w8a8": [], "w4a8": []}
    for name, _ in chosen["width"].curves.values():
        run, row = RUNS[name], found[name]
        if row["status"] == "ok":
            lines[run.scheme].append((run.alpha, float(row["top1"])))
            if run.scheme == "w8a8":
                lines["float"].append((run.alpha, float(row["float_top1"])))
    path = os.path.join(config.output_dir, "practice_width.png")
    plots.learning_curves({chosen["width"].title: lines}, path, over="width multiplier")


def main() -> None:
    """Runs the command line."""
    cli.run(measure, Config)


if __name__ == "__main__":
    main()
