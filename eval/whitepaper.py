"""The whitepaper's tables: its published figures beside those measured here, cell by cell.

    python -m eval.whitepaper --table=3 --dataset=images.zip --calibration=calibration.zip \\
        --networks=networks.toml
    python -m eval.whitepaper --table=3 --dataset='imagenet/validation-*' --crop=0.875 \\
        --calibration='imagenet/train-00000-of-01024'
    python -m eval.whitepaper --figure=3 ...       a picture of table 3's rows; 10: of 4's; 11: of 5's
    python -m eval.whitepaper --figure=20 --models=mobilenet_v1
    python -m eval.whitepaper --table=7 --device=adb ...      latency: see eval/table_7.py

Rows are networks (default: the paper's ten, with Keras' own weights), columns the paper's schemes and
some of ours.  Each cell runs ptq.quantize, export.tflite where an integer file can hold the scheme
(else Keras simulates it) and eval.accuracy, each in a process of its own so that its memory returns.
Its row, with the commands, goes to OUTPUT_DIR/whitepaper.csv at once: a second run measures only what
is missing there.  The table is written to OUTPUT_DIR/whitepaper_table_N.md.

Columns that train (tables 4 to 6) are measured where --training names images; labels are not looked
at, the float network is the teacher.  A cell that is killed goes on where it was; the trained model
and its curve stay in WORK_DIR.

A networks file is TOML; paths in it, in --models, --dataset and --calibration may start at --root:

    [[network]]
    row = "mobilenet_v1_1.0_224"                 # its name in the table
    paper = "Mobilenet_V1_1_224"                 # the paper's name, where it is the same network
    model = "models/mobilenet_v1_1.0_224.keras"  # or a zoo name, with weights, alpha, input_size
    preprocess = "tf"
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

from eval import networks, processes, published, table_7
from lowbit import cli, files, results, spec
from lowbit.data import datasets

# This process holds no TensorFlow (30 MB instead of 630): beside ResNet-152 it must be small.


@dataclasses.dataclass(frozen=True)
class Column:
    """How a column is measured: a scheme, and further flags of ptq.quantize."""

    scheme: str | None  # None: shown as published only
    options: tuple[str, ...] = ()
    value: str = "top1"  # which figure of the row the table shows
    training: tuple[str, ...] | None = None  # flags of qat.train, which goes on from the quantized
    # Measured where --columns names it, since not every network can be exported in its bits.
    named_only: bool = False


FLOAT = Column("float")
FAST, ACCURATE = ("--recipe=fast",), ("--recipe=accurate",)
ADAROUND = ("--corrections=clipping,regression,adaround,bias_empirical", "--calibrator=auto")
ENDS = "--ends=w8a8"
EQUALIZED = ("--corrections=equalization,bias_empirical", "--calibrator=auto")
# Of qat.train.  At 8 bits 200 steps took MobileNet-v1 0.25 from a mean KL to float of 0.0190 to 0.0171,
# on 400 calibration images that were left out; 100 are what 2 cores have time for.  At 4 bits
# freer settings undo what PTQ found (docs/qat.md): this is the mildest that was tried.
DISTILLED = (
    *("--distill", "--optimizer=adam", "--rate_unit=step", "--warmup_steps=20", "--batch_size=24"),
)
EIGHT_BITS = (*DISTILLED, "--range_mode=frozen", "--learning_rate=0.002", "--steps=100")
FOUR_BITS = (
    *(*DISTILLED, "--range_mode=frozen", "--quantizer=gains", "--learning_rate=0.001"),
    "--steps=100",
)
# Where training does not always help: the step is chosen on calibration images that neither PTQ nor
# training sees, PTQ's own figure being one of those to choose from.
SELECTED = ("--select_images=200",)
FOUR_BIT_ACTIVATIONS = (*DISTILLED, "--quantizer=lsq", "--learning_rate=0.01", "--epochs=1")
# With 4-bit weights that rate destroys what PTQ chose: a KL of 0.79 became 4.1 in 30 steps.
FOUR_BITS_BOTH = (
    *(*DISTILLED, "--quantizer=gains", "--learning_rate=0.003", "--epochs=1"),
    *SELECTED,
)
# The paper's columns in its order, then ours.
COLUMNS = {
    1: {"params_millions": Column("float", value="params_millions"), "float": FLOAT},
    2: {
        "asym_per_layer": Column("w8_per_tensor_asymmetric"),
        "sym_per_channel": Column("w8"),
        "asym_per_channel": Column("w8_asymmetric"),
        "float": FLOAT,
    },
    3: {
        "asym_per_layer": Column("w8a8_per_tensor_asymmetric"),
        "sym_per_channel": Column("w8a8"),
        "asym_per_channel": Column("w8a8_asymmetric"),
        "activation_only": Column("a8"),
        "float": FLOAT,
        "sym_per_channel_fast": Column("w8a8", FAST),
        "sym_per_channel_accurate": Column("w8a8", ACCURATE),
        "sym_per_layer": Column("w8a8_per_tensor"),
        "sym_per_layer_equalized": Column("w8a8_per_tensor", EQUALIZED),
        "sym_per_layer_accurate": Column("w8a8_per_tensor", ACCURATE),
    },
    4: {
        "asym_per_layer": Column("w8a8_per_tensor_asymmetric"),
        "sym_per_channel": Column("w8a8"),
        "asym_per_layer_qat": Column("w8a8_per_tensor_asymmetric", ACCURATE, training=EIGHT_BITS),
        "sym_per_channel_qat": Column("w8a8", FAST, training=EIGHT_BITS),
        "float": FLOAT,
        "sym_per_channel_fast": Column("w8a8", FAST),
        "sym_per_layer_accurate": Column("w8a8_per_tensor", ACCURATE),
        "sym_per_layer_qat": Column("w8a8_per_tensor", ACCURATE, training=(*EIGHT_BITS, *SELECTED)),
    },
    5: {
        "asym_per_layer": Column("w4a8_per_tensor_asymmetric"),
        "sym_per_channel": Column("w4a8"),
        "sym_per_channel_qat": Column("w4a8", ADAROUND, training=(*FOUR_BITS, *SELECTED)),
        "float": FLOAT,
        "sym_per_channel_accurate": Column("w4a8", ACCURATE),
        "sym_per_channel_adaround": Column("w4a8", ADAROUND),
    },
    6: {
        "sym_per_channel": Column("w8a4"),
        "sym_per_channel_qat": Column("w8a4", FAST, training=FOUR_BIT_ACTIVATIONS),
        "sym_per_channel_qat_w4a8": Column("w4a8", ADAROUND, training=(*FOUR_BITS, *SELECTED)),
        "float": FLOAT,
        # Every layer of a MobileNet-v1 but the last is behind a ReLU: these are exported.
        "sym_per_channel_ends": Column("w8a4", (*FAST, ENDS), named_only=True),
        "sym_per_channel_ends_qat": Column(
            "w8a4", (*FAST, ENDS), "top1", FOUR_BIT_ACTIVATIONS, True
        ),
        "sym_per_channel_ends_w4a4": Column("w4a4", (*ACCURATE, ENDS), named_only=True),
        "sym_per_channel_ends_qat_w4a4": Column(
            "w4a4", (*ACCURATE, ENDS), "top1", FOUR_BITS_BOTH, True
        ),
    },
}
# The paper's bars, by figure: of which table, which of its columns, and the picture's title.
BARS = {
    3: (
        3,
        ("float", "activation_only", "asym_per_channel", "sym_per_channel", "asym_per_layer"),
        "Post-training quantization by scheme",
    ),
    10: (
        4,
        (
            *("float", "sym_per_channel_fast", "sym_per_channel_qat"),
            *("sym_per_layer_accurate", "sym_per_layer_qat"),
        ),
        "8 bits, PTQ and QAT",
    ),
    11: (
        5,
        ("float", "sym_per_channel", "sym_per_channel_accurate", "sym_per_channel_qat"),
        "4-bit weights, PTQ and QAT",
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    table: int | None = cli.field(None, f"One of {', '.join(map(str, [*COLUMNS, 7]))}.")
    figure: int | None = cli.field(
        None,
        "3: accuracy by scheme, from the rows of table 3; 18, 19: SQNR of each kernel of a layer of "
        "a MobileNet-v1; 20: weights of one before and after folding.",
    )
    dataset: str | None = cli.field(
        None, "Images to measure on: a name or a path; not for figures 18 to 20."
    )
    calibration: str | None = cli.field(
        None, "Images to calibrate on: a name or a path; not needed for tables 1 and 2."
    )
    networks: str | None = cli.field(None, "A TOML file of networks; see above.")
    models: str | None = cli.field(
        None,
        "Comma list: rows of --networks; without it names of the paper, zoo names, .keras files. "
        "Default: all of --networks, or the paper's ten.",
    )
    columns: str | None = cli.field(None, "Comma list of the table's columns; default all.")
    weights: str = cli.field("imagenet", "For zoo names that say no weights of their own.")
    preprocess: str | None = cli.field(
        None, "For networks that say none, and whose files hold none."
    )
    root: str | None = cli.field(
        None, "Folder in which relative paths are looked for first; written $ROOT in the rows."
    )
    split: str | None = cli.field(
        None,
        "Which images of --dataset; default as in eval.accuracy.",
        choices=("train", "validation", "all"),
    )
    limit: int | None = cli.field(None, "Images to measure on, the first ones; default all.")
    crop: float = cli.field(
        1.0, "Central part of each image's sides; the paper's figures are with TF-slim's 0.875."
    )
    training: str | None = cli.field(
        None, "Images for the columns that train, from one source or several with commas between."
    )
    calibration_images: int = cli.field(100, "Images to calibrate on.")
    recipe_images: int | None = cli.field(
        None, "The same for columns with a recipe or correction; default --calibration_images."
    )
    recipe: str | None = cli.field(
        None,
        "Adds to each column that quantizes one with this recipe.",
        choices=("fast", "accurate"),
    )
    seed: int = cli.field(0, "Which calibration images are drawn.")
    device: str = cli.field("host", "Of table 7, the one of latencies.", choices=table_7.DEVICES)
    device_flags: str | None = cli.field(
        None, "Of table 7: further flags of eval.latency, in quotes: '--serial=X --cores=big'."
    )
    output_dir: str = cli.field("results", "Where whitepaper.csv and the tables go.")
    work_dir: str = cli.field(
        "runs/whitepaper", "Where quantized models, float outputs and log.txt lie meanwhile."
    )

    def __post_init__(self):
        if (self.table is None) == (self.figure is None):
            raise ValueError("one of --table and --figure is needed")
        if self.table is not None and self.table not in (*COLUMNS, 7):
            raise ValueError(
                f"--table={self.table} is not one of {', '.join(map(str, COLUMNS))}, 7"
            )
        if self.figure is not None and self.figure not in FIGURES:
            raise ValueError(f"--figure={self.figure} is not one of {', '.join(map(str, FIGURES))}")
        if self.dataset is None and self.figure not in WEIGHT_FIGURES and self.table != 7:
            raise ValueError("--dataset is needed: the images to measure on")
        if not 0 < self.crop <= 1:
            raise ValueError(f"--crop={self.crop}: the part that is seen is above 0, at most 1")
        for name in ("limit", "calibration_images", "recipe_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name}={value}: at least 1 image is needed")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of a table, and all that decides it."""

    table: int
    name: str  # of the column
    column: Column
    network: networks.Network
    identity: Mapping[str, str]  # the columns of the CSV that tell one measurement from another


