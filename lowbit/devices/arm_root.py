"""An emulated arm64 phone's files: Debian's arm64 Python with LiteRT, and the qemu that runs them.

    python -m lowbit.devices.arm_root

sets it up in the cache (`cache.cache_folder`) with apt, pip and gcc; nothing is installed and no
rights are needed.  Linux on x86-64 with Debian's apt sources alone.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
import zipfile

from lowbit import progress
from lowbit.devices import cache, debian

# What runs in the emulator is what runs here, so that codes can be compared; tests pin these.
WHEELS = (
    "ai-edge-litert==2.3.0",
    "numpy==2.4.6",
    "ml_dtypes==0.6.0",
    "protobuf==7.36.2",
    "flatbuffers==25.12.19",
    "backports.strenum==1.2.8",
    "typing_extensions==4.16.0",
    "tqdm==4.70.1",
)
# The daemon of adb and a shell's programs, as a phone has them, beside what LiteRT needs.
SHELL = ("adbd", "dash", "coreutils", "util-linux", "grep", "sed")
PACKAGES = ("python3.11", "libstdc++6", "libatomic1", *SHELL)
SUITE = "bookworm-backports"  # there is no adbd before it
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux2014", "manylinux_2_17")
_COMPILE = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra")
_ICOUNT = pathlib.Path(__file__).with_name("icount.c")
_BASE_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_DOT_FEATURES = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop "
    "asimddp"
)


class ArmRootError(OSError):
    """The emulated phone cannot be set up or run on this host."""


@dataclasses.dataclass(frozen=True)
class Cpu:
    """A core as its register MIDR_EL1 and Linux describe it."""

    midr: int
    features: str  # Linux' names, of /proc/cpuinfo
    khz: int
    emulated_as: str  # what qemu calls the core whose instructions it then has

    def cpuinfo(self) -> str:
        """Returns Linux' description of one core, as in /proc/cpuinfo."""
        return (
            f"processor\t: 0\nBogoMIPS\t: 49.15\nFeatures\t: {self.features}\n"
            f"CPU implementer\t: {self.midr >> 24:#04x}\nCPU architecture: 8\n"
            f"CPU variant\t: {self.midr >> 20 & 0xF:#x}\n"
            f"CPU part\t: {self.midr >> 4 & 0xFFF:#05x}\nCPU revision\t: {self.midr & 0xF}\n\n"
        )


# Not qemu's "max": with version 7.2 XNNPACK's kernels of SME compute wrongly there, by up to 110
# codes.  The A53, of 2012, has no dot products of int8; the others have.  qemu 7.2 does not know the
# A55: its description leads to XNNPACK's kernels for it, whose instructions the A76 has all.
CPUS = {
    "cortex-a53": Cpu(0x410FD034, _BASE_FEATURES, 1_500_000, "cortex-a53"),
    "cortex-a55": Cpu(0x412FD050, _DOT_FEATURES, 1_803_000, "cortex-a76"),
    "cortex-a76": Cpu(0x414FD0B1, f"{_DOT_FEATURES} ssbs", 2_253_000, "cortex-a76"),
}


