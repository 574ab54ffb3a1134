"""What an Android device is, and what state it is in: model, chip, cores, heat.

Each fact is None where a device does not tell it: many forbid the shell's user to read the
processor's temperature.
"""

import dataclasses
import re

from lowbit.devices import adb

# /proc/cpuinfo's "CPU part" of Arm's own cores ("CPU implementer" 0x41).
ARM_CORES = {
    0xD03: "Cortex-A53",
    0xD04: "Cortex-A35",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76",
    0xD0D: "Cortex-A77",
    0xD41: "Cortex-A78",
    0xD44: "Cortex-X1",
    0xD46: "Cortex-A510",
    0xD47: "Cortex-A710",
    0xD48: "Cortex-X2",
    0xD4D: "Cortex-A715",
    0xD4E: "Cortex-X3",
    0xD80: "Cortex-A520",
    0xD81: "Cortex-A720",
    0xD82: "Cortex-X4",
}
_ARM = 0x41
# By their number, from the slowest.
_CLUSTER_NAMES = {
    1: ("all",),
    2: ("little", "big"),
    3: ("little", "mid", "big"),
    4: ("little", "mid", "mid2", "big"),
}
# One command, since each takes a round trip: the last lines are of what may be forbidden.
_STATE_COMMAND = """
for zone in /sys/class/thermal/thermal_zone*; do
  echo "zone $(cat $zone/type 2>/dev/null) $(cat $zone/temp 2>/dev/null)"
done
for core in /sys/devices/system/cpu/cpu[0-9]*; do
  echo "governor $(cat $core/cpufreq/scaling_governor 2>/dev/null)"
done
dumpsys battery 2>/dev/null
"""
_CORES_COMMAND = """
cat /proc/cpuinfo
for core in /sys/devices/system/cpu/cpu[0-9]*; do
  echo "core ${core##*/cpu} $(cat $core/cpufreq/cpuinfo_max_freq 2>/dev/null)"
done
"""
_CPU_ZONE = re.compile(r"cpu|little|big|mid|cluster|soc", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Cores of one speed."""

    name: str  # little, mid, big; all
    cores: tuple[int, ...]
    max_mhz: int | None
    kind: str | None  # "Cortex-A76"

    @property
    def mask(self) -> str:
        """Returns what taskset takes: hexadecimal, a bit for each core."""
        return f"{sum(1 << core for core in self.cores):x}"


@dataclasses.dataclass(frozen=True)
class Phone:
    """What does not change while the device is on."""

    serial: str
    model: str | None
    soc: str | None
    abi: str | None
    android: str | None
    clusters: tuple[Cluster, ...]  # from the slowest
    is_emulated: bool


@dataclasses.dataclass(frozen=True)
class State:
    """What changes."""

    temperature_celsius: float | None  # of the hottest processor zone, else of the battery
    battery_percent: int | None
    is_charging: bool | None
    governors: tuple[str, ...]  # of the clusters: "schedutil", "performance"


def read_phone(device: adb.Device) -> Phone:
    """Reads what a device is; raises adb.GoneError where it goes away."""
    properties = _properties(adb.shell(device, "getprop").stdout)
    machine = adb.shell(device, "uname -m").stdout.strip() or None
    cores = adb.shell(device, _CORES_COMMAND).stdout
    maker = properties.get("ro.soc.manufacturer")
    soc = properties.get("ro.soc.model") or properties.get("ro.board.platform")
    return Phone(
        serial=device.serial,
        model=properties.get("ro.product.model") or device.description.get("model"),
        soc=f"{maker} {soc}" if maker and soc else soc,
        abi=properties.get("ro.product.cpu.abi") or machine,
        android=properties.get("ro.build.version.release"),
        clusters=clusters(cores),
        # Android's own emulator sets the first two, the root of `arm_root` the third.
        is_emulated="1" in (properties.get("ro.boot.qemu"), properties.get("ro.kernel.qemu"))
        or maker == "QEMU",
    )


def read_state(device: adb.Device) -> State:
    """Reads a device's state; raises adb.GoneError where it goes away."""
    return state(adb.shell(device, _STATE_COMMAND).stdout)


def clusters(text: str) -> tuple[Cluster, ...]:
    """Returns the clusters in /proc/cpuinfo and lines "core 0 1803000" (kHz), the slowest first.

    Cores that tell no frequency are one cluster for each kind of core.
    """
    kinds: dict[int, str | None] = {}
    number, maker = None, None
    khz: dict[int, int | None] = {}
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "processor" and value.isdigit():
            number = int(value)
            kinds[number] = None
        elif key == "CPU implementer":
            maker = _integer(value)
        elif key == "CPU part" and number is not None and maker == _ARM:
            kinds[number] = ARM_CORES.get(_integer(value) or 0)
        elif found := re.match(r"^core (\d+) ?(\d*)$", line.strip()):
            khz[int(found.group(1))] = int(found.group(2)) if found.group(2) else None
    groups: dict[tuple, list[int]] = {}
    for core in sorted({*kinds, *khz}):
        # A core is known by its frequency; where none is told, by its kind.
        key = (khz.get(core) or 0, kinds.get(core) if not khz.get(core) else None)
        groups.setdefault(key, []).append(core)
    ordered = sorted(groups.items(), key=lambda group: (group[0][0], group[1]))
    names = _CLUSTER_NAMES.get(len(ordered)) or tuple(f"cluster{i}" for i in range(len(ordered)))
    return tuple(
        Cluster(name, tuple(cores), key[0] // 1000 or None, kinds.get(cores[0]))
        for name, (key, cores) in zip(names, ordered, strict=True)
    )


def state(text: str) -> State:
    """Returns the state in the lines that a device printed."""
    heat, governors, battery = [], [], {}
    for line in text.splitlines():
        if found := re.match(r"^zone (.*) (-?\d+)$", line):
            # Thousandths of a degree, on some devices tenths or whole ones.
            name, value = found.group(1), int(found.group(2))
            degrees = value / 1000 if abs(value) >= 1000 else value / 10 if value >= 150 else value
            if _CPU_ZONE.search(name) and 0 < degrees < 150:
                heat.append(degrees)
        elif found := re.match(r"^governor (\S+)$", line):
            governors.append(found.group(1))
        elif found := re.match(r"^  ([\w ]+): (\S+)$", line):
            battery[found.group(1)] = found.group(2)
    tenths = _integer(battery.get("temperature"))
    powered = [battery[key] for key in battery if key.endswith("powered")]
    return State(
        temperature_celsius=max(heat) if heat else None if tenths is None else tenths / 10,
        battery_percent=_integer(battery.get("level")),
        is_charging=("true" in powered) if powered else None,
        governors=tuple(dict.fromkeys(governors)),
    )


def _properties(text):
    """Returns getprop's lines "[key]: [value]" as a dict."""
    pairs = re.findall(r"^\[([^]]+)\]: \[(.*)\]$", text, re.MULTILINE)
    return {key: value for key, value in pairs if value}


def _integer(text):
    try:
        return int(text, 0)
    except (TypeError, ValueError):
        return None
