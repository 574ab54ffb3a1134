"""A phone through adb, and what goes wrong on the way, with AOSP's own daemon and Debian's client."""

import contextlib
import csv
import dataclasses
import json
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from eval import latency, on_phone
from lowbit import integer_graph, tflite_file
from lowbit.devices import adb, arm_root, cache, namespace

pytestmark = pytest.mark.slow  # fetches 15 MB of packages, of the arm64 phone 100 MB, once

# Daemons side by side have networks of their own, but one machine: a run holds a lock for its serial.
FIRST = namespace.PORT + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
SECOND = FIRST + 100
KILOBYTE = 1024
# Prints what a build of benchmark_model prints; its own binary is not to be had from a registry.
BENCHMARK = """#!/bin/sh
if [ "$1" = --help ]; then exit 0; fi
echo "$@" >> /data/local/tmp/flags
case "$*" in *use_hexagon*)
echo 'Could not create Hexagon delegate: platform may not support delegate or required libraries are missing'
echo 'INFO: Created TensorFlow Lite XNNPACK delegate for CPU.';;
*use_gpu*)
echo 'INFO: Explicitly applied GPU delegate, and the model graph will be completely executed by the delegate.';;
*use_nnapi*)
echo 'INFO: Explicitly applied NNAPI delegate, and the model graph will be partially executed by the delegate w/ 2 delegate kernels.';;
esac
case "$*" in *num_threads=1*) us=4000.5;; *) us=1.5e+03;; esac
echo "INFO: Inference timings in us: Init: 5579, First inference: 9000, Warmup (avg): 8000, Inference (avg): $us"
case "$*" in *op_profiling*)
printf '============================== Run Order ==============================\\n'
printf '\\t [node type]\\t [first]\\t [avg ms]\\t [Name]\\n'
printf '\\t CONV_2D\\t 0.267\\t 0.278\\t Delegate/CONV_2D:0\\n\\n';;
esac
"""  # noqa: E501
PROPERTIES = {
    "ro.product.model": "Pixel 3",
    "ro.soc.manufacturer": "Qualcomm",
    "ro.soc.model": "SDM845",
    "ro.product.cpu.abi": "arm64-v8a",
    "ro.build.version.release": "12",
}


def sys_files(cores=4):
    """Returns a phone's files of /sys and /proc: little and big cores, and their heat."""
    folder = "/sys/devices/system/cpu/cpu"
    files = {
        "/proc/cpuinfo": "".join(
            f"processor\t: {core}\nCPU implementer\t: 0x41\nCPU part\t: 0x{part:x}\n\n"
            for core, part in zip(range(cores), [0xD05, 0xD0B] * cores, strict=False)
        ),
        "/sys/class/thermal/thermal_zone0/type": "cpu-0-0\n",
        "/sys/class/thermal/thermal_zone0/temp": "41200\n",
    }
    for core in range(cores):
        khz = 1803000 if core % 2 == 0 else 2253000
        files[f"{folder}{core}/cpufreq/cpuinfo_max_freq"] = f"{khz}\n"
        files[f"{folder}{core}/cpufreq/scaling_governor"] = "schedutil\n"
    return files


@pytest.fixture
def lab(adb_words, tmp_path):
    """A phone's daemon, and the client's path."""
    with running(namespace.amd64_system(), adb_words, tmp_path) as found:
        yield found


@pytest.fixture(params=["amd64", "cortex-a53"])
def any_lab(request, adb_words, tmp_path):
    """The daemon of this processor, and the emulated phone's."""
    if request.param == "amd64":
        system = namespace.amd64_system()
    else:
        system = namespace.arm64_system(arm_root.set_up(), request.param)
    with running(system, adb_words, tmp_path) as found:
        yield found


@contextlib.contextmanager
def running(system, adb_words, tmp_path):
    with namespace.phone(
        system, properties=PROPERTIES, files=sys_files(), data_bytes=4 * 2**20, port=FIRST
    ) as phone:
        client = phone.program(adb_words, tmp_path / "adb")
        attach(client, phone.port)
        yield phone, str(client)
        subprocess.run([client, "kill-server"], capture_output=True)


def attach(client, port):
    done = subprocess.run([client, "connect", f"127.0.0.1:{port}"], capture_output=True, text=True)
    assert "connected to" in done.stdout, done
    wait_until(lambda: f"127.0.0.1:{port}\tdevice" in listed(client))


def listed(client):
    return subprocess.run([client, "devices"], capture_output=True, text=True).stdout


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.05)


