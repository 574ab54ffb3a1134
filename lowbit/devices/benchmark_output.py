"""What LiteRT's benchmark tools print, as numbers.

    parse(text)   of benchmark_model, builds of 2018 to 2026, from its terminal or from Android's log
                  of LiteRT's newer tools, C++ and Python ("BENCHMARK RESULTS")

A line may begin with "INFO: ", with logcat's prefix, or with neither; numbers may have exponents.
A tool prints a latency too where a delegate was asked for and the CPU computed everything:
`extent_of` tells from its own statements what really ran.
"""

import dataclasses
import math
import re

# How much of a network a delegate computed.
WHOLE, PARTLY, NOT = "whole", "partly", "not"
# What they tell of the counted runs beside their average.
_SPREAD = ("min", "max", "std", "p5", "median", "p95")
_NUMBER = r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)(?![\w.])"
_PREFIX = re.compile(
    # 05-31 10:31:13.042 21767 21767 I tflite  : or I/tflite (21767):
    r"^\s*(?:\d\d-\d\d \d\d:\d\d:\d\d\.\d+\s+\d+\s+\d+\s+)?"
    r"(?:[VDIWEF][ /][\w.]+\s*(?:\(\s*\d+\))?\s*:)?"
    r"\s*(?:(?:INFO|WARNING|WARN|ERROR|VERBOSE|DEBUG):)?\s*"
)
_SINCE_2020 = re.compile(
    rf"^Inference timings in us: Init: {_NUMBER}, First inference: {_NUMBER}, "
    rf"Warmup \(avg\): {_NUMBER}, Inference \(avg\): {_NUMBER}$"
)
_BEFORE_2020 = re.compile(
    rf"^Average inference timings in us: Warmup: {_NUMBER}, Init: {_NUMBER}, "
    rf"(?:Inference|no stats): {_NUMBER}(?:, with stats: {_NUMBER})?$"
)
_STATEMENT = re.compile(r"^(?:Average inference|Inference) timings in us:")
_COUNT = re.compile(r"^count=(\d+) ")
_STATISTIC = re.compile(rf"\b(first|curr|min|max|avg|std|p5|median|p95)={_NUMBER}")
_APPLIED = re.compile(
    r"^Explicitly applied (.+) delegate, and the model graph will be (completely|partially) executed "
    r"by the delegate(?: w/ (\d+) delegate kernels)?\.$"
)
_NOT_APPLIED = re.compile(
    r"^Though (.+) delegate is explicitly applied, the model graph will not be executed by the "
    r"delegate\.$"
)
_REPLACED = re.compile(
    r"^Replacing (\d+)(?: out of (\d+))? node\(s\) with delegate \((\w+)\) node, yielding (\d+) "
    r"partitions"
)
_HEXAGON_NODES = re.compile(
    r"^(?:TfLite)?Hexagon ?[Dd]elegate(?: delegate)?: (\d+) nodes delegated out of (\d+) nodes with "
    r"(\d+) partitions\.?$"
)
_MEMORY = re.compile(
    rf"^(?:Memory footprint delta from the start of the tool|Peak memory footprint) \(MB\): "
    rf"init={_NUMBER} overall={_NUMBER}$"
)
_PEAK = re.compile(
    rf"^Overall peak memory footprint \(MB\) via periodic monitoring: {_NUMBER}(?: MB)?$"
)
# What a tool says of a delegate or a library that it does without.
_TROUBLE = re.compile(
    r"^(?:Failed to |Could not create |.*[Dd]elegate is not supported|Unconsumed cmdline flags|"
    r"Restored original execution plan|Benchmarking failed|hexagon_nn_config failed|CANNOT LINK|"
    r"FATAL ERROR)"
)
_PROFILE_OF_RUNS = "Operator-wise Profiling Info for Regular Benchmark Runs:"
_RUN_ORDER = re.compile(r"^=+ Run Order =+$")
_HEADING = re.compile(r"^=+ .* =+$")
_COLUMNS = re.compile(r"\[[^]]+\]")
_RESULTS = re.compile(r"^(?:=+ )?BENCHMARK RESULTS(?: =+)?$")
_RESULT = re.compile(
    r"^(Model initialization|Warmup \((?:first|avg)\)|"
    r"Inference \((?:avg|min|max|median|std|p5|p95)\)):"
    rf"\s+{_NUMBER} (ms|us)(?: \((\d+) runs\))?$"
)
_ACCELERATED = re.compile(r"^Fully accelerated:\s+(\w+)$")


