"""DSQ's tables (Gong et al., arXiv 1908.05033): published figures beside those measured here.

    python -m eval.dsq --table=4 --dataset=cifar10
    python -m eval.dsq --table=4 --dataset=cifar10.npz --model=resnet20.keras --preprocess=torch
    python -m eval.dsq --table=7 --dataset='imagenet/train-*' --val_dataset='imagenet/validation-*'

The float network is trained first, on the same images (--float_epochs), then every row of the table
from it, all under one schedule (--epochs, --learning_rate).  As in the paper the first and the last
layer stay at 8 bits, and so do the tensors that additions read and write; activations are one scale
a tensor.  Each run is a process of its own; its row, with the command, goes to OUTPUT_DIR/dsq.csv, a
run that was killed goes on, and a second run measures only what is missing.  The table is written to
OUTPUT_DIR/dsq_table_N.md.

Rows without a figure of ours need 1-bit activations, which have no scheme here, or are other papers'
methods.  Rows of ours that the paper does not have stand below its own.
"""

import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

from eval import dsq_published, networks, processes
from lowbit import cli, files, results

# What measures a row: scheme and quantizer.
Run = tuple[str, str]
Row = dsq_published.Row


def _rows(network: str, bits: tuple[int, int], methods: Mapping[str, str]) -> dict[Row, Run]:
    scheme = f"w{bits[0]}a{bits[1]}"
    return {(network, method, bits): (scheme, name) for method, name in methods.items()}