# What decides a number; the names are columns of the CSV.
MODEL = ("model", "weights", "alpha", "input_size", "preprocess")
IDENTITY = (
    *(*MODEL, "scheme", "options", "runtime"),
    *("dataset", "split", "images", "crop"),
    *("calibration", "calibration_images", "seed", "training", "training_options", "versions"),
)
# What the steps of a cell that trains measure beyond accuracy: {tool: {its column: ours}}.
FURTHER = {
    "qat.train": {name: name for name in ("steps", "selected_step", "training_seconds")},
    "export.check": {"faults": "faults"},
    "eval.parity": {
        "images": "parity_images",
        "simulator_xnnpack_differing": "xnnpack_differing",
        "simulator_reference_differing": "reference_differing",
        "keras_op_worst_lsb": "keras_op_worst_lsb",
    },
}


def tabulate(config: Config) -> dict:
    """Runs the command; returns its result row.

    Raises:
      ValueError: for bad input at once, and at the end where cells failed.
    """
    start = time.monotonic()
    networks.check_root(config.root)
    if config.figure is not None:
        return FIGURES[config.figure](config)
    if config.table == 7:
        return table_7.tabulate(config)
    path = os.path.join(config.output_dir, "whitepaper.csv")
    plan = cells(config, config.table, columns_of(config), networks.chosen(config))
    os.makedirs(config.output_dir, exist_ok=True)
    os.makedirs(config.work_dir, exist_ok=True)
    measured, broken = 0, {}
    for number, cell in enumerate(plan, 1):
        stored = results.read_rows(path)
        if find(stored, cell, in_table=True):
            continue
        same = find(stored, cell)
        if same is None:
            minutes, seconds = divmod(int(time.monotonic() - start), 60)
            print(
                f"cell {number} of {len(plan)}, {minutes}:{seconds:02d}: {cell.network.row}, "
                f"{cell.name} ({_means(cell.column)})",
                file=sys.stderr,
            )
            same = measure(config, cell, broken)
            measured += 1
            line = f"top-1 {same['top1']:.4f}" if same["status"] == "ok" else same["status"]
            print(f"  {line}, {same['seconds']} s", file=sys.stderr)
        store(path, cell, same)
    stored = results.read_rows(path)
    rows = [find(stored, cell, in_table=True, failed=True) for cell in plan]
    print(results.table(*report(plan, rows)), file=sys.stderr)
    page_path = os.path.join(config.output_dir, f"whitepaper_table_{config.table}.md")
    files.save_bytes(page(config, shown(stored, plan)).encode(), page_path)
    failed = [row for row in rows if row["status"] != "ok"]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(plan)} cells failed, the first: {failed[0]['network']}, "
            f"{failed[0]['column']}: {failed[0]['status']} (all: {path}; log: "
            f"{config.work_dir}/log.txt)"
        )
    return {
        "tool": "eval.whitepaper",
        "table": config.table,
        "networks": len({cell.network.row for cell in plan}),
        "cells": len(plan),
        "measured": measured,
        "dataset": config.dataset,
        "images": int(plan[0].identity["images"]),
        "output": page_path,
        "seconds": round(time.monotonic() - start, 3),
        "versions": results.versions(),
    }