class OutputError(ValueError):
    """Output of a benchmark tool that ends early, is damaged, or holds no latency."""


@dataclasses.dataclass(frozen=True)
class Delegation:
    """What a tool states of a delegate; None where it does not say."""

    name: str  # "NNAPI", "GPU", "Hexagon", or the kernel's, "TfLiteXNNPackDelegate"
    extent: str | None  # WHOLE, PARTLY or NOT, by the tool's own statement
    nodes: int | None = None  # taken over
    of_nodes: int | None = None
    partitions: int | None = None


@dataclasses.dataclass(frozen=True)
class Operator:
    """A row of the op profile, of the regular runs."""

    kind: str  # "CONV_2D", or a delegate's kernel: "Convolution (NHWC, QS8) GEMM"
    name: str
    first: float  # ms; cycles where a Hexagon delegate profiles
    average: float


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A run's figures; None where the build does not print one."""

    latency_ms: float  # average of the counted runs
    init_ms: float
    first_ms: float | None
    warmup_ms: float | None
    runs: int | None
    latency_ms_min: float | None
    latency_ms_max: float | None
    latency_ms_std: float | None
    latency_ms_p5: float | None
    latency_ms_median: float | None
    latency_ms_p95: float | None
    memory_mb: float | None  # of the whole run, as the tool estimates it
    peak_memory_mb: float | None
    delegations: tuple[Delegation, ...]
    operators: tuple[Operator, ...]
    trouble: tuple[str, ...]  # lines that tell of a delegate or library missing


def parse(text: str) -> Benchmark:
    """Returns the figures of one run.

    Args:
      text: what the tool printed, stdout and stderr in any order, lines whole.

    Raises:
      OutputError: where it ends before the latency, a line is damaged, figures contradict each other,
        or there are several runs; says what the last line was.
    """
    lines = [_PREFIX.sub("", line.rstrip(), count=1) for line in text.splitlines()]
    trouble = tuple(line for line in lines if _TROUBLE.search(line))
    statements = [line for line in lines if _STATEMENT.match(line)]
    results = [number for number, line in enumerate(lines) if _RESULTS.match(line)]
    if len(statements) + len(results) > 1:
        raise OutputError(
            f"the output holds {len(statements) + len(results)} benchmarks; one run is read at a time"
        )
    if results:
        figures = _newer(lines[results[0] + 1 :])
    elif statements:
        figures = _older(statements[0], lines)
    else:
        said = trouble or [line for line in lines if line.strip()][-1:] or ["nothing at all"]
        raise OutputError(f"the benchmark ends without a latency; it said: {'; '.join(said[-3:])}")
    for name, value in figures.items():
        if value is not None and not math.isfinite(value):
            raise OutputError(f"{name} is {value}, not a finite number")
    if figures["latency_ms"] <= 0:
        raise OutputError(f"an average latency of {figures['latency_ms']} ms is none")
    return Benchmark(
        **figures,
        memory_mb=_one(_MEMORY, lines, 2),
        peak_memory_mb=_one(_PEAK, lines, 1),
        delegations=_delegations(lines),
        operators=_operators(lines),
        trouble=trouble,
    )


def extent_of(benchmark: Benchmark, name: str) -> str:
    """Returns how much of the network a delegate computed: WHOLE, PARTLY or NOT.

    The tool's statement decides; where an old build makes none, the number of nodes.  A delegate
    that is said to have been created is not yet one that computed anything: NNAPI's announces that
    it replaces 31 of 31 nodes, then that the graph will not be executed by it.

    Args:
      benchmark: of one run.
      name: of the delegate, in any case; "hexagon" is also that of TfLiteHexagonDelegate.
    """
    about = [one for one in benchmark.delegations if name.lower() in one.name.lower()]
    stated = [one.extent for one in about if one.extent]
    if stated:
        return stated[-1]
    nodes = [one for one in about if one.nodes]
    if not nodes or any("Failed to apply" in line for line in benchmark.trouble):
        return NOT
    return WHOLE if nodes[-1].nodes == nodes[-1].of_nodes else PARTLY


