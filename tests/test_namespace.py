"""AOSP's adb daemon in namespaces of its own, spoken to by Debian's adb client."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from lowbit import integer_graph, tflite_file
from lowbit.devices import arm_emulator, arm_root, namespace

pytestmark = pytest.mark.slow  # fetches packages of Debian and wheels, once


def say(device, adb_words, *arguments):
    """Returns what the client prints."""
    done = device.run(
        [*adb_words, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_the_emulated_phone_counts_the_same_through_adb(adb_words, tmp_path):
    root = arm_root.set_up()
    shape = (1, 8, 8, 16)
    quantization = integer_graph.Quantization(np.full(1, 0.1, np.float32), np.zeros(1, np.int64))
    tensors = {name: integer_graph.Tensor(name, shape, "int8", quantization) for name in "xyz"}
    node = integer_graph.Node("ADD", "add", ("x", "y"), ("z",), {"activation": None})
    content = tflite_file.write(integer_graph.IntegerGraph(tensors, (node,), ("x", "y"), ("z",)))
    inputs = list(np.random.default_rng(0).integers(-128, 128, (2, 3, 8, 8, 16)).astype(np.int8))
    direct = arm_emulator.run(content, inputs, "cortex-a76", repeats=3, root=root)
    (tmp_path / "run.py").write_text(arm_emulator.SCRIPT)
    (tmp_path / "given").write_bytes(arm_emulator.pack([content], [inputs], "m"))
    with namespace.phone(namespace.arm64_system(root, "cortex-a76")) as device:
        say(device, adb_words, "connect", device.address)
        for name in ("run.py", "given"):
            say(device, adb_words, "push", str(tmp_path / name), "/data/local/tmp/")
        say(
            device,
            adb_words,
            "shell",
            "cd /data/local/tmp; QEMU_PLUGIN=file=/plugin/icount.so,out=counts "
            "python3.11 run.py 3 1 < given > made",
        )
        for name in ("made", "counts"):
            say(device, adb_words, "pull", f"/data/local/tmp/{name}", str(tmp_path))
    made, counts = (tmp_path / "made").read_bytes(), (tmp_path / "counts").read_text()
    (through,) = arm_emulator.unpack(made, counts, [1], 3)
    np.testing.assert_array_equal(through.outputs[0], direct.outputs[0])
    assert len({str(each) for each in through.counts}) == 1
    # Where memory lies decides a few instructions: of Python's call, or of copies' ends.
    assert abs(through.counts[0]["all"] - direct.counts[0]["all"]) < 300


@pytest.mark.parametrize("kind, machine", [("amd64", "x86_64"), ("cortex-a53", "aarch64")])
def test_the_client_speaks_to_the_daemon(kind, machine, adb_words, tmp_path):
    if kind == "amd64":
        system = namespace.amd64_system()
    else:
        system = namespace.arm64_system(arm_root.set_up(), kind)
    properties = {"ro.product.model": "Bob's"}
    with namespace.phone(system, properties=properties, files={"/sys/odd": "odd\n"}) as device:
        assert "connected to 127.0.0.1:5999" in say(device, adb_words, "connect", device.address)
        assert say(device, adb_words, "devices").splitlines()[1:] == ["127.0.0.1:5999\tdevice", ""]
        assert say(device, adb_words, "shell", "uname -m").strip() == machine
        assert (
            say(device, adb_words, "shell", "getprop ro.product.model; cat /sys/odd")
            == "Bob's\nodd\n"
        )
        if kind != "amd64":
            assert "CPU part\t: 0xd03\n" in say(device, adb_words, "shell", "cat /proc/cpuinfo")
            imported = "import ai_edge_litert.interpreter, platform; print(platform.machine())"
            command = f'python3.11 -c "{imported}"'
            assert say(device, adb_words, "shell", command).strip() == machine
        sent, back = tmp_path / "sent", tmp_path / "back"
        sent.write_bytes(os.urandom(100_000))
        say(device, adb_words, "push", str(sent), "/data/local/tmp/sent")
        say(device, adb_words, "pull", "/data/local/tmp/sent", str(back))
        assert back.read_bytes() == sent.read_bytes()
        failed = device.run(
            [*adb_words, "shell", "echo wrong >&2; exit 7"], capture_output=True, text=True
        )
        assert (failed.returncode, failed.stderr) == (7, "wrong\n")


def test_the_root_is_read_only_and_its_data_folder_fills_up(adb_words, tmp_path):
    large = tmp_path / "large"
    large.write_bytes(bytes(2**21))
    with namespace.phone(namespace.amd64_system(), data_bytes=2**20) as device:
        say(device, adb_words, "connect", device.address)
        done = device.run(
            [*adb_words, "push", str(large), "/data/local/tmp/"], capture_output=True, text=True
        )
        assert done.returncode and "No space left on device" in done.stderr + done.stdout
        done = device.run([*adb_words, "shell", "touch /usr/x"], capture_output=True, text=True)
        assert done.returncode and "Read-only file system" in done.stderr


def test_daemons_come_and_go(adb_words):
    with namespace.phone(namespace.amd64_system()) as device:
        say(device, adb_words, "connect", device.address)
        device.start_daemon(6001)
        say(device, adb_words, "connect", "127.0.0.1:6001")
        assert say(device, adb_words, "devices").count("\tdevice") == 2
        device.signal_daemon(6001, signal.SIGKILL)
        end = time.monotonic() + 10
        while "6001\tdevice" in say(device, adb_words, "devices") and time.monotonic() < end:
            time.sleep(0.1)
        assert say(device, adb_words, "devices").count("\tdevice") == 1
        device.start_daemon(6001)
        say(device, adb_words, "disconnect", "127.0.0.1:6001")
        assert "connected" in say(device, adb_words, "connect", "127.0.0.1:6001")
        with pytest.raises(namespace.NamespaceError, match="KeyError: 6002"):
            device.signal_daemon(6002)
        with pytest.raises(namespace.NamespaceError, match="port 6001 is taken"):
            device.start_daemon(6001)


def test_a_program_of_the_phone_for_tools_outside(adb_words, tmp_path):
    with namespace.phone(namespace.amd64_system()) as device:
        program = device.program(adb_words, tmp_path / "adb")
        done = subprocess.run([program, "connect", device.address], capture_output=True, check=True)
        assert b"connected" in done.stdout
        done = subprocess.run([program, "shell", "echo 'a b'; exit 3"], capture_output=True)
        assert (done.returncode, done.stdout) == (3, b"a b\n")
    done = subprocess.run([program, "devices"], capture_output=True)
    assert done.returncode  # there is nothing to enter any more


def test_a_killed_caller_leaves_no_process_and_no_mount(adb_daemons):
    script = textwrap.dedent("""
        import time
        from lowbit.devices import namespace
        with namespace.phone(namespace.amd64_system()) as device:
            print(device.process, flush=True)
            time.sleep(100)
    """)
    caller = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    first = pathlib.Path("/proc", caller.stdout.readline().strip())
    assert first.exists() and "adbd" not in pathlib.Path("/proc/self/mounts").read_text()
    caller.kill()
    caller.wait()
    caller.stdout.close()
    end = time.monotonic() + 10
    while first.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not first.exists()
    assert "lowbit-phone" not in pathlib.Path("/proc/self/mounts").read_text()


def test_where_namespaces_are_forbidden_the_kernels_word_is_told(adb_daemons):
    """Within a user namespace that may have no network of its own."""
    script = textwrap.dedent("""
        from lowbit.devices import namespace
        try:
            with namespace.phone(namespace.amd64_system()):
                pass
        except namespace.NamespaceError as error:
            print(error)
    """)
    forbid = 'echo 0 > /proc/sys/user/max_net_namespaces; exec "$0" -c "$1"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid, sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("no namespaces on this host: unshare: unshare failed")
