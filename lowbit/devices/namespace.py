"""AOSP's adb daemon in namespaces of its own: a phone to talk to, without a phone.

The daemon listens on 127.0.0.1 of a network of its own, sees a root folder of its own, and all of it
is gone with the process that started it; nothing of the host changes and no rights are needed where
the kernel lets users make namespaces.  The daemon is of this host's architecture, or an arm64 one
under qemu: for that the kernel must know binfmt_misc of user namespaces, Linux 6.7 or later.

    with namespace.phone(namespace.amd64_system()) as device:
        device.run([adb, "connect", device.address])
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence

from lowbit.devices import arm_root, cache, debian

# Not in 5555 to 5585: the client takes a daemon there for an Android emulator too, and lists it twice.
PORT = 5999
DATA_BYTES = 2**29
_DAEMON = "/usr/lib/android-sdk/platform-tools/adbd"
_INIT = pathlib.Path(__file__).with_name("namespace_init.py")
_NAMESPACES = ("--user", "--mount", "--net", "--pid")


class NamespaceError(OSError):
    """The host forbids namespaces, or the daemon does not start in them."""


@dataclasses.dataclass(frozen=True)
class System:
    """A root folder with a daemon, before it runs."""

    links: Mapping[str, str]  # at the root: where to
    binds: Mapping[str, str]  # path in the root: folder of the host, read-only there
    files: Mapping[str, str]  # path in the root: text
    environment: Mapping[str, str]  # of the daemon, and so of what it runs
    interpreter: str | None = None  # of the host, for arm64 programs
    properties: Mapping[str, str] = dataclasses.field(default_factory=dict)  # Android's
    programs: Mapping[str, str] = dataclasses.field(default_factory=dict)  # path in the root: text


@dataclasses.dataclass(frozen=True)
class Phone:
    """A daemon that runs."""

    process: int  # on the host, of the namespaces' first process
    port: int
    log: pathlib.Path  # the daemons' output
    _channel: subprocess.Popen

    @property
    def address(self) -> str:
        """The daemon's address, for `adb connect`; of `run` alone."""
        return f"127.0.0.1:{self.port}"

    def prefix(self) -> list[str]:
        """Returns the words before a command that make it run within the namespaces.

        It sees the host's files and the daemon's network, and is in the folder that it is started in.
        """
        enter = ["nsenter", "--target", str(self.process), *_NAMESPACES, "--preserve-credentials"]
        return [*enter, "--", "sh", "-c", 'cd "$0" && exec "$@"', os.getcwd()]

    def run(self, command: Sequence, **options) -> subprocess.CompletedProcess:
        """Runs a command of the host within the namespaces, as subprocess.run does."""
        return subprocess.run([*self.prefix(), *map(str, command)], **options)

    def program(self, command: Sequence, path: str | os.PathLike) -> pathlib.Path:
        """Writes a program that runs a command within the namespaces, for tools that start adb."""
        path = pathlib.Path(path)
        path.write_text(
            f'#!/bin/sh\nexec {shlex.join([*self.prefix(), *map(str, command)])} "$@"\n'
        )
        path.chmod(0o755)
        return path

    def start_daemon(self, port: int) -> None:
        """Starts one more daemon, or one that was killed, and waits until it answers."""
        self._do({"do": "start", "port": port})

    def signal_daemon(self, port: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a daemon a signal: SIGKILL takes it away, SIGSTOP makes it hang."""
        self._do({"do": "signal", "port": port, "signal": int(number)})

    def _do(self, command):
        assert self._channel.stdin and self._channel.stdout
        try:
            self._channel.stdin.write(json.dumps(command) + "\n")
            self._channel.stdin.flush()
        except BrokenPipeError:
            pass  # what it said last is read below
        _answer(self._channel)


def amd64_system(folder: str | os.PathLike | None = None) -> System:
    """Returns a system with the daemon for this host's architecture; raises as `debian.unpack`."""
    folder = pathlib.Path(folder or cache.cache_folder() / "adbd-amd64").absolute()
    debian.unpack(arm_root.SHELL, folder, "amd64", arm_root.SUITE)
    return System(
        links={name: f"usr/{name}" for name in ("bin", "sbin", "lib", "lib64")},
        binds={"/usr": str(folder / "usr"), "/etc": str(folder / "etc")},
        files={},
        environment=_environment("/usr/lib/x86_64-linux-gnu/android"),
    )


def arm64_system(root: arm_root.ArmRoot, cpu: str) -> System:
    """Returns the emulated phone's system, as of one of arm_root.CPUS.

    Its Python has LiteRT; the plugin that counts is /plugin/icount.so: with
    QEMU_PLUGIN=file=/plugin/icount.so,out=FILE in front of a command it counts.
    """
    prefix = root.prefix(cpu)
    of_cpu = [path for path in prefix.rglob("*") if path.is_file() and not path.is_symlink()]
    qemu = root.qemu_folder
    return System(
        links={name: f"usr/{name}" for name in ("bin", "sbin", "lib")},
        binds={
            "/usr": str(root.system / "usr"),
            "/etc": str(root.system / "etc"),
            "/site": str(root.site),
            "/plugin": str(root.plugin.parent),
            # qemu starts inside the root, and needs its loader and its libraries there.
            "/lib64": str(qemu / "usr/lib64"),
            "/usr/lib/x86_64-linux-gnu": str(qemu / "usr/lib/x86_64-linux-gnu"),
        },
        files={f"/{path.relative_to(prefix)}": path.read_text() for path in of_cpu},
        environment=_environment("/usr/lib/aarch64-linux-gnu/android")
        | {
            "QEMU_CPU": arm_root.CPUS[cpu].emulated_as,
            "PYTHONPATH": "/site",
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        interpreter=str(qemu / "usr/bin/qemu-aarch64"),
        # phone.read_phone takes the maker for what it says.
        properties={
            "ro.product.model": "emulated arm64",
            "ro.product.cpu.abi": "arm64-v8a",
            "ro.soc.manufacturer": "QEMU",
            "ro.soc.model": cpu,
        },
        programs={"/system/bin/python3": '#!/bin/sh\nexec python3.11 "$@"\n'},
    )


def _environment(libraries):
    path = "/system/bin:/usr/bin:/usr/sbin"
    return {"PATH": path, "HOME": "/root", "LD_LIBRARY_PATH": libraries}


@contextlib.contextmanager
def phone(
    system: System,
    *,
    properties: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
    programs: Mapping[str, str] | None = None,
    data_bytes: int = DATA_BYTES,
    port: int = PORT,
) -> Iterator[Phone]:
    """Yields a daemon that runs; takes everything of it away when the block is done.

    Args:
      system: what it shows.
      properties: Android's, over those of the system, for getprop, which is a script here.
      files: more files of the root, text by absolute path; those of /proc lie over the kernel's.
      programs: more executable files, text by absolute path.
      data_bytes: what fits into /data/local/tmp.
      port: where the daemon listens, in its own network.

    Raises:
      NamespaceError: where the host forbids one of the namespaces or mounts, or has no unshare.
    """
    with tempfile.TemporaryDirectory(prefix="lowbit-phone-") as scratch:
        folder = pathlib.Path(scratch)
        (folder / "root").mkdir()
        spec = {
            "root": str(folder / "root"),
            "log": str(folder / "adbd.log"),
            "links": dict(system.links),
            "binds": dict(system.binds),
            "files": {**system.files, **(files or {})},
            "programs": {
                "/system/bin/getprop": _getprop({**system.properties, **(properties or {})}),
                **system.programs,
                **(programs or {}),
            },
            "environment": dict(system.environment),
            "interpreter": system.interpreter,
            "data_bytes": data_bytes,
            "daemon": _DAEMON,
        }
        command = ["unshare", *_NAMESPACES, "--map-root-user", "--fork", "--kill-child", "--"]
        try:
            process = subprocess.Popen(
                [*command, sys.executable, str(_INIT), json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        except FileNotFoundError as error:
            raise NamespaceError("the program unshare is missing: it is of util-linux") from error
        with process:
            try:
                inside = _answer(process)["process"]
                device = Phone(inside, port, folder / "adbd.log", process)
                device.start_daemon(port)
                yield device
            finally:
                assert process.stdin
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()  # its end


def _answer(process):
    """Returns the first process' next answer; raises NamespaceError where it says what is wrong."""
    line = process.stdout.readline()
    if not line:
        process.wait()
        said = process.stderr.read().strip().splitlines()[-1:]
        raise NamespaceError(f"no namespaces on this host: {'; '.join(said) or 'unshare ended'}")
    answer = json.loads(line)
    if "error" in answer:
        raise NamespaceError(f"the phone's namespaces: {answer['error']}")
    return answer


def _getprop(properties):
    """Returns Android's getprop as a shell script."""
    cases = "".join(
        f"{shlex.quote(name)}) printf '%s\\n' {shlex.quote(value)};;\n"
        for name, value in properties.items()
    )
    listed = "".join(
        f"printf '%s\\n' {shlex.quote(f'[{name}]: [{value}]')}\n"
        for name, value in properties.items()
    )
    return f'#!/bin/sh\ncase "$1" in\n{cases}"")\n{listed};;\n*) echo;;\nesac\n'
