"""Android's debug bridge: one command at a time on one device, each failure with a name.

    device = connect(serial=None)                   the one that is attached; raises what is wrong else
    shell(device, "uname -m").stdout                "aarch64\\n"
    with work_folder(device) as folder:             a fresh folder on the device, removed at the end
        push(device, "model.tflite", f"{folder}/model.tflite")

Every command has a time limit: a client waits for ever for a device that has gone.
"""

import contextlib
import dataclasses
import fcntl
import re
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from lowbit.devices import cache

# Where Android lets the shell's user write and execute.
BASE = "/data/local/tmp"
PREFIX = "lowbit-"
_QUICK_SECONDS = 30
_PUSH_SECONDS = 600
# How long a device that is gone may take to come back before its folder is given up.
RETURN_SECONDS = 20
_STATES = {
    "offline": "is offline: unplug it, plug it in again, or `adb reconnect offline`",
    "unauthorized": "has not authorized this computer: unlock it and accept its question",
    "authorizing": "has not yet authorized this computer: unlock it and accept its question",
    "no permissions": "may not be opened by this user: udev rules for it are missing",
    "recovery": "is in recovery mode: boot Android",
    "sideload": "is in sideload mode: boot Android",
    "bootloader": "is in the bootloader: boot Android",
}
# What the client says, and what it means.
_GONE = re.compile(
    r"error: (?:closed|device offline|device still authorizing|device unauthorized|protocol fault|"
    r"no devices?/emulators? found|device '[^']*' not found|failed to read|connection reset)|"
    r"connect failed: closed",
    re.IGNORECASE,
)
_END = "lowbit-exit"
_ENDED = re.compile(rf"\n{_END} (\d+)\s*$")
_FULL = re.compile(r"No space left on device|ENOSPC", re.IGNORECASE)


class AdbError(OSError):
    """A device cannot be reached, or refuses what it was asked."""


class GoneError(AdbError):
    """A device that was there is not any more, or does not answer."""


class NoSpaceError(AdbError):
    """A device has no space left for a file."""


@dataclasses.dataclass(frozen=True)
class Device:
    """An attached device."""

    serial: str
    program: str  # the client
    description: Mapping[str, str]  # product, model, device, transport_id: what the client lists