OURS = {"uniform": "ste", "PACT": "pact", "LSQ": "lsq", "DSQ": "dsq"}
WHOLE_DSQ = "DSQ, alpha and limits learnt"
MEASURED: dict[int, dict[Row, Run]] = {
    2: {("resnet20", WHOLE_DSQ, (2, 2)): ("w2a2", "dsq")},
    3: {},
    4: {
        ("resnet20", "uniform", (2, 2)): ("w2a2", "ste"),
        ("resnet20", "DSQ, alpha fixed", (2, 2)): ("w2a2", "dsq_fixed"),
        ("resnet20", "DSQ, alpha learnt", (2, 2)): ("w2a2", "dsq_alpha"),
        ("resnet20", WHOLE_DSQ, (2, 2)): ("w2a2", "dsq"),
        ("resnet20", "LSQ", (2, 2)): ("w2a2", "lsq"),
        **_rows("resnet20", (3, 3), OURS),
        ("resnet20", "uniform", (4, 4)): ("w4a4", "ste"),
        ("resnet20", "LSQ", (4, 4)): ("w4a4", "lsq"),
        ("resnet20", "uniform", (8, 8)): ("w8a8", "ste"),
    },
    5: {("resnet20", "PACT", (2, 2)): ("w2a2", "pact")},
    6: {("vgg_small", "LSQ", (2, 2)): ("w2a2", "lsq")},
    7: {
        ("resnet_v1_18", "PACT", (2, 2)): ("w2a2", "pact"),
        ("resnet_v1_18", "DSQ", (2, 2)): ("w2a2", "dsq"),
        ("resnet_v1_18", "DSQ", (3, 3)): ("w3a3", "dsq"),
        ("resnet_v1_18", "DSQ", (4, 4)): ("w4a4", "dsq"),
        ("resnet_v1_34", "DSQ", (2, 2)): ("w2a2", "dsq"),
        ("resnet_v1_34", "DSQ", (3, 3)): ("w3a3", "dsq"),
        ("resnet_v1_34", "DSQ", (4, 4)): ("w4a4", "dsq"),
        ("mobilenet_v2", "PACT", (4, 4)): ("w4a4", "pact"),
        ("mobilenet_v2", "DSQ", (4, 4)): ("w4a4", "dsq"),
    },
}
CAPTIONS = {
    2: "alpha that training found, layer by layer",
    3: "1-bit weights",
    4: "what DSQ learns",
    5: "PACT and DSQ",
    6: "CIFAR-10",
    7: "ImageNet",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    table: int = cli.field(cli.REQUIRED, f"One of {', '.join(map(str, MEASURED))}.")
    dataset: str = cli.field("cifar10", "Training images: a name or a path.")
    val_dataset: str | None = cli.field(
        None, "Images to measure on; default: the data set's own split."
    )
    model: str | None = cli.field(
        None, "A .keras file to train on from, instead of each network from random weights."
    )
    preprocess: str | None = cli.field(None, "Of --model; default: the network's own.")
    networks: str | None = cli.field(None, "Comma list of the table's networks; default all.")
    methods: str | None = cli.field(None, "Semicolon list of the table's methods; default all.")
    schemes: str | None = cli.field(None, "Comma list of bits, as w2a2,w4a4; default all.")
    float_epochs: int = cli.field(10, "Passes over the training images in float, at first.")
    float_learning_rate: float = cli.field(0.05, "Of that training.")
    epochs: int = cli.field(10, "Passes with quantizers in place, for every row.")
    learning_rate: float = cli.field(
        0.01, "For every row: of SGD; with --recipe of Adam, in steps of the quantizers."
    )
    weight_decay: float = cli.field(5e-4, "As qat.train's.")
    batch_size: int = cli.field(128, "Images a step.")
    input_size: int | None = cli.field(None, "In pixels; default: the network's.")
    steps: int | None = cli.field(None, "Instead of --epochs.")
    freeze_batch_norm_step: int = cli.field(
        3700,  # of CIFAR-10's 3,907 steps, at 1% of the rate; half-way costs points (docs/qat.md)
        "Of every row, as qat.train's: late, where the rate is small; default: for 10 epochs of "
        "CIFAR-10.",
    )
    distill: bool = cli.field(False, "Every row learns from the float network, not from labels.")
    limit: int | None = cli.field(None, "Validation images, the first ones; default all.")
    recipe: str | None = cli.field(
        None,
        "Every row starts from what ptq.quantize makes by this recipe; else from calibrated ranges.",
        choices=("fast", "accurate"),
    )
    calibration_images: int = cli.field(1000, "Of --recipe.")
    select_images: int | None = cli.field(
        None, "Training images left out, by which the step that is saved is chosen; default none."
    )
    root: str | None = cli.field(
        None, "Folder in which relative paths are looked for first; written $ROOT in the rows."
    )
    output_dir: str = cli.field("results", "Where dsq.csv and the table go.")
    work_dir: str = cli.field("runs/dsq", "Where the runs and log.txt lie.")

    def __post_init__(self):
        if self.table not in MEASURED:
            raise ValueError(f"--table={self.table} is not one of {', '.join(map(str, MEASURED))}")
        for name in ("epochs", "batch_size", "float_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; at least 1 is needed")


def tabulate(config: Config) -> dict:
    """Runs the command; returns its result row.

    Raises:
      ValueError: for bad input at once, and at the end where rows failed.
    """
    start = time.monotonic()
    networks.check_root(config.root)
    chosen = _chosen(config)
    os.makedirs(config.output_dir, exist_ok=True)
    os.makedirs(config.work_dir, exist_ok=True)
    path = os.path.join(config.output_dir, "dsq.csv")
    measured, found = 0, {}
    for number, (row, run) in enumerate(chosen.items(), 1):
        commands = commands_of(config, row[0], run)
        text = processes.joined(commands)
        stored = _find(results.read_rows(path), text)
        if stored is None:
            minutes, seconds = divmod(int(time.monotonic() - start), 60)
            name = ", ".join([*row[:2], "/".join(map(str, row[2]))])
            print(
                f"row {number} of {len(chosen)}, {minutes}:{seconds:02d}: {name}", file=sys.stderr
            )
            stored = _measure(config, row, commands)
            measured += 1
            line = f"top-1 {stored['top1']}" if stored["status"] == "ok" else stored["status"]
            print(f"  {line}, {stored['seconds']} s", file=sys.stderr)
            others = [old for old in results.read_rows(path) if old["commands"] != text]
            results.write_rows(path, [*others, stored])
            stored = _find(results.read_rows(path), text, failed=True)
        found[row] = stored
    found = _with_earlier(config, results.read_rows(path), found)
    lines = report(config.table, found)
    print(results.table(lines, list(lines[0])) if lines else "nothing measured", file=sys.stderr)
    page_path = os.path.join(config.output_dir, f"dsq_table_{config.table}.md")
    files.save_bytes(page(config, lines, found).encode(), page_path)
    failed = [row["status"] for row in found.values() if row["status"] != "ok"]
    if failed:
        raise ValueError(f"{len(failed)} of {len(chosen)} rows failed, the first: {failed[0]}")
    return {
        "tool": "eval.dsq",
        "table": config.table,
        "rows": len(chosen),
        "measured": measured,
        "dataset": config.dataset,
        "output": page_path,
        "seconds": round(time.monotonic() - start, 3),
        "versions": results.versions(),
    }


def _chosen(config) -> dict[Row, Run]:
    """Returns the rows to measure."""
    rows = MEASURED[config.table]
    of_row = {
        "networks": lambda row: row[0],
        "methods": lambda row: row[1],
        "schemes": lambda row: rows[row][0],
    }
    kept = list(rows)
    for flag, value in of_row.items():
        text = getattr(config, flag)
        if text is None:
            continue
        allowed = list(dict.fromkeys(map(value, rows)))
        names = [name.strip() for name in text.split(";" if flag == "methods" else ",")]
        for name in names:
            if name not in allowed:
                raise ValueError(
                    f"--{flag}: {name!r} is none of table {config.table}'s: {'; '.join(allowed)}"
                )
        kept = [row for row in kept if value(row) in names]
    if rows and not kept:
        raise ValueError(f"table {config.table} has no row of all that was chosen")
    return {row: rows[row] for row in kept}


def _with_earlier(config, stored, found):
    """Returns the rows of a run, and those of the table that others measured under its schedule."""
    rows = {}
    for row, run in MEASURED[config.table].items():
        measured = found.get(row) or _find(
            stored, processes.joined(commands_of(config, row[0], run))
        )
        rows |= {} if measured is None else {row: measured}
    return rows


# --- measuring -----------------------------------------------------------------------------------


def commands_of(config: Config, network: str, run: Run) -> list[list[str]]:
    """Returns the commands that measure a row: float training, QAT, and of 8 bits the file's checks.

    Their folders are named by a digest of all that decides them.
    """
    scheme, quantizer = run
    model = network if config.model is None else networks.located(config.model, config.root)
    dataset = networks.located(config.dataset, config.root)
    data = [f"--dataset={dataset}"]
    if config.val_dataset is not None:
        data.append(f"--val_dataset={networks.located(config.val_dataset, config.root)}")
    data.append(f"--batch_size={config.batch_size}")
    data.append(f"--weight_decay={config.weight_decay:g}")
    if config.limit is not None:
        data.append(f"--limit={config.limit}")
    begin = [f"--model={model}"]
    begin += [] if config.preprocess is None else [f"--preprocess={config.preprocess}"]
    begin += [] if config.input_size is None else [f"--input_size={config.input_size}"]
    begin += [
        f"--float_epochs={config.float_epochs}",
        f"--float_learning_rate={config.float_learning_rate:g}",
        "--steps=1",
        "--scheme=w8a8",
    ]
    float_command = ["qat.train", *begin, *data]
    float_dir = processes.folder(config.work_dir, f"{network}_float", float_command)
    bits = [f"--scheme={scheme}"]
    bits += [] if scheme == "w8a8" else ["--ends=w8a8", "--additions=w8a8"]
    commands = [[*float_command, f"--output_dir={float_dir}"]]
    train = ["qat.train", f"--model={float_dir}/float.keras", *data, *bits]
    if config.recipe is not None:
        quantize = ["ptq.quantize", f"--model={float_dir}/float.keras", f"--dataset={dataset}"]
        quantize += bits
        quantize += [
            f"--recipe={config.recipe}",
            f"--calibration_images={config.calibration_images}",
        ]
        start = processes.folder(config.work_dir, f"{network}_{scheme}", quantize) + ".keras"
        commands.append([*quantize, f"--output={start}"])
        train += [f"--start={start}", "--optimizer=adam", "--rate_unit=step", "--warmup_steps=20"]
    train += [
        f"--quantizer={quantizer}",
        f"--learning_rate={config.learning_rate:g}",
        f"--freeze_batch_norm_step={config.freeze_batch_norm_step}",
        *(["--distill"] if config.distill else []),
    ]
    if config.select_images is not None:
        train += [f"--select_on={dataset}", f"--select_images={config.select_images}"]
    train.append(f"--epochs={config.epochs}" if config.steps is None else f"--steps={config.steps}")
    folder = processes.folder(config.work_dir, f"{network}_{scheme}_{quantizer}", train)
    commands.append([*train, f"--output_dir={folder}"])
    if scheme == "w8a8":
        images = networks.located(config.val_dataset or config.dataset, config.root)
        compare = ["eval.parity", f"--model={folder}/qat.keras", f"--dataset={images}"]
        compare += [] if config.val_dataset is not None else ["--split=validation"]
        commands += [
            ["export.tflite", f"--model={folder}/qat.keras", f"--output={folder}/model.tflite"],
            ["export.check", f"--model={folder}/model.tflite"],
            [*compare, "--limit=100", f"--output_dir={config.work_dir}"],
        ]
    return commands


def _find(rows, commands, failed=False):
    for row in rows:
        if row["commands"] == commands and (failed or row["status"] == "ok"):
            return row
    return None


def _measure(config, row, commands):
    """Runs a row's commands; returns what dsq.csv gets."""
    network, method, bits = row
    found = {
        "network": network,
        "method": method,
        "weight_bits": bits[0],
        "activation_bits": bits[1],
        "float_top1": None,
        "ptq_top1": None,
        "top1": None,
        "images": None,
        "steps": None,
        "training_seconds": None,
        "faults": None,
        "differing_codes": None,
        "keras_op_worst_lsb": None,
        "status": "ok",
        "seconds": 0.0,
        "peak_mib": 0,
        "commands": processes.joined(commands),
        "versions": results.versions(),
    }
    log = os.path.join(config.work_dir, "log.txt")
    try:
        for command, last in processes.run_all(commands, config.root, log, found):
            if command[0] == "qat.train":
                names = {"top1_float": "float_top1", "top1_ptq": "ptq_top1", "top1_qat": "top1"}
                names |= {name: name for name in ("images", "steps", "training_seconds")}
                found |= {ours: last[name] for name, ours in names.items()}
            elif command[0] == "export.check":
                found["faults"] = last["faults"]
            elif command[0] == "eval.parity":
                flavours = ("xnnpack", "reference")
                found["differing_codes"] = sum(last[f"simulator_{f}_differing"] for f in flavours)
                found["keras_op_worst_lsb"] = last["keras_op_worst_lsb"]
    except processes.StepFailedError as error:
        found["status"] = f"failed: {error}"
    return found


# --- showing -------------------------------------------------------------------------------------


def report(table: int, found: Mapping[Row, Mapping[str, str]]) -> list[dict[str, str]]:
    """Returns a line for each row of the paper's table, and below them for each of ours."""
    paper = dsq_published.TABLES.get(table, {})
    lines = []
    for row in dict.fromkeys([*paper, *found]):
        network, method, bits = row
        measured = found.get(row, {})
        floats = (
            [float(measured[k] or "nan") for k in ("float_top1", "ptq_top1", "top1")]
            if (measured.get("status") == "ok")
            else []
        )
        line = {
            "network": network,
            "method": method,
            "bits (weights/activations)": f"{bits[0]}/{bits[1]}",
            "paper": f"{paper[row][0]:.2f}" if row in paper else "-",
        }
        names = ("float", "before training", "measured")
        line |= {
            name: f"{100 * value:.2f}" if value == value else "-"
            for name, value in zip(names, floats or [float("nan")] * 3, strict=True)
        }
        line["minus float"] = f"{100 * (floats[2] - floats[0]):+.2f}" if floats else "-"
        hours = measured.get("training_seconds")
        line["hours"] = f"{float(hours) / 3600:.2f}" if hours else "-"
        for name in ("faults", "differing_codes", "keras_op_worst_lsb"):
            line[name.replace("_", " ")] = measured.get(name) or "-"
        lines.append(line)
    return lines


def page(
    config: Config, lines: Sequence[Mapping[str, str]], found: Mapping[Row, Mapping[str, str]]
) -> str:
    """Returns the table as a page of Markdown."""
    images = pathlib.Path(config.val_dataset or config.dataset).name
    text = [
        f"# DSQ, table {config.table}: {CAPTIONS[config.table]}",
        "",
        "Generated by `python -m eval.dsq`. *paper*: Gong et al., arXiv 1908.05033, as printed; the "
        f"other figures are measured on the validation images of {images}, percent, simulated in "
        "Keras, whose inference computes the kernels' codes. First and last layer have 8 bits, and so "
        "have the tensors around additions.",
        "",
    ]
    if config.table == 2:
        text += _alphas(config, found)
    else:
        text += results.markdown(lines, list(lines[0])) if lines else ["Nothing is measured."]
    text += ["", *processes.heading(found.values())]
    commands = processes.each_once(found.values())
    return "\n".join([*text, *(f"    {command}" for command in commands), ""])


def _alphas(config, found):
    """Returns the lines of table 2: what the last step of the run left."""
    ((row, measured),) = found.items()
    option = commands_of(config, row[0], MEASURED[2][row])[-1][-1]
    path = os.path.join(option.partition("=")[2], "alpha.csv")
    rows = results.read_rows(path)
    if not rows and measured["status"] == "ok":
        raise ValueError(
            f"{path}: the run's folder is gone, and with it its alphas; without its row in dsq.csv it "
            "is run again"
        )
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    learnt = {
        (layer, row["part"]): f"{float(row['alpha']):.4f}"
        for row in last
        for layer in layers_of(row)
    }
    lines = [
        {
            "layer": layer,
            "weights, paper": f"{weights:.4f}",
            "weights": learnt.get((layer, "weights"), "-"),
            "activations, paper": f"{activations:.4f}",
            "activations": learnt.get((layer, "activations"), "-"),
        }
        for layer, (weights, activations) in dsq_published.LEARNT_ALPHA.items()
    ]
    return results.markdown(lines, list(lines[0]))


def layers_of(row: Mapping[str, str]) -> list[str]:
    """Returns the layers that a row of alpha.csv is about: of activations those that read them."""
    return [row["layer"]] if row["part"] == "weights" else row["read_by"].split()


def main() -> None:
    """Runs the command line."""
    cli.run(tabulate, Config)


if __name__ == "__main__":
    main()