# What there is to measure


def columns_of(config: Config) -> dict[str, Column]:
    """Returns the columns of the config's table, in order."""
    columns = dict(COLUMNS[config.table])
    if config.recipe is not None:
        for name, column in COLUMNS[config.table].items():
            if column.scheme not in (None, "float") and not column.options:
                changed = dataclasses.replace(column, options=(f"--recipe={config.recipe}",))
                columns.setdefault(f"{name}_{config.recipe}", changed)
    if config.columns is None:
        return {name: column for name, column in columns.items() if not column.named_only}
    return {
        name: columns[name]
        for name in networks.picked(config.columns, columns, "--columns", "columns")
    }


def cells(
    config: Config, table: int, columns: Mapping[str, Column], rows: Sequence[networks.Network]
) -> list[Cell]:
    """Returns the cells to measure, the float one of each network first.

    Raises:
      ValueError, FileNotFoundError: where the images are not there.
    """
    dataset = networks.located(config.dataset, config.root)
    split = config.split or datasets.default_split(dataset)
    images = len(datasets.open_dataset(networks.real(dataset, config.root), split))
    chosen = {
        name: column
        for name, column in columns.items()
        if column.scheme is not None and (column.training is None or config.training is not None)
    }
    if not chosen:
        raise ValueError(f"--columns={config.columns}: nothing to measure, these need --training")
    training = None
    if config.training is not None:
        sources = networks.split(config.training, "--training")
        training = ",".join(networks.located(source, config.root) for source in sources)
        datasets.open_pictures(networks.real(training, config.root), "train_whole")
    calibration, available = None, 0
    if config.calibration is not None:
        calibration = networks.located(config.calibration, config.root)
        available = len(datasets.open_dataset(networks.real(calibration, config.root), "all"))
    else:
        for name, column in chosen.items():
            if _needs_images(column):
                raise ValueError(f"column {name} calibrates: give --calibration")
    versions = json.dumps(results.versions())
    plan = []
    for network in rows:
        for name, column in chosen.items():
            identity = {
                **{field: getattr(network, field) for field in MODEL},
                "scheme": column.scheme,
                "options": " ".join(column.options),
                "runtime": "litert" if _is_exported(column) else "keras",
                "dataset": dataset,
                "split": split,
                "images": min(config.limit or images, images),
                "crop": config.crop,
                "versions": versions,
            }
            if _needs_images(column):
                count = config.recipe_images if column.options else None
                identity |= {
                    "calibration": calibration,
                    "calibration_images": min(count or config.calibration_images, available),
                    "seed": config.seed,
                }
            if column.training is not None:
                identity |= {"training": training, "training_options": " ".join(column.training)}
            text = {
                field: "" if identity.get(field) is None else str(identity[field])
                for field in IDENTITY
            }
            plan.append(Cell(table, name, column, network, text))
    return sorted(plan, key=lambda cell: (rows.index(cell.network), cell.column.scheme != "float"))