@dataclasses.dataclass(frozen=True)
class Done:
    """A command that has run on a device."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        """Everything that it printed."""
        return f"{self.stdout}\n{self.stderr}"


def connect(serial: str | None = None, program: str = "adb") -> Device:
    """Returns the attached device of this serial number, or the only one.

    Args:
      serial: as `adb devices` lists it; None: there has to be exactly one.
      program: the client, a name on PATH or a path.

    Raises:
      AdbError: where the client is missing; where no device, several devices, or none of this serial
        number are attached; where it is offline or unauthorized.
    """
    if shutil.which(program) is None:
        raise AdbError(
            f"the program {program!r} is missing: install Android's platform tools "
            "(Debian and Ubuntu: apt-get install adb), or name it with --adb"
        )
    listed = devices(program)
    found = ", ".join(f"{one} ({state})" for one, state, _ in listed) or "none"
    if serial is None:
        ready = [entry for entry in listed if entry[1] == "device"]
        if len(ready) > 1:
            raise AdbError(f"several devices are attached ({found}): choose one with --serial")
        chosen = ready or listed
        if not chosen:
            raise AdbError(
                "no device is attached: enable USB debugging in its developer options and plug it in, "
                "or `adb connect ADDRESS:PORT`"
            )
    else:
        chosen = [entry for entry in listed if entry[0] == serial]
        if not chosen:
            raise AdbError(f"no device {serial!r} is attached; attached: {found}")
    name, state, description = chosen[0]
    if state != "device":
        what = _STATES.get(state, f"is in the state {state!r}, not 'device'")
        raise AdbError(f"device {name} {what}")
    return Device(name, program, description)


def devices(program: str = "adb") -> list[tuple[str, str, dict[str, str]]]:
    """Returns (serial, state, description) of every attached device."""
    done = _client(program, ["devices", "-l"], _QUICK_SECONDS, "adb devices")
    if done.returncode:
        raise AdbError(f"adb devices fails: {_last(done.text)}")
    listed = []
    for line in done.stdout.splitlines():
        # "no permissions (user in plugdev group; ...)" has spaces in its state.
        found = re.match(r"^(\S+)\s+(no permissions|\S+)(.*)$", line)
        if found is None or line.startswith(("List of devices", "*")):
            continue
        name, state, rest = found.groups()
        listed.append((name, state, dict(re.findall(r"(\w+):(\S+)", rest))))
    return listed


def shell(device: Device, command: str | Sequence[str], timeout_s: float = _QUICK_SECONDS) -> Done:
    """Runs a command on a device; its exit code and both streams come back.

    Args:
      device: of `connect`.
      command: a line for the device's shell, or arguments, which are quoted.
      timeout_s: after which it counts as gone.

    Raises:
      GoneError: where the device goes away, or does not answer in time.
    """
    line = command if isinstance(command, str) else shlex.join(command)
    subject = f"device {device.serial}: `{line.strip().splitlines()[0][:120]}`"
    # A client whose device goes away exits with 0, and Android 6 tells no exit code: the device's
    # shell says that it has come to the end.
    whole = f"sh -c {shlex.quote(line)}; printf '\\n{_END} %d\\n' $?"
    done = _client(device.program, ["-s", device.serial, "shell", whole], timeout_s, subject)
    found = _ENDED.search(done.stdout)
    if found is None:
        raise GoneError(f"{subject}: the device went away: {_last(done.text) or 'no answer'}")
    return Done(int(found.group(1)), done.stdout[: found.start()], done.stderr)


def is_there(device: Device) -> bool:
    """Returns whether a device answers."""
    try:
        done = _client(device.program, ["-s", device.serial, "get-state"], _QUICK_SECONDS, "")
    except GoneError:
        return False
    return done.returncode == 0 and done.stdout.strip() == "device"


def push(device: Device, local: str, remote: str) -> None:
    """Copies a file to a device; raises AdbError, and nothing of it is left, where that fails."""
    command = ["-s", device.serial, "push", local, remote]
    subject = f"device {device.serial}: copying {local} to {remote}"
    done = _client(device.program, command, _PUSH_SECONDS, subject)
    if done.returncode == 0:
        return
    said = _last(done.text)
    if _GONE.search(done.text) or not is_there(device):
        raise GoneError(f"{subject}: the device went away: {said}")
    with contextlib.suppress(GoneError):
        shell(device, ["rm", "-f", remote])
    if _FULL.search(done.text):
        raise NoSpaceError(f"{subject}: no space is left on it: {said}")
    raise AdbError(f"{subject}: {said}")


@contextlib.contextmanager
def work_folder(device: Device) -> Iterator[str]:
    """Yields a new folder on a device, and removes it and what runs in it, however the block ends.

    Folders that a killed run has left are removed first.  A device that goes away is given
    RETURN_SECONDS to come back; where it does not, the error says what is left on it.  One run at a
    time: raises AdbError while another of this host is at work on the device.
    """
    with _alone(device):
        remove(device, f"{BASE}/{PREFIX}*")
        yield from _folder(device)


@contextlib.contextmanager
def _alone(device):
    """Holds a lock of this host's for a device."""
    folder = cache.cache_folder() / "phones"
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]", "_", device.serial)
    with open(folder / f"{name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AdbError(f"device {device.serial}: another run is at work on it") from error
        yield


def _folder(device):
    folder = f"{BASE}/{PREFIX}{secrets.token_hex(4)}"
    made = shell(device, ["mkdir", "-p", folder])
    if made.returncode:
        kind = NoSpaceError if _FULL.search(made.text) else AdbError
        raise kind(f"device {device.serial}: {folder} cannot be made: {_last(made.text)}")
    try:
        yield folder
    except GoneError as error:
        if not _back(device):
            raise GoneError(f"{error}; {folder} is left on it, the next run removes it") from error
        remove(device, folder)
        raise
    except BaseException:
        with contextlib.suppress(AdbError):
            remove(device, folder)
        raise
    else:
        remove(device, folder)


def remove(device: Device, pattern: str) -> None:
    """Ends the programs that run in the folders of a pattern, and removes the folders."""
    # pid: written by the shell that became the program.  After a reboot it may be another program's:
    # what is ended is at work in the folder.
    shell(
        device,
        f"for folder in {pattern}; do "
        'if [ -f "$folder/pid" ]; then pid=$(cat "$folder/pid"); '
        'if [ "$(readlink "/proc/$pid/cwd")" = "$folder" ]; then kill -9 "$pid"; fi; fi; '
        'rm -rf "$folder"; done',
    )


def _back(device):
    command = ["-s", device.serial, "wait-for-device"]
    try:
        done = _client(device.program, command, RETURN_SECONDS, "")
    except GoneError:
        return False
    return done.returncode == 0 and is_there(device)


def _client(program, arguments, timeout_s, subject):
    """Runs the client; raises GoneError where it does not end in time."""
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise GoneError(f"{subject}: no answer within {timeout_s:g} s") from error
    except OSError as error:
        raise AdbError(f"the program {program!r} cannot be run: {error}") from error
    texts = (stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
    stdout, stderr = (text.replace("\r\n", "\n") for text in texts)
    return Done(done.returncode, stdout, stderr)


def _last(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[-2:])
