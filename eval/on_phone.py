"""Latency on an Android device, through adb: the tool, the runs, and what they are worth.

Files are pushed to a folder that is removed at the end, the models' configurations (cores, threads,
XNNPACK) are run round by round in turn, so that heat falls on all alike, and rounds go on until
each configuration's last three averages are within STEADY_PERCENT, or says that they are not.  A run
whose delegate did not compute the whole network gives no figure.
"""

import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Sequence

from absl import logging

from lowbit import lint, manifest, progress, results, tflite_file
from lowbit.devices import adb, benchmark_output, phone

DELEGATES = ("cpu", "gpu", "nnapi", "hexagon", "qnn", "npu")
# How benchmark_model names them in its statements.
_STATED = {"gpu": "GPU", "nnapi": "NNAPI", "hexagon": "Hexagon", "qnn": "EXTERNAL"}
# What each needs on the device, by the projects' documents; `{folder}` is where files are pushed.
_DELEGATE_FLAGS = {
    "cpu": (),
    "gpu": ("--use_gpu=true",),
    "nnapi": ("--use_nnapi=true", "--disable_nnapi_cpu=true"),
    "hexagon": ("--use_hexagon=true", "--hexagon_lib_path={folder}"),
    "qnn": (
        "--external_delegate_path={folder}/libQnnTFLiteDelegate.so",
        "--external_delegate_options=backend_type:htp;library_path:{folder}/libQnnHtp.so;"
        "skel_library_dir:{folder}",
    ),
    "npu": ("--use_npu", "--dispatch_library_path={folder}"),
}
_LIBRARIES = {
    "hexagon": "libhexagon_interface.so and libhexagon_nn_skel*.so",
    "qnn": "libQnnTFLiteDelegate.so, libQnnHtp.so, libQnnSystem.so, libQnnHtpPrepare.so, "
    "libQnnHtpV*Stub.so and libQnnHtpV*Skel.so",
    "npu": "libLiteRt.so and libLiteRtDispatch_*.so",
}
_TOOL = "benchmark_model"
_PYTHON = "python3 -m ai_edge_litert.tools.benchmark_litert_model"
_ON_DEVICE = f"{adb.BASE}/{_TOOL}"
ADVICE = (
    f"Google publishes benchmark_model for android_aarch64 and android_arm (LiteRT's page "
    f"'Performance measurement', nightly binaries), or build //tflite/tools/benchmark:benchmark_model; "
    f"then --benchmark_binary=PATH, or `adb push PATH {_ON_DEVICE}`. A device with Python takes "
    "`pip install ai-edge-litert` instead"
)
_SHORT = ("model", "cores", "threads", "xnnpack", "latency_ms", "spread_percent")
STEADY_PERCENT = 5.0
_ROUNDS = 3  # fewer say nothing of a spread
_WARMER_CELSIUS = 3.0
_RUN_SECONDS = 600
_BLIND_PAUSE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One column of the table."""

    model: str  # the path here
    cores: phone.Cluster | None  # None: where the system puts it
    threads: int
    xnnpack: bool
    delegate: str

    @property
    def label(self) -> str:
        """Returns how messages name it."""
        cores = self.cores.name if self.cores else "any core"
        kernels = "" if self.xnnpack else ", no XNNPACK"
        where = (
            f"{cores}, {self.threads} threads{kernels}" if self.delegate == "cpu" else self.delegate
        )
        return f"{os.path.basename(self.model)} on {where}"


@dataclasses.dataclass(frozen=True)
class Tool:
    """What measures: a program on the device, as the first words of its command."""

    command: str
    name: str
    is_newer: bool  # LiteRT's, with other flags


def measure(
    *,
    models: Sequence[str],
    serial: str | None = None,
    client: str = "adb",
    benchmark_binary: str | None = None,
    delegate: str = "cpu",
    delegate_libraries: Sequence[str] = (),
    cores: Sequence[str] = ("big", "little"),
    threads: Sequence[int] = (1, 4),
    xnnpack: Sequence[bool] | None = None,
    runs: int = 50,
    warmup_runs: int = 10,
    rounds: int = 10,
    cool_down_s: float = 60.0,
    op_profile: bool = False,
    output_dir: str = "results",
) -> dict:
    """Measures files on a device; appends a row for each configuration to phone.csv.

    Args:
      models: paths of `.tflite` files; ratios are to the first one's latency.
      serial: of the device; None: the only one.
      client: adb, a name on PATH or a path.
      benchmark_binary: benchmark_model for the device; None: the one on it, or its Python's.
      delegate: one of DELEGATES.
      delegate_libraries: files that it needs, pushed beside the model.
      cores: names of clusters; "any" leaves it to the system.
      threads: of the interpreter.
      xnnpack: with it and without, for the CPU; None: both, where the tool can switch it off.
      runs: in each round, at least.
      warmup_runs: at least.
      rounds: at most; at least 3 are run.
      cool_down_s: at most, before each run.
      op_profile: one more run of each configuration with the operators' times, to phone_operators.csv.
      output_dir: where the rows go.

    Returns:
      The first configuration's row, with "ratios": latency by the first model's, for the same cores
      and threads, by configuration; and "all": the latency of each.

    Raises:
      ValueError: for a flag or file that does not fit; where a delegate left operators to the CPU.
      adb.AdbError: where the device is missing, goes away or has no space.
    """
    _check(models, delegate, delegate_libraries, threads, rounds, benchmark_binary)
    if runs < 1 or warmup_runs < 0 or not 0 <= cool_down_s < float("inf"):
        raise ValueError(
            f"--runs={runs} must be at least 1, --warmup_runs={warmup_runs} and "
            f"--cool_down_s={cool_down_s} at least 0"
        )
    contents = {path: tflite_file.load_bytes(path) for path in models}
    for path, content in contents.items():
        lint.verify(content, path)
    device = adb.connect(serial, client)
    about = phone.read_phone(device)
    logging.info("%s", _described(about))
    with adb.work_folder(device) as folder:
        tool = _tool(device, folder, benchmark_binary, delegate)
        if op_profile and tool.is_newer:
            raise ValueError(f"{tool.name} has no op profile; benchmark_model has")
        remote = {path: f"{folder}/{number}.tflite" for number, path in enumerate(models)}
        for path, name in remote.items():
            adb.push(device, path, name)
        for path in delegate_libraries:
            adb.push(device, path, f"{folder}/{os.path.basename(path)}")
        plan = _plan(models, about, tool, delegate, cores, threads, xnnpack)
        start = phone.read_state(device)
        found: dict[Configuration, list[benchmark_output.Benchmark]] = {one: [] for one in plan}
        warmest: dict[Configuration, list[float]] = {one: [] for one in plan}
        commands = {
            one: _command(tool, one, folder, remote[one.model], runs, warmup_runs) for one in plan
        }
        rows: dict[Configuration, dict] = {}
        try:
            with progress.bar("on the device", rounds * len(plan)) as update:
                for number in range(rounds):
                    for place, one in enumerate(plan):
                        _cool_down(device, start, cool_down_s)
                        found[one].append(_run(device, tool, one, commands[one]))
                        state = phone.read_state(device)
                        if state.temperature_celsius is not None:
                            warmest[one].append(state.temperature_celsius)
                        update(number * len(plan) + place + 1)
                    if number + 1 >= _ROUNDS and all(map(_is_steady, found.values())):
                        break
        finally:  # a failure in a late round does not cost what the earlier ones have told
            for one in plan:
                if len(found[one]) >= _ROUNDS:
                    size_bytes = len(contents[one.model])
                    rows[one] = _row(one, found[one], warmest[one], about, start, tool, size_bytes)
                    results.append_row(os.path.join(output_dir, "phone.csv"), rows[one])
        if op_profile:
            for one in plan:
                command = f"{commands[one]} --enable_op_profiling=true"
                _profile(device, tool, one, command, about, output_dir)
    first = rows[plan[0]]
    every = [{name: row[name] for name in _SHORT} for row in rows.values()]
    return first | {"ratios": _ratios(rows, models[0]), "all": every}


def _check(models, delegate, libraries, threads, rounds, binary):
    if delegate not in DELEGATES:
        raise ValueError(f"--delegate={delegate} is not one of {', '.join(DELEGATES)}")
    if not models or min(threads, default=0) < 1 or rounds < _ROUNDS:
        raise ValueError(
            f"{len(models)} models, --threads={','.join(map(str, threads))} and --rounds={rounds}: a "
            f"model, 1 thread and {_ROUNDS} rounds are the least"
        )
    for path in [*libraries, *([binary] if binary else [])]:
        if not os.path.isfile(path):
            raise ValueError(f"{path}: no such file")
    files = [os.path.realpath(path) for path in models]
    for path in models:
        if files.count(os.path.realpath(path)) > 1:
            raise ValueError(f"{path} is named twice; a file is timed once in each round")
    if delegate in _LIBRARIES and not libraries:
        raise ValueError(
            f"--delegate={delegate} needs --delegate_libraries: {_LIBRARIES[delegate]}"
        )


def _described(about):
    clusters = "; ".join(
        f"{cluster.name}: {len(cluster.cores)} x {cluster.kind or 'core'}"
        + (f" at {cluster.max_mhz} MHz" if cluster.max_mhz else "")
        for cluster in about.clusters
    )
    return f"{about.model or about.serial}, {about.soc or 'unknown chip'}, {about.abi}: {clusters}"


def _tool(device, folder, binary, delegate):
    """Returns the program on the device that measures; pushes `binary`, or finds one there."""
    newer = delegate == "npu"
    if binary:
        adb.push(device, binary, f"{folder}/{_TOOL}")
        made = adb.shell(device, f"chmod 755 {folder}/{_TOOL} && {folder}/{_TOOL} --help")
        # 126: no permission, or a program for another processor; 127: its loader is missing.
        if made.returncode in (126, 127):
            raise ValueError(f"{binary} does not run on the device: {made.text.strip()[-300:]}")
        return Tool(f"./{_TOOL}", os.path.basename(binary), newer)
    if adb.shell(device, f"test -x {_ON_DEVICE}").returncode == 0:
        return Tool(_ON_DEVICE, _TOOL, newer)
    version = "import importlib.metadata as m; print(m.version('ai-edge-litert'))"
    python = adb.shell(device, ["python3", "-c", version], _RUN_SECONDS)
    if python.returncode == 0:
        return Tool(_PYTHON, f"ai-edge-litert {python.stdout.strip()}", True)
    raise ValueError(f"no benchmark tool for the device: {ADVICE}")


def _plan(models, about, tool, delegate, cores, threads, xnnpack) -> list[Configuration]:
    """Returns the configurations, those of all models side by side."""
    if delegate != "cpu":
        return [Configuration(model, None, 1, True, delegate) for model in models]
    if xnnpack is None:
        xnnpack = (True,) if tool.is_newer else (True, False)
    elif tool.is_newer and not all(xnnpack):
        raise ValueError(f"{tool.name} cannot switch XNNPACK off: --xnnpack=on, or benchmark_model")
    named = {cluster.name: cluster for cluster in about.clusters}
    chosen: list[phone.Cluster | None] = []
    for name in cores:
        if name == "any":
            chosen.append(None)
        elif name in named:
            chosen.append(named[name])
        elif len(named) == 1 and name in ("big", "mid", "little"):
            chosen.append(next(iter(named.values())))  # all cores are alike
        else:
            raise ValueError(f"--cores: no {name!r} on this device; it has {', '.join(named)}, any")
    plan = []
    for cluster, count, kernels in itertools.product(dict.fromkeys(chosen), threads, xnnpack):
        if cluster is not None and count > len(cluster.cores):
            logging.warning(
                "%s threads on the %s %s cores are left out",
                *(count, len(cluster.cores), cluster.name),
            )
            continue
        plan += [Configuration(model, cluster, count, kernels, delegate) for model in models]
    if not plan:
        raise ValueError(
            f"--threads={','.join(map(str, threads))}: the clusters {', '.join(cores)} have fewer cores"
        )
    return plan


def _command(tool, one, folder, model, runs, warmup_runs):
    """Returns the line for the device's shell; the program's number goes to the file `pid`."""
    flags = [flag.format(folder=folder) for flag in _DELEGATE_FLAGS[one.delegate]]
    flags += [f"--{'model' if tool.is_newer else 'graph'}={model}", f"--num_threads={one.threads}"]
    flags += [f"--num_runs={runs}", f"--warmup_runs={warmup_runs}"]
    if one.delegate != "cpu":
        flags.append("--require_full_delegation" + ("" if tool.is_newer else "=true"))
    elif not tool.is_newer:
        flags.append(f"--use_xnnpack={str(one.xnnpack).lower()}")
    quoted = " ".join(f"'{flag}'" for flag in flags)
    taskset = f"taskset {one.cores.mask} " if one.cores else ""
    libraries = ""
    if one.delegate in _LIBRARIES:
        searched = (
            f"{folder};/system/lib/rfsa/adsp;/system/vendor/lib/rfsa/adsp;/vendor/dsp/cdsp;/dsp"
        )
        libraries = f"LD_LIBRARY_PATH={folder} ADSP_LIBRARY_PATH='{searched}' "
    return f"cd {folder} && echo $$ > pid && {libraries}exec {taskset}{tool.command} {quoted}"


def _run(device, tool, one, command) -> benchmark_output.Benchmark:
    """Runs the tool once; raises ValueError where it fails, or the CPU computed a delegate's work."""
    done = adb.shell(device, command, _RUN_SECONDS)
    try:
        made = benchmark_output.parse(done.text)
    except benchmark_output.OutputError as error:
        missing = "" if "taskset" not in done.stderr else " (--cores=any needs no taskset)"
        raise ValueError(
            f"{tool.name}, {one.label}: exit code {done.returncode}: {error}{missing}"
        ) from error
    if done.returncode:
        raise ValueError(f"{tool.name}, {one.label}: exit code {done.returncode}: {made.trouble}")
    if one.delegate != "cpu":
        stated = "accelerator" if tool.is_newer else _STATED[one.delegate]
        extent = benchmark_output.extent_of(made, stated)
        if extent != benchmark_output.WHOLE:
            said = "; ".join(made.trouble) or "nothing of it"
            raise ValueError(
                f"{tool.name}, {one.label}: the delegate computed {_COMPUTED[extent]} of the "
                f"network, the CPU the rest; {made.latency_ms:.3f} ms is no figure "
                f"of it (it said: {said})"
            )
    return made