def _needs_images(column):
    if column.scheme == "float":
        return False
    return bool(column.options) or spec.scheme(column.scheme).activations is not None


def _is_exported(column):
    if column.scheme == "float":
        return False
    scheme = spec.scheme(column.scheme)
    return ENDS in column.options or (
        scheme.activations is not None and spec.why_simulated_only(scheme) is None
    )


def _means(column):
    return " ".join([column.scheme, *column.options, *(column.training or ())])


# Rows


def find(
    rows: Sequence[Mapping[str, str]], cell: Cell, in_table: bool = False, failed: bool = False
) -> Mapping[str, str] | None:
    """Returns the row of a measurement, or None.

    Args:
      rows: of whitepaper.csv.
      cell: what is looked for.
      in_table: the row must be of the cell's own table and column; else the same measurement for
        another table will do.
      failed: whether a measurement that failed counts.
    """
    for row in rows:
        if any(row.get(name, "") != value for name, value in cell.identity.items()):
            continue
        if in_table and not _at(row, cell):
            continue
        if row.get("status") == "ok" or failed:
            return row
    return None


def store(path: str, cell: Cell, row: Mapping) -> None:
    """Puts a row into the CSV as the cell's, in place of an earlier one of the same measurement."""
    rows = [
        other
        for other in results.read_rows(path)
        if not _at(other, cell) or find([other], cell, failed=True) is None
    ]
    shown = published.TABLES[cell.table].figure(cell.network.paper, cell.name)
    place = {
        "table": cell.table,
        "column": cell.name,
        "network": cell.network.row,
        "paper": cell.network.paper,
        "published": shown,
    }
    results.write_rows(path, [*rows, {**place, **{k: v for k, v in row.items() if k not in place}}])


