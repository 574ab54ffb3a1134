"""The first process of a phone's namespaces: its mounts, its daemons, its end.

Run as a script by `namespace.phone`, with the standard library alone.  It takes the description as
JSON in its one argument, then commands as lines of JSON on stdin, and answers each with a line; the
first answer says its process id on the host.  At the end of stdin, and so whenever the process that
started it is gone, it ends, and with it everything in its namespaces.
"""

import fcntl
import json
import os
import pathlib
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time

_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1
_START_SECONDS = 30
# An arm64 executable's header: 64 bits, little-endian, EM_AARCH64.
_MAGIC = "7f454c460201010000000000000000000200b700"
_MASK = "ffffffffffffff00fffffffffffffffffeffffff"


def main() -> None:
    """Sets up the namespaces, then follows commands until stdin ends."""
    spec = json.loads(sys.argv[1])
    host_process = os.readlink("/proc/self")  # /proc is still that of the host
    daemons: dict[int, subprocess.Popen] = {}
    try:
        _set_up(spec)
        _answer({"process": int(host_process)})
    except (OSError, subprocess.CalledProcessError) as error:
        _answer({"error": str(error)})
        return
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "start":
                daemons[command["port"]] = _start(spec, command["port"])
            else:
                daemon = daemons[command["port"]]
                daemon.send_signal(command["signal"])
                if command["signal"] in (signal.SIGKILL, signal.SIGTERM):
                    daemon.wait(_START_SECONDS)
            _answer({})
        except (OSError, KeyError, subprocess.TimeoutExpired) as error:
            _answer({"error": f"{type(error).__name__}: {error}"})


def _answer(answer):
    print(json.dumps(answer), flush=True)


def _set_up(spec):
    _loopback_up()
    root = pathlib.Path(spec["root"])
    _mount("-t", "tmpfs", "-o", "mode=755", "lowbit", root)
    for path, target in spec["links"].items():
        _inside(root, path).symlink_to(target)
    for path, source in spec["binds"].items():
        target = _inside(root, path)
        target.mkdir(exist_ok=True)
        _mount("--bind", "-o", "ro", source, target)
    for path in ("/proc", "/dev/pts", "/tmp", "/data/local/tmp", "/root", "/run"):
        (_inside(root, path)).mkdir(exist_ok=True)
    _mount("-t", "proc", "proc", root / "proc")
    _mount("-t", "devpts", "-o", "newinstance,ptmxmode=0666", "devpts", root / "dev/pts")
    (root / "dev/ptmx").symlink_to("pts/ptmx")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        (root / "dev" / name).touch()
        _mount("--bind", f"/dev/{name}", root / "dev" / name)
    size = f"mode=777,size={spec['data_bytes']}"
    _mount("-t", "tmpfs", "-o", size, "data", root / "data/local/tmp")
    for path, text in spec["files"].items():
        if path.startswith("/proc/"):  # no folder to write to; a file is laid over the kernel's
            kept = _inside(root, f"/run{path}")
            kept.write_text(text)
            _mount("--bind", kept, _inside(root, path))
        else:
            _inside(root, path).write_text(text)
    for path, text in spec["programs"].items():
        _inside(root, path).write_text(text)
        _inside(root, path).chmod(0o755)
    if spec["interpreter"]:
        _register(spec["interpreter"], root)


def _inside(root, path):
    """Returns a path below the root, whose folder is made."""
    found = root / path.lstrip("/")
    found.parent.mkdir(parents=True, exist_ok=True)
    return found


def _mount(*arguments):
    command = ["mount", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{shlex.join(command)}: {done.stderr.strip()}")


def _loopback_up():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        request = struct.pack("16sh14x", b"lo", _IFF_UP)
        fcntl.ioctl(channel, _SIOCSIFFLAGS, request)


def _register(interpreter, root):
    """Has the kernel run arm64 programs by an interpreter, in this user namespace alone.

    F: the interpreter is opened now, outside of the root; O and C: the program's file is handed
    over open, with its rights.
    """
    folder = root / "run/binfmt_misc"
    folder.mkdir()
    _mount("-t", "binfmt_misc", "binfmt_misc", folder)
    magic, mask = (
        "".join(f"\\x{text[i : i + 2]}" for i in range(0, len(text), 2)) for text in (_MAGIC, _MASK)
    )
    (folder / "register").write_text(f":lowbit-arm64:M::{magic}:{mask}:{interpreter}:OCF")


def _start(spec, port):
    """Starts a daemon on a port; returns it when it answers there."""
    if _answers(port):
        raise OSError(f"port {port} is taken")
    with open(spec["log"], "a") as log:
        daemon = subprocess.Popen(
            ["chroot", spec["root"], spec["daemon"]],
            env=spec["environment"] | {"ADBD_PORT": str(port)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and daemon.poll() is None:
        if _answers(port):
            return daemon
        time.sleep(0.05)
    code = daemon.poll()
    daemon.kill()
    said = pathlib.Path(spec["log"]).read_text(errors="replace").strip().splitlines()[-3:]
    ended = "does not listen" if code is None else f"ended with {code}"
    raise OSError(f"adbd {ended} on port {port}: {'; '.join(said)}")


def _answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
