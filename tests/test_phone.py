"""What a phone tells of itself, from what Android prints."""

import pytest

from lowbit.devices import phone

PIXEL_3 = "".join(
    f"processor\t: {core}\nBogoMIPS\t: 38.40\nCPU implementer\t: 0x{maker:x}\n"
    f"CPU architecture: 8\nCPU variant\t: 0x7\nCPU part\t: 0x{part:x}\nCPU revision\t: 12\n\n"
    for core, (maker, part) in enumerate([(0x51, 0x803)] * 4 + [(0x51, 0x802)] * 4)
)
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  level: 93
  scale: 100
  voltage: 4280
  temperature: 285
  technology: Li-ion
"""


def cpuinfo(parts):
    return "".join(
        f"processor\t: {core}\nCPU implementer\t: 0x41\nCPU part\t: 0x{part:x}\n\n"
        for core, part in enumerate(parts)
    )


def test_two_clusters_and_their_masks():
    khz = "".join(f"core {core} {1766400 if core < 4 else 2803200}\n" for core in range(8))
    little, big = phone.clusters(PIXEL_3 + khz)
    assert (little.name, little.cores, little.max_mhz, little.mask) == (
        *("little", (0, 1, 2, 3), 1766, "f"),
    )
    assert (big.name, big.cores, big.max_mhz, big.mask) == ("big", (4, 5, 6, 7), 2803, "f0")
    assert little.kind is None  # not one of Arm's own


def test_three_clusters_are_named_and_may_stand_in_any_order():
    # A Tensor G1: 4 x A55, 2 x A76, 2 x X1; the frequencies decide, not the numbers.
    parts = [0xD44, 0xD44, 0xD05, 0xD05, 0xD05, 0xD05, 0xD0B, 0xD0B]
    khz = dict(zip(range(8), [2802000] * 2 + [1803000] * 4 + [2253000] * 2, strict=True))
    text = cpuinfo(parts) + "".join(f"core {core} {value}\n" for core, value in khz.items())
    found = [(one.name, one.kind, one.cores, one.mask) for one in phone.clusters(text)]
    assert found == [
        ("little", "Cortex-A55", (2, 3, 4, 5), "3c"),
        ("mid", "Cortex-A76", (6, 7), "c0"),
        ("big", "Cortex-X1", (0, 1), "3"),
    ]


@pytest.mark.parametrize("lines", ["", "core 0 \ncore 1 \n", "core 0\ncore 1\n"])
def test_cores_without_a_frequency(lines):
    (found,) = phone.clusters(cpuinfo([0xD0B, 0xD0B]) + lines)
    assert (found.name, found.cores, found.max_mhz) == ("all", (0, 1), None)
    assert found.kind == "Cortex-A76"


def test_nothing_at_all():
    assert phone.clusters("") == ()
    assert phone.state("") == phone.State(None, None, None, ())


def test_state():
    text = (
        "zone battery 28500\nzone cpu-0-0-usr 41200\nzone BIG 45100\nzone soc_therm \n"
        "zone gpu-usr 99000\ngovernor schedutil\ngovernor schedutil\ngovernor performance\n"
    )
    found = phone.state(text + BATTERY)
    assert found == phone.State(45.1, 93, True, ("schedutil", "performance"))


@pytest.mark.parametrize("value, celsius", [(45100, 45.1), (451, 45.1), (45, 45)])
def test_every_unit_of_a_zone(value, celsius):
    assert phone.state(f"zone cpu {value}\n").temperature_celsius == pytest.approx(celsius)


def test_the_battery_where_the_processor_may_not_be_read():
    assert phone.state("zone cpu-0 \n" + BATTERY).temperature_celsius == 28.5
    charged = BATTERY.replace("USB powered: true", "USB powered: false")
    assert phone.state(charged).is_charging is False