def _at(row, cell):
    place = (str(cell.table), cell.name, cell.network.row)
    return (row.get("table"), row.get("column"), row.get("network")) == place


# Measuring


@dataclasses.dataclass(frozen=True)
class Step:
    """A command, and the file by which a cell that was interrupted knows that it has run."""

    command: Sequence[str]
    makes: str | None = None


@dataclasses.dataclass(frozen=True)
class Steps:
    """The commands of a cell."""

    outputs: str  # file of the network's float outputs, all its cells' reference
    float_command: Sequence[str]  # that writes it
    further: Sequence[Step] = ()
    made: Sequence[str] = ()  # files that go when the cell is measured

    def commands(self) -> list[Sequence[str]]:
        return [self.float_command, *(step.command for step in self.further)]


def measure(config: Config, cell: Cell, broken: dict[str, str]) -> dict:
    """Runs a cell's commands; returns its row, whose `status` is "ok" or says what failed.

    Args:
      broken: network: what failed, where its float model cannot be measured; added to.
    """
    plan = steps(config, cell)
    row = {
        "top1": None,
        "top1_standard_error": None,
        "top1_difference": None,
        "top1_paired_error": None,
        "mean_kl": None,
        "agreement": None,
        "parameters": None,
        "size_bytes": None,
        **cell.identity,
        "status": "ok",
        "seconds": 0.0,
        "peak_mib": 0,
        "commands": processes.joined(plan.commands()),
    }
    name, log = cell.network.row, os.path.join(config.work_dir, "log.txt")
    try:
        if name in broken:
            raise processes.StepFailedError(broken[name])
        last = None
        # The float outputs are the reference of all cells of a network: computed once.
        if not plan.further or not os.path.exists(plan.outputs):
            try:
                last, seconds, peak = processes.run(plan.float_command, config.root, log)
            except processes.StepFailedError as error:
                broken[name] = f"float: {error}"
                raise
            if not plan.further:
                row |= {"seconds": seconds, "peak_mib": peak}
        for step in plan.further:
            if step.makes is not None and os.path.exists(step.makes):
                continue
            last, seconds, peak = processes.run(step.command, config.root, log)
            row |= {"seconds": row["seconds"] + seconds, "peak_mib": max(row["peak_mib"], peak)}
            names = FURTHER.get(step.command[0], {}) if cell.column.training is not None else {}
            row |= {ours: last[name] for name, ours in names.items()}
        if last["images"] != int(cell.identity["images"]):
            raise processes.StepFailedError(f"{last['images']} images were measured")
        wanted = [key for key, value in row.items() if value is None]
        row |= {key: last.get(key) for key in wanted}
        if plan.further:
            row["parameters"] = None  # the quantizers' variables are no parameters of the network
    except processes.StepFailedError as error:
        row["status"] = f"failed: {error}"
    finally:
        for path in plan.made:
            pathlib.Path(path).unlink(missing_ok=True)
    row["seconds"] = round(row["seconds"], 1)
    return row