@dataclasses.dataclass(frozen=True)
class ArmRoot:
    """Where the emulated phone's files lie."""

    folder: pathlib.Path
    versions: dict[str, str]  # of qemu, the plugin, Debian's packages and the wheels that matter

    @property
    def system(self) -> pathlib.Path:
        """The folder of Debian's arm64 packages."""
        return self.folder / "system"

    @property
    def site(self) -> pathlib.Path:
        """The folder of the arm64 wheels, for PYTHONPATH."""
        return self.folder / "site"

    @property
    def qemu_folder(self) -> pathlib.Path:
        """The folder of qemu and its libraries, for this host's architecture."""
        return self.folder / "qemu"

    @property
    def plugin(self) -> pathlib.Path:
        """The plugin that counts instructions."""
        return self.folder / "plugin/icount.so"

    def prefix(self, cpu: str) -> pathlib.Path:
        """Returns the folder in which qemu looks first for absolute paths: the system as of a CPU."""
        check_cpu(cpu)
        return self.folder / "cpus" / cpu

    def qemu(self, cpu: str, counts: str | os.PathLike | None = None) -> list[str]:
        """Returns the command that runs an arm64 program on one of CPUS; the program follows.

        Args:
          cpu: one of CPUS.
          counts: where the plugin writes; None: nothing is counted.
        """
        libraries = self.qemu_folder / "usr/lib/x86_64-linux-gnu"
        # Its own loader and libraries: the host's may be older or newer than Debian's.
        command = [self.qemu_folder / "lib64/ld-linux-x86-64.so.2", "--library-path", libraries]
        command += [self.qemu_folder / "usr/bin/qemu-aarch64", "-L", self.prefix(cpu)]
        command += ["-cpu", CPUS[cpu].emulated_as]
        if counts is not None:
            command += ["-plugin", f"file={self.plugin},out={counts}"]
        return [str(word) for word in command]

    def python(
        self, cpu: str, counts: str | os.PathLike | None = None, keep_bytecode: bool = False
    ) -> list[str]:
        """Returns the command that runs the emulated Python, with LiteRT; its arguments follow.

        To be run in an empty environment: the emulated program would get this process' own.
        """
        prefix = self.prefix(cpu)
        settings = {
            "PYTHONHOME": prefix / "usr",
            "PYTHONPATH": self.site,
            "PYTHONHASHSEED": "0",  # with another one other instructions run
            "PYTHONDONTWRITEBYTECODE": "" if keep_bytecode else "1",
        }
        command = self.qemu(cpu, counts)
        for name, value in settings.items():
            command += ["-E", f"{name}={value}"]
        return [*command, str(prefix / "usr/bin/python3.11")]


def check_cpu(cpu: str) -> None:
    """Raises ValueError where a CPU is not one of CPUS."""
    if cpu not in CPUS:
        raise ValueError(f"CPU {cpu!r} is not one of {', '.join(CPUS)}")


def check_host() -> None:
    """Raises ArmRootError where the emulated phone cannot be set up: off Linux on x86-64."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ArmRootError(
            f"the emulated phone needs Linux on x86_64; this is {platform.system()} on "
            f"{platform.machine()}"
        )


def set_up(folder: str | os.PathLike | None = None) -> ArmRoot:
    """Returns the emulated phone, which is set up where it is not there already: once, a minute.

    Args:
      folder: where it goes; None: arm in the cache.

    Raises:
      ArmRootError: off Linux on x86-64, and where gcc, pip or a wheel is missing.
      DebianError: where Debian's packages cannot be had.
    """
    check_host()
    folder = pathlib.Path(folder or cache.cache_folder() / "arm").absolute()
    if not (folder / "plugin").exists():
        _compiler()  # before minutes of downloads
    root = ArmRoot(folder, {})
    steps = {
        "qemu": lambda: _qemu(folder / "qemu"),
        "Debian arm64": lambda: _system(folder / "system"),
        "wheels": lambda: cache.build_once(folder / "site", {"wheels": sorted(WHEELS)}, _wheels),
        "plugin": lambda: cache.build_once(folder / "plugin", _plugin_request(), _plugin),
        "CPUs": lambda: cache.build_once(folder / "cpus", _cpus_request(), _cpus),
    }
    facts = {}
    started = folder / "started"
    # Silent where all is there: it then takes no time.
    title = contextlib.nullcontext() if started.exists() else progress.bar("emulated phone", 6)
    with title as update:
        for number, (name, step) in enumerate(steps.items(), 1):
            facts[name] = step()
            if update:
                update(number, name)
        cache.build_once(started, facts, lambda _: _first_start(root))
        if update:
            update(6, "first start")
    versions = {
        "qemu": facts["qemu"]["qemu-user"],
        "python": facts["Debian arm64"]["python3.11"],
        "adbd": facts["Debian arm64"]["adbd"],
        "icount": facts["plugin"]["source"],
        **dict(wheel.split("==") for wheel in WHEELS[:2]),
    }
    return dataclasses.replace(root, versions=versions)


def _qemu(folder):
    """Unpacks qemu, without what it has for other architectures: 110 MB."""
    versions = debian.unpack(["qemu-user"], folder)
    for other in (folder / "usr/bin").glob("qemu-*"):
        if other.name != "qemu-aarch64":
            other.unlink(missing_ok=True)
    return versions


def _system(folder):
    """Unpacks Debian's arm64 packages, with a place for the libraries of qemu (namespace.py)."""
    versions = debian.unpack(PACKAGES, folder, "arm64", SUITE)
    (folder / "usr/lib/x86_64-linux-gnu").mkdir(exist_ok=True)
    return versions