def _older(statement, lines):
    """Returns the figures of benchmark_model, its times from microseconds."""
    found = _SINCE_2020.match(statement)
    first = None
    if found:
        init, first, warmup, average = map(float, found.groups())
    else:
        found = _BEFORE_2020.match(statement)
        if not found:
            raise OutputError(f"a damaged line: {statement!r}")
        warmup, init, average = (float(text) for text in found.groups()[:3])
    counts = [line for line in lines if _COUNT.match(line)]
    runs, statistics = None, {}
    if counts:  # the warm-up's come first
        runs = int(_COUNT.match(counts[-1]).group(1))
        statistics = {key: float(value) for key, value in _STATISTIC.findall(counts[-1])}
        # The line prints 6 digits, old builds an integer; more than 1 % and 1 us apart: two runs.
        stated = statistics.get("avg" if runs > 1 else "curr")
        if stated is None:
            raise OutputError(f"a damaged line: {counts[-1]!r}")
        if abs(stated - average) > max(1.0, 0.01 * average):
            raise OutputError(
                f"the average is {average} us in one line and {stated} us in another: {counts[-1]!r}"
            )
    return {
        "latency_ms": average / 1000,
        "init_ms": init / 1000,
        "first_ms": None if first is None else first / 1000,
        "warmup_ms": warmup / 1000,
        "runs": runs,
        **{
            f"latency_ms_{name}": statistics[name] / 1000 if name in statistics else None
            for name in _SPREAD
        },
    }


def _newer(lines):
    """Returns the figures below "BENCHMARK RESULTS"."""
    found = {}
    for line in lines:
        result = _RESULT.match(line)
        if result:
            name, value, unit, runs = result.groups()
            found[name] = (float(value) / (1000 if unit == "us" else 1), runs and int(runs))
    for name in ("Model initialization", "Inference (avg)"):
        if name not in found:
            raise OutputError(f"the benchmark's results lack {name!r}")

    def value(name):
        return found[name][0] if name in found else None

    return {
        "latency_ms": value("Inference (avg)"),
        "init_ms": value("Model initialization"),
        "first_ms": value("Warmup (first)"),
        "warmup_ms": value("Warmup (avg)"),
        "runs": found["Inference (avg)"][1],
        **{f"latency_ms_{name}": value(f"Inference ({name})") for name in _SPREAD},
    }


def _one(pattern, lines, group):
    found = [pattern.match(line) for line in lines]
    found = [match for match in found if match]
    return float(found[-1].group(group)) if found else None


def _delegations(lines):
    made = []
    for line in lines:
        if found := _APPLIED.match(line):
            name, extent, kernels = found.groups()
            whole = extent == "completely"
            made.append(
                Delegation(name, WHOLE if whole else PARTLY, partitions=kernels and int(kernels))
            )
        elif found := _NOT_APPLIED.match(line):
            made.append(Delegation(found.group(1), NOT))
        elif found := _REPLACED.match(line):
            nodes, total, name, partitions = found.groups()
            made.append(Delegation(name, None, int(nodes), total and int(total), int(partitions)))
        elif found := _HEXAGON_NODES.match(line):
            made.append(Delegation("TfLiteHexagonDelegate", None, *map(int, found.groups())))
        elif found := _ACCELERATED.match(line):
            made.append(
                Delegation("accelerator", WHOLE if found.group(1).lower() == "true" else NOT)
            )
    return tuple(made)


def _operators(lines):
    """Returns the rows of the last "Run Order" table: the first is of the initialization."""
    tables = [number for number, line in enumerate(lines) if _RUN_ORDER.match(line.strip())]
    if _PROFILE_OF_RUNS in lines:
        tables = [number for number in tables if number > lines.index(_PROFILE_OF_RUNS)][:1]
    if not tables:
        return ()
    rows, columns = [], None
    for line in lines[tables[-1] + 1 :]:
        if _HEADING.match(line.strip()) or (columns and not line.strip()):
            break
        if columns is None:
            columns = _COLUMNS.findall(line)
            if not {"[node type]", "[first]", "[avg ms]"} <= set(columns):
                raise OutputError(f"an op profile with the columns {line.strip()!r}")
            continue
        rows.append(_operator(line, columns))
    return tuple(rows)


def _operator(line, columns):
    """Returns one row; its cells stand between tabs, or between two spaces and more."""
    cells = [cell.strip() for cell in re.split(r"\t| {2,}", line.strip()) if cell.strip()]
    if len(cells) != len(columns):
        raise OutputError(f"a damaged line of the op profile: {line.strip()!r}")
    cell = dict(zip(columns, cells, strict=True))
    try:
        figures = float(cell["[first]"]), float(cell["[avg ms]"])
    except ValueError as error:
        raise OutputError(f"a damaged line of the op profile: {line.strip()!r}") from error
    return Operator(cell["[node type]"], cell.get("[Name]", ""), *figures)