def left(device):
    """Returns what of ours is on a device."""
    return adb.shell(device, f"ls -d {adb.BASE}/{adb.PREFIX}* 2>/dev/null").stdout.split()


def binary(tmp_path, text=BENCHMARK):
    path = tmp_path / "benchmark_model"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def arguments(client, tmp_path, model, **more):
    if "benchmark_binary" not in more:
        more["benchmark_binary"] = binary(tmp_path)
    return {
        "models": [model],
        "client": client,
        "rounds": 3,
        "cool_down_s": 0.0,
        "output_dir": str(tmp_path / "results"),
    } | more


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A file of one operation."""
    quantization = integer_graph.Quantization(np.float32([0.1]), np.zeros(1, int), None)
    tensors = {
        name: integer_graph.Tensor(name, (1, 8, 8, 3), "int8", quantization, None) for name in "xy"
    }
    node = integer_graph.Node("RELU", "relu", ("x",), ("y",), {})
    path = tmp_path_factory.mktemp("model") / "m.tflite"
    path.write_bytes(
        tflite_file.write(integer_graph.IntegerGraph(tensors, (node,), ("x",), ("y",)))
    )
    return str(path)


# --- the client's commands ----------------------------------------------------------------------


def test_commands_files_and_exit_codes(any_lab, tmp_path):
    _, client = any_lab
    device = adb.connect(program=client)
    assert device.serial == f"127.0.0.1:{FIRST}"
    done = adb.shell(device, "printf out; printf err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out", "err")
    assert adb.shell(device, ["printf", "%s", "a b'c\"$HOME"]).stdout == "a b'c\"$HOME"
    assert adb.shell(device, "no_such_program").returncode == 127
    sent = tmp_path / "sent"
    sent.write_bytes(os.urandom(100_000))
    with adb.work_folder(device) as folder:
        adb.push(device, str(sent), f"{folder}/sent")
        told = adb.shell(device, ["sha256sum", f"{folder}/sent"]).stdout.split()[0]
        here = subprocess.run(["sha256sum", sent], capture_output=True, text=True).stdout.split()[0]
        assert told == here
        with pytest.raises(adb.AdbError, match="copying .* to /usr/x: .*Read-only file system"):
            adb.push(device, str(sent), "/usr/x")
        assert left(device) == [folder]
    assert left(device) == []


def test_no_client_and_no_device(adb_words, tmp_path):
    with pytest.raises(adb.AdbError, match="'no_such_adb' is missing: install"):
        adb.connect(program="no_such_adb")
    with namespace.phone(namespace.amd64_system()) as phone:
        client = str(phone.program(adb_words, tmp_path / "adb"))
        with pytest.raises(adb.AdbError, match="no device is attached: enable USB debugging"):
            adb.connect(program=client)
        with pytest.raises(adb.AdbError, match="no device 'X1' is attached; attached: none"):
            adb.connect("X1", client)
        subprocess.run([client, "kill-server"], capture_output=True)


def test_two_devices(any_lab):
    phone, client = any_lab
    phone.start_daemon(SECOND)
    attach(client, SECOND)
    with pytest.raises(
        adb.AdbError, match=rf"several devices .*{FIRST} \(device\).*choose one with"
    ):
        adb.connect(program=client)
    assert adb.connect(f"127.0.0.1:{SECOND}", client).serial == f"127.0.0.1:{SECOND}"
    # One of them goes: the other one is the only one left.
    phone.signal_daemon(SECOND)
    wait_until(lambda: f"{SECOND}\tdevice" not in listed(client))
    assert adb.connect(program=client).serial == f"127.0.0.1:{FIRST}"
    with pytest.raises(adb.AdbError, match=f"{SECOND} is offline|no device '127.0.0.1:{SECOND}'"):
        adb.connect(f"127.0.0.1:{SECOND}", client)


def test_offline(any_lab):
    phone, client = any_lab
    device = adb.connect(program=client)
    phone.signal_daemon(phone.port)
    wait_until(lambda: "\tdevice" not in listed(client))
    with pytest.raises(adb.AdbError, match="is offline: unplug it|no device is attached"):
        adb.connect(program=client)
    with pytest.raises(adb.GoneError, match="`true`: the device went away"):
        adb.shell(device, "true")
    with pytest.raises(adb.GoneError, match="copying .* the device went away"):
        adb.push(device, __file__, f"{adb.BASE}/x")


def test_unauthorized(lab):
    """Debian's build asks nobody; the daemon's own switch for it is turned in its memory."""
    phone, client = lab
    device = adb.connect(program=client)
    ask_for_authorization(phone)
    subprocess.run([client, "disconnect", device.serial], capture_output=True)
    subprocess.run([client, "connect", device.serial], capture_output=True)
    wait_until(lambda: "\tunauthorized" in listed(client))
    with pytest.raises(adb.AdbError, match="has not authorized this computer: unlock it"):
        adb.connect(program=client)


def ask_for_authorization(phone):
    """Sets `auth_required` of a running daemon, Debian's 34.0.5.

    Its address is in the code that handles a new connection: cmp byte [r14+0xc8], 0; jne ...; lea rax,
    [rip+distance]; cmp byte [rax], 0.
    """
    program = cache.cache_folder() / "adbd-amd64/usr/lib/android-sdk/platform-tools/adbd"
    content = program.read_bytes()
    code = rb"\x41\x80\xbe\xc8\x00\x00\x00\x00\x0f\x85....\x48\x8d\x05(....)\x80\x38\x00"
    (found,) = re.finditer(code, content, re.DOTALL)
    distance = int.from_bytes(found.group(1), "little", signed=True)
    address = loaded_at(content, found.end(1)) + distance
    network = os.readlink(f"/proc/{phone.process}/ns/net")
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{process}/ns/net") != network:
                continue
            maps = pathlib.Path("/proc", process, "maps").read_text().splitlines()
        except OSError:
            continue
        first = [line for line in maps if line.endswith("/adbd")][:1]
        if first:
            base = int(first[0].split("-")[0], 16)
            with open(f"/proc/{process}/mem", "r+b", buffering=0) as memory:
                memory.seek(base + address)
                assert memory.read(1) == b"\x00"
                memory.seek(base + address)
                memory.write(b"\x01")
            return
    raise AssertionError("no daemon runs")


def loaded_at(content, place):
    """Returns the address of a place in an ELF file of 64 bits, by its program headers."""
    (table,) = struct.unpack_from("<Q", content, 0x20)
    size, count = struct.unpack_from("<HH", content, 0x36)
    for number in range(count):
        kind, _, offset, address, _, length = struct.unpack_from(
            "<IIQQQQ", content, table + size * number
        )
        if kind == 1 and offset <= place < offset + length:
            return address + place - offset
    raise AssertionError(f"{place} is in no segment")


def test_a_device_that_hangs(any_lab, monkeypatch):
    phone, client = any_lab
    device = adb.connect(program=client)
    phone.signal_daemon(phone.port, signal.SIGSTOP)
    with pytest.raises(adb.GoneError, match="`true`: no answer within 1 s"):
        adb.shell(device, "true", timeout_s=1)
    phone.signal_daemon(phone.port, signal.SIGCONT)
    assert adb.shell(device, "true").returncode == 0


def test_disconnected_in_the_middle_and_back_again(any_lab):
    phone, client = any_lab
    device = adb.connect(program=client)

    def fail():
        time.sleep(1)
        phone.signal_daemon(phone.port)
        time.sleep(1)
        phone.start_daemon(phone.port)

    failing = threading.Thread(target=fail)
    failing.start()
    with pytest.raises(adb.GoneError, match="`echo .* the device went away") as error:
        with adb.work_folder(device) as folder:
            adb.shell(device, f"echo $$ > {folder}/pid; cd {folder} && exec sleep 60", 30)
    failing.join()
    assert "is left on it" not in str(error.value)
    assert left(device) == []


def test_disconnected_for_good(any_lab, monkeypatch):
    phone, client = any_lab
    device = adb.connect(program=client)
    monkeypatch.setattr(adb, "RETURN_SECONDS", 1)
    killing = threading.Timer(1, phone.signal_daemon, [phone.port])
    killing.start()
    with pytest.raises(adb.GoneError, match=r"lowbit-\w+ is left on it, the next run removes it"):
        with adb.work_folder(device):
            adb.shell(device, "sleep 60")
    killing.join()
    phone.start_daemon(phone.port)
    wait_until(lambda: "\tdevice" in listed(client))
    assert len(left(device)) == 1
    with adb.work_folder(device) as folder:
        assert left(device) == [folder]
    assert left(device) == []


def test_one_run_at_a_time(lab):
    _, client = lab
    device = adb.connect(program=client)
    with adb.work_folder(device) as folder:
        with pytest.raises(adb.AdbError, match="another run is at work on it"):
            with adb.work_folder(device):
                pass
        assert left(device) == [folder]
    with adb.work_folder(device):
        pass


def test_no_space(any_lab, tmp_path):
    _, client = any_lab
    device = adb.connect(program=client)
    large = tmp_path / "large"
    large.write_bytes(bytes(8 * 2**20))
    with pytest.raises(adb.NoSpaceError, match="large to .*: no space is left on it"):
        with adb.work_folder(device) as folder:
            adb.push(device, str(large), f"{folder}/large")
    assert left(device) == []
    free = adb.shell(device, f"df -k {adb.BASE} | tail -1").stdout.split()[3]
    assert int(free) >= 4 * KILOBYTE - 64


# --- the whole command --------------------------------------------------------------------------


def test_a_table_of_configurations(lab, tmp_path, model):
    _, client = lab
    given = arguments(client, tmp_path, model, threads=[1, 2, 4])
    row = on_phone.measure(**given, op_profile=True)
    assert (row["phone"], row["soc"], row["android"]) == ("Pixel 3", "Qualcomm SDM845", "12")
    assert (row["cores"], row["core_kind"], row["core_mhz"]) == ("big", "Cortex-A76", 2253)
    assert (row["latency_ms"], row["threads"], row["steady"]) == (4.0005, 1, True)
    assert (row["celsius_at_start"], row["governor"]) == (41.2, "schedutil")
    with open(tmp_path / "results/phone.csv") as file:
        rows = list(csv.DictReader(file))
    # 4 threads have no place on 2 cores.
    told = [(one["cores"], one["threads"], one["xnnpack"], one["latency_ms"]) for one in rows]
    assert told == [
        (cores, threads, xnnpack, "4.0005" if threads == "1" else "1.5")
        for cores in ("big", "little")
        for threads in ("1", "2")
        for xnnpack in ("True", "False")
    ]
    device = adb.connect(program=client)
    flags = adb.shell(device, f"cat {adb.BASE}/flags").stdout.splitlines()
    assert len(flags) == 8 * 3 + 8  # rounds, and the profiles
    assert sum("--use_xnnpack=false" in line for line in flags) == 16
    assert left(device) == []
    with open(tmp_path / "results/phone_operators.csv") as file:
        profiles = list(csv.DictReader(file))
    assert len(profiles) == 8
    assert (profiles[0]["operator"], profiles[0]["latency_ms"]) == ("CONV_2D", "0.278")


def test_the_command_compares_files(lab, tmp_path, model):
    _, client = lab
    other = tmp_path / "other.tflite"
    other.write_bytes(pathlib.Path(model).read_bytes())
    config = latency.Config(
        model=model,
        device="adb",
        beside=str(other),
        adb=client,
        benchmark_binary=binary(tmp_path),
        threads="1,2",
        cores="big",
        rounds=3,
        cool_down_s=0.0,
        output_dir=str(tmp_path),
    )
    row = latency.measure(config)
    assert len(row["all"]) == 8
    assert row["ratios"] == {
        f"other.tflite on big, {threads} threads{kernels}": 1.0
        for threads in (1, 2)
        for kernels in ("", ", no XNNPACK")
    }
    with pytest.raises(ValueError, match="--xnnpack=yes is not on, off, or on,off"):
        latency.measure(dataclasses.replace(config, xnnpack="yes"))
    with pytest.raises(adb.AdbError, match="'no_such_adb' is missing"):
        latency.measure(dataclasses.replace(config, adb="no_such_adb"))


def test_a_fall_back_gives_no_figure(lab, tmp_path, model):
    _, client = lab
    library = tmp_path / "libhexagon_interface.so"
    library.write_bytes(b"\x7fELF")
    for delegate, message in (
        (
            "hexagon",
            "the delegate computed nothing of the network.*no figure of it.*Could not create",
        ),
        ("nnapi", "the delegate computed a part of the network"),
    ):
        given = arguments(
            client, tmp_path, model, delegate=delegate, delegate_libraries=[str(library)]
        )
        with pytest.raises(ValueError, match=message):
            on_phone.measure(**given)
    assert not (tmp_path / "results").exists()
    assert left(adb.connect(program=client)) == []
    row = on_phone.measure(**arguments(client, tmp_path, model, delegate="gpu"))
    assert (row["delegate"], row["xnnpack"]) == ("gpu", None)


@pytest.mark.parametrize(
    "script, message",
    [
        ("#!/bin/sh\necho 'INFO: STARTING!'\nexit 1\n", "exit code 1: the benchmark ends without"),
        ("#!/bin/sh\nkill -9 $$\n", "exit code 137: the benchmark ends without"),
        ("\x7fELF of another processor", "does not run on the device"),
    ],
)
def test_a_tool_that_fails(lab, tmp_path, model, script, message):
    _, client = lab
    script = script.replace("sh\n", 'sh\n[ "$1" = --help ] && exit 0\n')
    given = arguments(client, tmp_path, model, benchmark_binary=binary(tmp_path, script))
    with pytest.raises(ValueError, match=message):
        on_phone.measure(**given)
    assert left(adb.connect(program=client)) == []
    assert not (tmp_path / "results").exists()


def test_a_failure_in_a_late_round_keeps_the_rounds_before(lab, tmp_path, model):
    _, client = lab
    count = "/data/local/tmp/count"
    failing = BENCHMARK.replace(
        "case", f"echo x >> {count}\nif [ $(wc -l < {count}) -gt 7 ]; then exit 9; fi\ncase", 1
    )
    # Averages that never agree: 4 ms, then 5.
    failing = failing.replace("us=4000.5", f"us=$(( 4000 + 1000 * ($(wc -l < {count}) % 4 / 2) ))")
    given = arguments(
        client, tmp_path, model, benchmark_binary=binary(tmp_path, failing), rounds=10
    )
    with pytest.raises(ValueError, match="exit code 9"):
        on_phone.measure(**given, threads=[1], xnnpack=[True])
    with open(tmp_path / "results/phone.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["cores"], row["rounds"], row["steady"]) for row in rows] == [
        ("big", "4", "False"),
        ("little", "3", "False"),
    ]


def test_no_tool_on_the_device(lab, tmp_path, model):
    _, client = lab
    with pytest.raises(ValueError, match="no benchmark tool for the device: Google publishes"):
        on_phone.measure(**arguments(client, tmp_path, model, benchmark_binary=None))
    for flags, message in (
        ({"cores": ["mid"]}, "no 'mid' on this device; it has little, big, any"),
        ({"threads": [4]}, "--threads=4: the clusters big, little have fewer cores"),
        ({"delegate": "hexagon"}, "needs --delegate_libraries: libhexagon_interface.so and"),
        ({"delegate": "dsp"}, "--delegate=dsp is not one of cpu, gpu"),
        ({"benchmark_binary": "nowhere"}, "nowhere: no such file"),
        ({"rounds": 2}, "3 rounds are the least"),
        ({"runs": -5}, "--runs=-5 must be at least 1"),
        ({"cool_down_s": float("nan")}, "--cool_down_s=nan at least 0"),
        ({"models": [model, f"{os.path.dirname(model)}/./m.tflite"]}, "is named twice"),
        ({"cores": ["bigg"]}, "no 'bigg' on this device"),
    ):
        with pytest.raises(ValueError, match=message):
            on_phone.measure(**arguments(client, tmp_path, model, **flags))
    assert left(adb.connect(program=client)) == []


def test_a_killed_run_leaves_nothing_that_the_next_one_does_not_remove(lab, tmp_path, model):
    _, client = lab
    slow = BENCHMARK.replace("case", "exec sleep 1234\ncase", 1)
    given = arguments(client, tmp_path, model, benchmark_binary=binary(tmp_path, slow))
    script = f"from eval import on_phone; on_phone.measure(**{given!r})"
    device = adb.connect(program=client)

    def sleeps():
        return "sleep 1234" in adb.shell(device, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout

    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) as run:
        try:
            wait_until(sleeps, 60)
        finally:
            run.kill()
    assert len(left(device)) == 1
    row = on_phone.measure(**arguments(client, tmp_path, model))
    assert json.dumps(row)
    assert left(device) == []
    assert not sleeps()


def test_the_emulated_phone_runs_litert(adb_words, tmp_path, model):
    """An arm64 daemon under qemu, LiteRT's own benchmark on it: the way of a phone, in full."""
    root = arm_root.set_up()
    system = namespace.arm64_system(root, "cortex-a76")
    with namespace.phone(system, port=FIRST) as phone:
        client = phone.program(adb_words, tmp_path / "adb")
        attach(client, phone.port)
        given = arguments(str(client), tmp_path, model, benchmark_binary=None)
        row = on_phone.measure(**given, cores=["any"], threads=[1], runs=3, warmup_runs=1)
        assert row["runtime"].startswith("ai-edge-litert 2.3")
        assert row["emulated"] is True
        assert row["latency_ms"] > 0 and row["rounds"] == 3
        assert left(adb.connect(program=str(client))) == []
        with pytest.raises(ValueError, match="cannot switch XNNPACK off"):
            on_phone.measure(**given, cores=["any"], xnnpack=[False])
        subprocess.run([client, "kill-server"], capture_output=True)