def _first_start(root):
    """Imports LiteRT in the emulator, which keeps Python's bytecode: later starts take 1 s, not 4."""
    command = root.python("cortex-a53", keep_bytecode=True)
    command += ["-c", "from ai_edge_litert import interpreter"]
    _check_call(command, "the emulated Python", {})
    return {}


def _wheels(folder):
    """Fetches the arm64 wheels with pip, and unpacks them."""
    downloads = folder / "downloads"
    platforms = [f"--platform={name}_aarch64" for name in _PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--python-version=3.11", "--implementation=cp"]
    command += ["--abi=cp311", "--abi=abi3", "--abi=none", *platforms, "--platform=any"]
    _check_call([*command, f"--dest={downloads}", *WHEELS], "the arm64 wheels")
    for wheel in sorted(downloads.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    shutil.rmtree(downloads)
    return {}


def _plugin_request():
    source = hashlib.sha256(_ICOUNT.read_bytes()).hexdigest()
    return {"source": source, "compile": list(_COMPILE)}


def _compiler():
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise ArmRootError("a C compiler is missing for the plugin that counts: install gcc")
    return compiler


def _plugin(folder):
    """Compiles the plugin."""
    _check_call([_compiler(), *_COMPILE, "-o", folder / "icount.so", _ICOUNT], "icount.c")
    return {"source": _plugin_request()["source"][:12]}


def _cpus_request():
    return {"cpus": {name: dataclasses.asdict(cpu) for name, cpu in CPUS.items()}}


def _cpus(folder):
    """Lays the system's folders and the description of a CPU side by side, for each CPU.

    qemu 7.2 shows a program the host's /proc/cpuinfo, of another architecture: XNNPACK's look at it
    ends in a segmentation fault.  A file of that name in qemu's prefix is read instead.  It must
    fit `-cpu`: of a newer core it leads to kernels that are illegal instructions on an older one.
    """
    for name, cpu in CPUS.items():
        prefix = folder / name
        files = {
            "proc/cpuinfo": cpu.cpuinfo(),
            "sys/devices/system/cpu/kernel_max": "0\n",
            "sys/devices/system/cpu/possible": "0\n",
            "sys/devices/system/cpu/present": "0\n",
            "sys/devices/system/cpu/online": "0\n",
            "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": f"{cpu.khz}\n",
            "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_min_freq": "300000\n",
            "sys/devices/system/cpu/cpu0/topology/physical_package_id": "0\n",
            "sys/devices/system/cpu/cpu0/topology/cluster_cpus_list": "0\n",
            "sys/devices/system/cpu/cpu0/topology/core_siblings_list": "0\n",
            "sys/devices/system/cpu/cpu0/topology/core_id": "0\n",
        }
        for path, text in files.items():
            (prefix / path).parent.mkdir(parents=True, exist_ok=True)
            (prefix / path).write_text(text)
        for link in ("bin", "lib", "usr"):
            (prefix / link).symlink_to(f"../../system/{link}")
    return {}


def _check_call(command, subject, environment=None):
    """Runs a program; raises ArmRootError with its last lines where it fails."""
    words = list(map(str, command))
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ArmRootError(
            f"{subject}: {pathlib.Path(command[0]).name} fails: {'; '.join(said[-3:])}"
        )


def size_bytes(folder: pathlib.Path) -> int:
    """Returns what a folder's files take on disk."""
    found = (path.lstat() for path in folder.rglob("*"))
    return sum(status.st_blocks * 512 for status in found)


def main() -> None:
    """Sets up the emulated phone, and says where it is, how long it took and how large it is."""
    start = time.monotonic()
    try:
        root = set_up()
    except OSError as error:
        sys.exit(f"error: {error}")
    seconds = time.monotonic() - start
    print(f"{root.folder}: {size_bytes(root.folder) / 1e6:.0f} MB, {seconds:.0f} s")
    for name, version in root.versions.items():
        print(f"  {name} {version}")


if __name__ == "__main__":
    main()