_COMPUTED = {benchmark_output.PARTLY: "a part", benchmark_output.NOT: "nothing"}


def _profile(device, tool, one, command, about, output_dir):
    for operator in _run(device, tool, one, command).operators:
        row = {
            "model": one.model,
            "phone": about.model,
            "emulated": about.is_emulated,
            "runtime": tool.name,
            "configuration": one.label,
            "operator": operator.kind,
            "name": operator.name,
            # A Hexagon delegate profiles in cycles.
            ("cycles" if one.delegate == "hexagon" else "latency_ms"): operator.average,
        }
        results.append_row(os.path.join(output_dir, "phone_operators.csv"), row)


def _cool_down(device, start, seconds):
    """Waits until a device is about as cool as at the start, or the time is over."""
    if start.temperature_celsius is None:
        time.sleep(min(seconds, _BLIND_PAUSE_SECONDS))
        return
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        celsius = phone.read_state(device).temperature_celsius
        if celsius is None or celsius <= start.temperature_celsius + _WARMER_CELSIUS:
            return
        time.sleep(min(1.0, seconds))


def _spread(found) -> float:
    """Returns the spread of the last averages by their median, in percent."""
    averages = [one.latency_ms for one in found[-_ROUNDS:]]
    return 100 * (max(averages) - min(averages)) / statistics.median(averages)


