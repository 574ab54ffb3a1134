"""Arm's compiler Vela for Ethos-U NPUs: cycles and memory that it estimates, and what it leaves out.

    estimate(content, "ethos-u55-128", "model.tflite").estimated_ms

Vela runs in a process of its own: files that it does not expect kill it.  Its times are those of a
model of the NPU and its memories, of the operators on the NPU alone; nothing is run.  Needs the
package ethos-u-vela, of the extra `[npu]`.
"""

import csv
import dataclasses
import pathlib
import re
import tempfile

from lowbit import lint, runtimes
from lowbit.devices import pinned, remaining

VERSION = "5.2.0"  # its estimates change from version to version
# accelerator: (system configuration, memory mode) of Vela's own vela.ini, the ones that Vela takes
# where none is named.  The number behind the name is of multiply-accumulates in a cycle.
ACCELERATORS = {
    "ethos-u55-128": ("Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "ethos-u55-256": ("Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "ethos-u65-512": ("Ethos_U65_Client_Server", "Dedicated_Sram_384KB"),
    "ethos-u85-256": ("Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB"),
}
_COMPILE = "import sys; from ethosu.vela import vela; sys.exit(vela.main(sys.argv[1:]))"
_REASON = re.compile(r"operator: \S+, ofm: '(.*)'\nReason: (.*)")
_NPU = "ethos-u"  # the custom operator that stands for all that runs there


class NothingOnNpuError(ValueError):
    """Vela leaves the whole file to the CPU, such as one that computes in float."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What Vela says of a file on one accelerator; times and memory are of the NPU's part alone."""

    accelerator: str
    system_config: str
    memory_mode: str
    clock_hz: float
    cycles: int  # compute and memory, as they overlap
    estimated_ms: float  # of one inference, cycles at that clock
    macs: int  # multiply-accumulates
    sram_bytes: int
    dram_bytes: int
    flash_bytes: int  # on the chip and off it
    operators: int  # of the file
    npu_operators: int
    cpu_operators: tuple[str, ...]  # "SOFTMAX 3 (makes 'probabilities'): why"


def check_installed() -> None:
    """Raises ValueError where Vela is missing, or is another version."""
    pinned.check({"ethos-u-vela": VERSION}, "npu", "estimates are those of")


def estimate(content: bytes, accelerator: str, name: str = "model") -> Estimate:
    """Compiles a file of anyone's for an accelerator, and returns what Vela estimates.

    Args:
      content: the file; it is verified first (`lint.verify`).
      accelerator: one of `ACCELERATORS`.
      name: for error messages.

    Raises:
      TFLiteFileError: for a damaged file.
      NothingOnNpuError: where no operator runs on the NPU, which would count as no time at all.
      runtimes.RefusedError: where Vela refuses the file or dies of it.
      ValueError: where the package is missing, or the accelerator is not known.
    """
    if accelerator not in ACCELERATORS:
        raise ValueError(f"accelerator {accelerator!r} is not one of {', '.join(ACCELERATORS)}")
    check_installed()
    lint.verify(content, name)
    system_config, memory_mode = ACCELERATORS[accelerator]
    with tempfile.TemporaryDirectory() as folder:
        given = pathlib.Path(folder, "model.tflite")
        given.write_bytes(content)
        done = runtimes.in_child(
            _COMPILE,
            (
                str(given),
                f"--accelerator-config={accelerator}",
                "--config=Arm/vela.ini",
                f"--system-config={system_config}",
                f"--memory-mode={memory_mode}",
                f"--output-dir={folder}",
                "--show-cpu-operations",
            ),
            b"",
            f"{name}: Vela ({accelerator})",
        )
        compiled = given.with_name("model_vela.tflite").read_bytes()
        (summary,) = pathlib.Path(folder).glob("model_summary_*.csv")
        with open(summary, newline="") as file:
            (row,) = csv.DictReader(file)
    operators = len(remaining.operators(content, _NPU, name))
    reasons = dict(_REASON.findall(done.stdout.decode("utf-8", "replace")))
    left = tuple(
        f"{label}: {reasons.get(output, 'no reason given')}"
        for output, label in remaining.left(content, compiled, _NPU, name)
    )
    if len(left) == operators:
        first = f", the first, {left[0]}" if left else ""
        raise NothingOnNpuError(f"{name}: Vela leaves all {operators} operators to the CPU{first}")
    return Estimate(
        accelerator,
        system_config,
        memory_mode,
        clock_hz=float(row["core_clock"]),
        cycles=int(row["cycles_total"]),
        estimated_ms=1e3 * float(row["inference_time"]),
        macs=int(row["nn_macs"]),
        sram_bytes=_bytes(row, "sram"),
        dram_bytes=_bytes(row, "dram"),
        flash_bytes=_bytes(row, "on_chip_flash") + _bytes(row, "off_chip_flash"),
        operators=operators,
        npu_operators=operators - len(left),
        cpu_operators=left,
    )


def _bytes(row, memory):
    return round(1024 * float(row[f"{memory}_memory_used"]))