def steps(config: Config, cell: Cell) -> Steps:
    """Returns the commands of a cell: modules and their flags, with $ROOT where --root stands."""
    network, identity = cell.network, cell.identity
    model = [f"--{name}={identity[name]}" for name in MODEL if identity[name]]
    images = [f"--dataset={identity['dataset']}", f"--split={identity['split']}"]
    if config.limit is not None:
        images.append(f"--limit={config.limit}")
    if config.crop != 1:
        images.append(f"--crop={config.crop}")
    images.append(f"--output_dir={config.work_dir}")
    # A name of its own for all that decides the float outputs.
    further = ("dataset", "split", "images", "crop", "versions")
    digest = _digest(identity, (*MODEL, *further))
    outputs = f"{config.work_dir}/{network.row}.float.{digest}.npz"
    float_command = ["eval.accuracy", *model, *images, f"--save_outputs={outputs}"]
    if cell.column.scheme == "float":
        return Steps(outputs, float_command)
    chosen = "".join("." + option.partition("=")[2] for option in cell.column.options)
    stem = f"{config.work_dir}/{network.row}.{cell.column.scheme}{chosen.replace(',', '+')}"
    if cell.column.training is not None:
        stem = f"{stem}.{_digest(identity, IDENTITY)}"
    quantized = f"{stem}.keras"
    quantize = ["ptq.quantize", *model, f"--scheme={cell.column.scheme}", *cell.column.options]
    if identity["calibration"]:
        quantize += [
            f"--dataset={identity['calibration']}",
            f"--calibration_images={identity['calibration_images']}",
            f"--seed={identity['seed']}",
        ]
    else:
        quantize.append(f"--dataset={identity['dataset']}")  # of which it reads no image
    quantize.append(f"--output={quantized}")
    file, made = f"{stem}.tflite", [quantized]
    convert = Step(["export.tflite", f"--model={quantized}", f"--output={file}"])
    if cell.column.training is None:
        commands = [Step(quantize)]
        if identity["runtime"] == "litert":
            commands.append(convert)
    else:
        made = []  # hours of work
        quantized, start = f"{stem}/qat.keras", quantized
        train = ["qat.train", *model, f"--scheme={cell.column.scheme}", f"--start={start}"]
        train += [f"--dataset={identity['training']}", f"--val_dataset={identity['dataset']}"]
        bits = tuple(f"--{name}=" for name in spec.BITS_FLAGS)
        train += [option for option in cell.column.options if option.startswith(bits)]
        train += cell.column.training
        if any(option.startswith("--select_images=") for option in cell.column.training):
            # Drawn with the seed of the calibration, they are others than it saw.
            train += [f"--select_on={identity['calibration']}", f"--seed={identity['seed']}"]
        train += [f"--output_dir={stem}", "--limit=100"]
        commands = [Step(quantize, makes=start), Step(train)]
        if identity["runtime"] == "litert":
            convert.command[1] = f"--model={quantized}"
            compare = ["eval.parity", f"--model={quantized}", f"--dataset={identity['dataset']}"]
            compare += [f"--split={identity['split']}", "--limit=20"]
            commands += [
                convert,
                Step(["export.check", f"--model={file}"]),
                Step([*compare, f"--output_dir={config.work_dir}"]),
            ]
    if identity["runtime"] == "litert":
        quantized = file
        made.append(file)
    commands.append(
        Step(["eval.accuracy", f"--model={quantized}", *images, f"--reference={outputs}"])
    )
    return Steps(outputs, float_command, commands, made)


def _digest(identity, names):
    decides = json.dumps([identity[name] for name in names])
    return hashlib.sha256(decides.encode()).hexdigest()[:8]


# Showing