def _is_steady(found) -> bool:
    return len(found) >= _ROUNDS and _spread(found) <= STEADY_PERCENT


def _row(one, found, warmest, about, start, tool, size_bytes):
    averages = [each.latency_ms for each in found]
    row = {
        "tool": "eval.latency",
        "model": one.model,
        "device": "adb",
        "emulated": about.is_emulated,
        "phone": about.model,
        "soc": about.soc,
        "abi": about.abi,
        "android": about.android,
        "runtime": tool.name,
        "delegate": one.delegate,
        "cores": one.cores.name if one.cores else "any",
        "core_kind": one.cores.kind if one.cores else None,
        "core_mhz": one.cores.max_mhz if one.cores else None,
        "threads": one.threads,
        "xnnpack": one.xnnpack if one.delegate == "cpu" else None,
        "rounds": len(found),
        "runs": found[-1].runs,
        "latency_ms": round(statistics.median(averages), 4),
        "latency_ms_lowest": round(min(averages), 4),
        "latency_ms_highest": round(max(averages), 4),
        "spread_percent": round(_spread(found), 2),
        "steady": _is_steady(found),
        "init_ms": round(statistics.median(each.init_ms for each in found), 3),
        "celsius_at_start": start.temperature_celsius,
        "celsius_highest": max(warmest, default=None),
        "governor": " ".join(start.governors) or None,
        "battery_percent": start.battery_percent,
        "is_charging": start.is_charging,
        "size_bytes": size_bytes,
        "versions": manifest.versions(),
    }
    if not row["steady"]:
        logging.warning("%s: its averages spread by %.1f %%", one.label, row["spread_percent"])
    if about.is_emulated:
        logging.warning("%s: an emulated device, whose times are no phone's", one.label)
    return row


def _ratios(rows, reference) -> dict[str, float]:
    """Returns latency by the reference model's, for each other configuration."""
    made = {}
    for one, row in rows.items():
        same = dataclasses.replace(one, model=reference)
        if one.model != reference and same in rows:
            made[one.label] = round(row["latency_ms"] / rows[same]["latency_ms"], 4)
    return made
