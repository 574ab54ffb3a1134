"""Conformance: every layer in every precision, and random networks, in codes against the kernels.

    python -m eval.conformance                    the table: layer x precision
    python -m eval.conformance --models=500       random networks of these layers
    python -m eval.conformance --micro            TensorFlow Lite Micro too, at w8a8

Each piece of `layer_cases` stands between two convolutions, with random weights.  Integer precisions:
the codes of each operation, simulator against interpreter, XNNPACK and BUILTIN_REF.  The others: the
largest difference between the file's outputs and Keras', in parts of their spread.  Random networks
chain pieces, with sums and concatenations of branches; one of whose tensors has fewer than 16 codes
is drawn again, and one that differs is cut down to the fewest pieces that still differ, and printed
with the command that builds it again.
"""

import collections
import dataclasses
import os
import time
from collections.abc import Sequence

import keras
import numpy as np

from eval import layer_cases, parity
from lowbit import (
    calibration,
    cli,
    extension,
    files,
    integer_graph,
    lint,
    lowering,
    manifest,
    micro,
    placement,
    progress,
    results,
    runtimes,
    spec,
    tflite_file,
)
from lowbit.functional import UnsupportedModelError
from lowbit.kernels import delegate

L = keras.layers
# name: (scheme, how weights are held)
PRECISIONS = {
    "w8a8": ("w8a8", lowering.Storage()),
    "w4a8": ("w4a8", lowering.Storage()),
    "w4a8 packed": ("w4a8", lowering.Storage(packed=True)),
    "w8a16": ("w8a16", lowering.Storage()),
    "w8": ("w8", lowering.Storage()),
    "dynamic": ("dynamic", lowering.Storage(dynamic=True)),
    "float16": ("float16", lowering.Storage(float16=True)),
    "float32": ("float32", lowering.Storage()),
}
MICRO_COLUMN = "w8a8 in TensorFlow Lite Micro"
SMALLEST = 4  # pixels on a side: a random network ends before a piece that would leave fewer
IMAGES = 8
DRAWS = 20  # of a random network, until all its tensors have 16 codes or more; then a piece less


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    models: int = cli.field(0, "Random networks; 0: the table of layers instead.")
    cases: str | None = cli.field(
        None, "Of layer_cases, separated by semicolons: only these; with --models=1 one network."
    )
    seed: int = cli.field(0, "Of weights, images and random networks.")
    output_dir: str = cli.field("results", "Where rows go.")
    micro: bool = cli.field(
        False, "Also TensorFlow Lite Micro at w8a8 (pip install 'lowbit[micro]')."
    )
    page: str | None = cli.field(
        None, "Where the table goes, as Markdown; default: conformance.md beside the rows."
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A random network: the pieces in order, and how it is put together."""

    cases: tuple[str, ...]
    size: tuple[int, int]
    channels: int
    seed: int


def check(config: Config) -> dict:
    """Runs the command; returns its result row.

    Raises:
      ValueError: for an unknown case, or where codes differ.
    """
    start = time.monotonic()
    known = known_cases()
    names = list(known)
    if config.cases is not None:
        names = [name.strip() for name in config.cases.split(";")]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"--cases: {unknown[0]!r} is none of {'; '.join(known)}")
    if config.micro:
        micro.check_installed()
    row = table(names, config) if config.models == 0 else random_networks(names, config)
    row |= {"seconds": round(time.monotonic() - start, 1), "versions": manifest.versions()}
    if row["first"]:
        raise ValueError(
            f"{row['differing']} codes differ and {row.get('faults', 0)} faults, the first in "
            f"{row['first']}"
        )
    if row.get("micro_differing"):
        text = f"{row['micro_differing']} codes differ from TensorFlow Lite Micro's"
        raise ValueError(f"{text}: {row['micro_ops']}")
    return row


def known_cases() -> dict:
    """Returns layer_cases.CASES, and those of the extensions."""
    return layer_cases.CASES | extension.cases()


# --- the table ----------------------------------------------------------------------------------


def table(names: Sequence[str], config: Config) -> dict:
    """Measures each case in each precision; returns the result row, and writes rows and the page."""
    rows = []
    with progress.bar("cases", len(names)) as update:
        for number, name in enumerate(names, 1):
            random = np.random.default_rng(config.seed)
            plan = Plan((name,), (11, 9), 5, config.seed)
            images = smooth_images(random, IMAGES, *plan.size)
            model, _ = build(plan)
            for precision in PRECISIONS:
                also = config.micro and precision == "w8a8"
                rows.append({"case": name} | measure(model, images, precision, also))
            update(number, name)
    results.write_rows(os.path.join(config.output_dir, "conformance.csv"), rows)
    path = config.page or os.path.join(config.output_dir, "conformance.md")
    files.save_bytes(page(rows).encode(), path)
    wrong = [row for row in rows if row["differing"] or row["faults"]]
    return {
        "tool": "eval.conformance",
        "cases": len(names),
        "precisions": len(PRECISIONS),
        "codes": sum(row["codes"] for row in rows),
        "differing": sum(row["differing"] for row in rows),
        "first": f"{wrong[0]['case']}, {wrong[0]['precision']}" if wrong else None,
        "faults": sum(row["faults"] for row in rows),
        "refused": sum(bool(row["refused"]) for row in rows),
        **_micro_total(rows),
    }


def measure(
    model: keras.Model, images: np.ndarray, precision: str, with_micro: bool = False
) -> dict:
    """Returns what one network does in one precision, in both interpreters, or in all three."""
    scheme, storage = PRECISIONS[precision]
    row = {"precision": precision, "codes": 0, "differing": 0, "keras_lsb": None, "error": None}
    row |= {"refused": "", "reference": "", "faults": 0}
    try:
        placed = placement.place(model, spec.scheme(scheme))
        if calibration.observed_points(placed):
            calibration.calibrate(placed, np.split(images, 2))
        graph = lowering.lower(placed, "", storage)
    except UnsupportedModelError as error:
        return row | {"refused": str(error)}
    content = tflite_file.write(graph, {"scheme": scheme})
    row["faults"] = len(lint.faults(content))
    expected = np.asarray(placed(images))  # eager: to compile it would take most of the time
    outputs = graph.tensors[graph.outputs[0]]
    for flavour in runtimes.KERNELS:
        try:
            found = np.concatenate(list(runtimes.run_litert(content, [images], flavour, 1)))
        except ValueError as error:
            row["refused" if flavour == "xnnpack" else "reference"] = str(error)
            continue
        difference = np.abs(found - expected.reshape(found.shape)).max()
        if outputs.quantization is None:
            row["error"] = max(row["error"] or 0, float(difference / np.ptp(expected)))
            continue
        if flavour == "xnnpack":
            row["keras_lsb"] = int(np.rint(difference / outputs.scale))
        nodes = _compared(graph, images, flavour)
        row["codes"] += sum(node["codes"] for node in nodes)
        row["differing"] += sum(node["differing"] for node in nodes)
        row["least_distinct"] = min(
            row.get("least_distinct", 2**16), *(node["distinct"] for node in nodes)
        )
    return row | (_in_micro(graph, images) if with_micro else {})


def flavours(graph: integer_graph.IntegerGraph) -> list[str]:
    """Returns the interpreters that have a kernel for every node; BUILTIN_REF has no ELU."""
    return [
        flavour
        for flavour in runtimes.KERNELS
        if all(delegate.placement_of(graph, node, flavour)[0] != "refused" for node in graph.nodes)
    ]


def _compared(graph, images, flavour):
    tensor = graph.tensors[graph.inputs[0]]
    codes = runtimes.input_codes(images, tensor.dtype, tensor.scale, tensor.zero_point)
    return parity.compare_nodes(graph, codes, flavour)


def _in_micro(graph, images):
    """Returns how the simulator's codes differ from TensorFlow Lite Micro's, and where."""
    row = {"micro_codes": 0, "micro_differing": 0, "micro_ops": {}, "micro_refused": ""}
    try:
        nodes = _compared(graph, images, "micro")
    except ValueError as error:  # the interpreter refuses, or its arithmetic is undefined
        return row | {"micro_refused": str(error)}
    for node in nodes:
        row["micro_codes"] += node["codes"]
        row["micro_differing"] += node["differing"]
        if node["differing"]:
            row["micro_ops"][node["op"]] = row["micro_ops"].get(node["op"], 0) + node["differing"]
    return row


def _micro_total(rows):
    """Returns the sums of the rows' micro columns, nothing where there are none."""
    rows = [row for row in rows if "micro_codes" in row]
    if not rows:
        return {}
    counts = sum((collections.Counter(row["micro_ops"]) for row in rows), collections.Counter())
    return {
        "micro_codes": sum(row["micro_codes"] for row in rows),
        "micro_differing": sum(row["micro_differing"] for row in rows),
        "micro_ops": dict(counts),
        "micro_refused": sum(bool(row["micro_refused"]) for row in rows),
        "micro_version": micro.version(),
    }


def page(rows: Sequence[dict]) -> str:
    """Returns the table as Markdown, with the reasons of refusals below it."""
    reasons: dict[str, int] = {}

    def cell(row):
        if row["refused"]:
            return f"refused [{reasons.setdefault(row['refused'], len(reasons) + 1)}]"
        note = ""
        if row["reference"]:
            note = f" [{reasons.setdefault(row['reference'], len(reasons) + 1)}]"
        if row["error"] is not None:
            return f"{row['error']:.0e}{note}"
        return f"{row['differing']} of {row['codes']}{note}"

    def micro_cell(row):
        if row["micro_refused"]:
            return f"refused [{reasons.setdefault(row['micro_refused'], len(reasons) + 1)}]"
        named = "".join(f", {op} {count}" for op, count in row["micro_ops"].items())
        return f"{row['micro_differing']} of {row['micro_codes']}{named}"

    by_case = collections.defaultdict(dict)
    for row in rows:
        by_case[row["case"]][row["precision"]] = cell(row)
        if "micro_codes" in row:
            by_case[row["case"]][MICRO_COLUMN] = micro_cell(row)
    columns = [*PRECISIONS, *([MICRO_COLUMN] if any("micro_codes" in row for row in rows) else [])]
    head = ["layer", *columns]
    lines = [
        "# Every layer in every precision",
        "",
        "Made by `python -m eval.conformance`. Integer precisions: codes that differ of codes "
        "compared, all operations, simulator against the default interpreter (XNNPACK) and "
        "BUILTIN_REF. Precisions that compute in float: the largest difference to Keras, in parts of "
        "the outputs' spread. A number in brackets names what an interpreter or the exporter refuses. "
        "With `--micro` a last column: the same against TensorFlow Lite Micro.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for case, cells in by_case.items():
        lines.append(f"| {case} | {' | '.join(cells.get(name, '') for name in columns)} |")
    lines.append("")
    lines += [f"[{number}] {' '.join(text.split())}  " for text, number in reasons.items()]
    return "\n".join(lines) + "\n"


# --- random networks ----------------------------------------------------------------------------


def random_networks(names: Sequence[str], config: Config) -> dict:
    """Compares random networks; returns the result row, and writes one row a network."""
    random = np.random.default_rng(config.seed)
    rows, first = [], None
    with progress.bar("networks", config.models) as update:
        for number, plan in enumerate(plans(names, config, random), 1):
            plan, row = drawn(plan, config.micro)
            if row["differing"] and first is None:
                smallest = shrunk(plan)
                first = (
                    f"--models=1 --seed={smallest.seed} --cases='{'; '.join(smallest.cases)}' "
                    f"(size {smallest.size}, {smallest.channels} channels)"
                )
            rows.append(row)
            update(number, f"{sum(row['differing'] for row in rows)} codes differ")
    results.write_rows(os.path.join(config.output_dir, "random_networks.csv"), rows)
    used = collections.Counter(name for row in rows for name in row["cases"].split("; "))
    return {
        "tool": "eval.conformance",
        "models": len(rows),
        "refused": sum(bool(row["refused"]) for row in rows),
        "drawn": sum(row["drawn"] for row in rows),
        "least_used": min(used[name] for name in names),
        "codes": sum(row["codes"] for row in rows),
        "differing": sum(row["differing"] for row in rows),
        "keras_differing": sum(row["keras_differing"] for row in rows),
        "below_16_distinct": sum(row["below_16_distinct"] for row in rows),
        "operations": sum(row["operations"] for row in rows),
        "first": first,
        **_micro_total(rows),
    }


def drawn(plan: Plan, micro: bool = False) -> tuple[Plan, dict]:
    """Returns a plan and its row: drawn again until every tensor has 16 codes, or codes differ.

    After each `DRAWS` tries the last piece is left out; with one piece left the last try counts.
    """
    row = compare(plan, micro)
    for draw in range(1, DRAWS * len(plan.cases)):
        if row["differing"] or not row["below_16_distinct"]:
            break
        cases = plan.cases if draw % DRAWS else plan.cases[:-1]
        plan = _plan(cases, np.random.default_rng(plan.seed + draw), plan.seed + draw)
        row = compare(plan, micro) | {"drawn": draw + 1}
    return plan, row


def plans(names: Sequence[str], config: Config, random: np.random.Generator):
    """Yields random networks; the names come in turn, shuffled, so that each is used as often."""
    if config.models == 1 and config.cases is not None:
        yield _plan(tuple(names), np.random.default_rng(config.seed), config.seed)
        return
    waiting: list[str] = []
    for number in range(config.models):
        count = int(random.integers(3, 6))
        while len(waiting) < count:
            waiting += random.permutation(names).tolist()
        cases, waiting = tuple(waiting[:count]), waiting[count:]
        seed = config.seed + 1000 * number
        yield _plan(cases, np.random.default_rng(seed), seed)


def _plan(cases, random, seed):
    height, width = (int(random.integers(7, 16)) for _ in range(2))
    return Plan(cases, (height, width), int(random.integers(2, 8)), seed)


def compare(plan: Plan, with_micro: bool = False) -> dict:
    """Returns what a random network does at w8a8: codes of both flavours, of micro, and of Keras."""
    row = dict.fromkeys(("operations", "codes", "differing", "keras_differing"), 0)
    row |= {
        "below_16_distinct": 0,
        "drawn": 1,
        "cases": "; ".join(plan.cases),
        "seed": plan.seed,
        "refused": "",
    }
    images = smooth_images(np.random.default_rng(plan.seed), IMAGES, *plan.size)
    model, used = build(plan)
    row["cases"] = "; ".join(used)
    try:
        placed = placement.place(model, spec.scheme("w8a8"))
        calibration.calibrate(placed, np.split(images, 2))
        graph = lowering.lower(placed)
    except UnsupportedModelError as error:
        return row | {"refused": str(error)}
    row["operations"] = len(graph.nodes)
    for flavour in flavours(graph):
        nodes = _compared(graph, images, flavour)
        row["codes"] += sum(node["codes"] for node in nodes)
        row["differing"] += sum(node["differing"] for node in nodes)
        row["below_16_distinct"] += sum(node["distinct"] < 16 for node in nodes)
    content = tflite_file.write(graph)
    found = np.concatenate(list(runtimes.run_litert(content, [images], "xnnpack", 1)))
    expected = np.asarray(placed(images)).reshape(found.shape)
    scale = graph.tensors[graph.outputs[0]].scale
    row["keras_differing"] = int((np.rint((found - expected) / scale) != 0).sum())
    return row | (_in_micro(graph, images) if with_micro else {})


def shrunk(plan: Plan) -> Plan:
    """Returns the plan with every piece taken out without which codes still differ."""
    position = 0
    while position < len(plan.cases) and len(plan.cases) > 1:
        cases = plan.cases[:position] + plan.cases[position + 1 :]
        smaller = dataclasses.replace(plan, cases=cases)
        if compare(smaller)["differing"]:
            plan = smaller
        else:
            position += 1
    return plan


# --- networks -----------------------------------------------------------------------------------


def build(plan: Plan) -> tuple[keras.Model, list[str]]:
    """Returns the network of a plan with random weights, and the names of the pieces in it.

    Every third piece or so is joined with what it was made of: added where the shapes agree, else
    concatenated where the images' sizes do.
    """
    random = np.random.default_rng(plan.seed)
    keras.utils.set_random_seed(plan.seed)
    image = keras.Input((*plan.size, 3))
    x = L.Conv2D(plan.channels, 3, padding="same", name="before")(image)
    used = []
    for name in plan.cases:
        if min(x.shape[1:3]) < SMALLEST:
            break
        made = known_cases()[name][0](x)
        used.append(name)
        if len(plan.cases) > 1 and random.random() < 0.35:
            if made.shape == x.shape:
                made = L.Add()([x, made])
            elif made.shape[1:3] == x.shape[1:3]:
                made = L.Concatenate()([L.Conv2D(3, 1)(x), L.Conv2D(3, 1)(made)])
        x = made
    x = L.Conv2D(6, min(3, *x.shape[1:3]), padding="same", name="after")(x)
    model = keras.Model(
        image, L.Dense(20, name="logits")(L.GlobalAveragePooling2D(name="whole")(x))
    )
    return randomized(model, random), used


def randomized(model: keras.Model, random: np.random.Generator) -> keras.Model:
    """Returns the model with weights and statistics as of a trained one, set in place."""
    for variable in model.variables:
        shape, name = tuple(variable.shape), variable.path.rsplit("/", 1)[-1]
        if name in ("moving_variance", "gamma"):
            variable.assign(random.uniform(0.5, 2.0, shape))
        elif name in ("moving_mean", "beta", "bias"):
            variable.assign(random.normal(0, 0.3, shape))
        elif name.endswith("kernel"):
            fan_in = shape[0] ** 2 if "depthwise" in variable.path else np.prod(shape[:-1])
            variable.assign(random.normal(0, 1.5 / np.sqrt(fan_in), shape))
    return model


def smooth_images(
    random: np.random.Generator, count: int, height: int, width: int, channels: int = 3
) -> np.ndarray:
    """Returns float32 (count, height, width, channels) in [-1, 1], sums of a few low frequencies."""
    rows, columns = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[:, None]
    total = np.zeros((count, height, width, channels))
    for _ in range(4):
        down, across = random.uniform(-3, 3, (2, count, 1, 1, channels))
        phase = random.uniform(0, 2 * np.pi, (count, 1, 1, channels))
        amplitude = random.normal(size=(count, 1, 1, channels))
        total += amplitude * np.sin(2 * np.pi * (down * rows + across * columns) + phase)
    return (total / np.abs(total).max(axis=(1, 2, 3), keepdims=True)).astype(np.float32)


def main() -> None:
    """Runs the command line."""
    cli.run(check, Config)


if __name__ == "__main__":
    main()