def shown(stored: Sequence[Mapping[str, str]], plan: Sequence[Cell]) -> list[Mapping[str, str]]:
    """Returns the rows of the plan's table that were measured on its images, by whatever run.

    A cell of the plan is as the plan means it, another as it was measured last; of two models of one
    name the plan's counts, or the one measured last.  Rows are ordered by network, then as the table's
    columns.
    """
    table, identity = plan[0].table, plan[0].identity
    alike = ("dataset", "split", "images", "crop", "versions")
    measured = [
        row
        for row in stored
        if row["table"] == str(table)
        and row["status"] == "ok"
        and all(row.get(name) == identity[name] for name in alike)
    ]
    models = {row["network"]: _model(row) for row in measured}
    models |= {cell.network.row: _model(cell.identity) for cell in plan}
    found = {
        (row["network"], row["column"]): row
        for row in measured
        if _model(row) == models[row["network"]]
    }
    for cell in plan:
        found[cell.network.row, cell.name] = find(stored, cell, in_table=True, failed=True)
    names = list(dict.fromkeys([*COLUMNS[table], *(column for _, column in found)]))
    rows = list(dict.fromkeys(network for network, _ in found))
    return sorted(
        found.values(), key=lambda row: (rows.index(row["network"]), names.index(row["column"]))
    )


def _model(row):
    return [row.get(name, "") for name in MODEL]


def report(
    plan: Sequence[Cell], rows: Sequence[Mapping[str, str]]
) -> tuple[list[dict[str, str]], list[str]]:
    """Returns (rows, column names) for a terminal: a line for each cell."""
    lines = []
    for cell, row in zip(plan, rows, strict=True):
        line = {
            "network": cell.network.row,
            "column": cell.name,
            "paper": row["published"] or "-",
            "measured": _figure(row),
        }
        names = ("top1_difference", "top1_paired_error", "mean_kl", "runtime", "images", "seconds")
        lines.append(line | {name: _detail(name, row[name]) for name in names})
    return lines, list(lines[0])


def overview(
    table: int, rows: Sequence[Mapping[str, str]]
) -> tuple[list[dict[str, str]], list[str]]:
    """Returns (rows, column names) as in the paper: a network each, published beside measured."""
    paper = published.TABLES[table]
    found = {(row["network"], row["column"]): row for row in rows}
    titles = ["network"]
    lines = {row["network"]: {"network": row["network"]} for row in rows}
    in_paper = {row["network"]: row["paper"] or None for row in rows}
    for name in dict.fromkeys([*COLUMNS[table], *(row["column"] for row in rows)]):
        is_measured = any(key[1] == name for key in found)
        titles += [f"{name}, paper"] * (name in paper.columns) + [name] * is_measured
        for network, line in lines.items():
            figure = paper.figure(in_paper[network], name)
            line[f"{name}, paper"] = "-" if figure is None else str(figure)
            line[name] = _figure(found[network, name]) if (network, name) in found else "-"
    for row in rows:
        lines[row["network"]]["images"] = f"{row['images']} of {pathlib.Path(row['dataset']).name}"
    return list(lines.values()), [*titles, "images"]


def _figure(row):
    if row["status"] != "ok":
        return "failed"
    column = COLUMNS[int(row["table"])].get(row["column"])  # None of one that --recipe added
    if column is not None and column.value == "params_millions":
        return f"{int(row['parameters']) / 1e6:.2f}"
    return f"{float(row['top1']):.3f}"


DETAILS = {
    "network": "network",
    "column": "column",
    "scheme": "scheme",
    "options": "options",
    "calibration_images": "calibrated on",
    "runtime": "runtime",
    "top1": "top-1",
    "top1_difference": "minus float",
    "top1_paired_error": "paired error",
    "mean_kl": "mean KL to float",
    "agreement": "agreement",
    "images": "images",
    "seconds": "seconds",
    "peak_mib": "peak MiB",
    "status": "status",
}


def page(config: Config, rows: Sequence[Mapping[str, str]]) -> str:
    """Returns the table as a page of Markdown: figures, details, commands."""
    first = rows[0]
    cropped = "" if config.crop == 1 else f", the central {config.crop:g} of each side"
    lines = [
        f"# Table {config.table}: {published.TABLES[config.table].caption}",
        "",
        "Generated by `python -m eval.whitepaper`. *paper*: Krishnamoorthi, arXiv 1806.08342, top-1 on "
        "ImageNet's 50,000 validation images, simulated. The other figures are measured, on "
        f"{first['images']} images of {pathlib.Path(first['dataset']).name}{cropped}: in the LiteRT "
        "interpreter (litert) where an integer file can hold the scheme, else simulated in Keras. "
        "Other images than the paper's make other absolute figures: compare with the float column.",
        "",
        *results.markdown(*overview(config.table, rows)),
        "",
        "*minus float* is paired, image by image, with its standard error; KL in nats; *seconds* and "
        "*peak MiB* are of quantizing, export and measuring, without the float reference.",
        "",
        *results.markdown(
            [{title: _detail(name, row[name]) for name, title in DETAILS.items()} for row in rows],
            list(DETAILS.values()),
        ),
        "",
        *processes.heading(rows),
    ]
    commands: dict[str, dict[str, None]] = {}  # of each network, each once
    for row in rows:
        known = commands.setdefault(row["network"], {})
        known |= dict.fromkeys(processes.each_once([row]))
    for network, known in commands.items():
        lines += [f"{network}:", "", *(f"    {command}" for command in known), ""]
    return "\n".join(lines)


def _detail(name, value):
    if value == "":
        return "-"
    places = {"top1": 4, "top1_difference": 4, "top1_paired_error": 4, "agreement": 4, "mean_kl": 5}
    if name in places:
        return f"{float(value):.{places[name]}f}"
    return value.replace("|", "\\|")


# Figures


def draw_bars(config: Config) -> dict:
    """Draws the accuracy of some columns of a table for each network, from the rows that are there.

    Raises:
      ValueError: where there is none.
    """
    from lowbit import plots  # matplotlib takes a second to import

    table, names, title = BARS[config.figure]
    columns = {name: COLUMNS[table][name] for name in names}
    plan = cells(config, table, columns, networks.chosen(config))
    stored = results.read_rows(os.path.join(config.output_dir, "whitepaper.csv"))
    groups: dict[str, dict[str, float]] = {}
    for cell in plan:
        row = find(stored, cell)
        if row is None:
            print(f"not measured: {cell.network.row}, {cell.name}", file=sys.stderr)
        else:
            groups.setdefault(cell.network.row, {})[cell.name] = float(row["top1"])
    if not groups:
        raise ValueError(
            f"{config.output_dir}/whitepaper.csv has no row for this figure: run --table={table} "
            "with the same flags first"
        )
    path = os.path.join(config.output_dir, f"whitepaper_figure_{config.figure}.png")
    images, data = plan[0].identity["images"], pathlib.Path(config.dataset).name
    plots.grouped_bars(
        groups,
        [name for name in names if any(name in group for group in groups.values())],
        path,
        title=f"{title}, {images} images of {data}",
        label="top-1",
    )
    return {
        "tool": "eval.whitepaper",
        "figure": config.figure,
        "networks": len(groups),
        "bars": sum(map(len, groups.values())),
        "dataset": config.dataset,
        "images": int(images),
        "output": path,
        "versions": results.versions(),
    }


# The network that the paper draws.
WEIGHT_FIGURES = {
    18: "Mobilenet_V1_0.25_128",
    19: "Mobilenet_V1_0.25_128",
    20: "Mobilenet_V1_1_224",
}


def draw_weights(config: Config) -> dict:
    """Draws Figure 18, 19 or 20 of one network, a MobileNet-v1.

    Raises:
      ValueError: where --networks and --models name several.
    """
    if config.networks is None and config.models is None:
        config = dataclasses.replace(config, models=WEIGHT_FIGURES[config.figure])
    found = networks.chosen(config)
    if len(found) != 1:
        raise ValueError(
            f"--figure={config.figure} draws one network: give --models, one of "
            f"{', '.join(network.row for network in found)}"
        )
    from eval import layers  # these two bring TensorFlow
    from lowbit import models

    (network,) = found
    weights = None if network.weights is None else networks.real(network.weights, config.root)
    model, _ = models.load(
        networks.real(network.model, config.root),
        weights,
        input_size=network.input_size,
        alpha=network.alpha,
    )
    os.makedirs(config.output_dir, exist_ok=True)
    path = os.path.join(config.output_dir, f"whitepaper_figure_{config.figure}.png")
    layers.draw_figure(config.figure, model, path)
    return {
        "tool": "eval.whitepaper",
        "figure": config.figure,
        "model": network.model,
        "output": path,
        "versions": results.versions(),
    }


FIGURES = {**dict.fromkeys(BARS, draw_bars), **dict.fromkeys(WEIGHT_FIGURES, draw_weights)}


def main() -> None:
    """Runs the command line."""
    cli.run(tabulate, Config)


if __name__ == "__main__":
    main()
