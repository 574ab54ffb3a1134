"""A `.tflite` file compiled ahead of time for a Snapdragon's NPU, the Hexagon Tensor Processor.

    compile_for(content, "SM8650", "model.tflite").content

LiteRT's Qualcomm plugin, in the wheel of ai-edge-litert, replaces the operators that the NPU takes by
one custom operator that holds its program; LiteRT on the phone runs the rest on the CPU.  The plugin
needs Qualcomm's libraries: those of onnxruntime-qnn, of the extra `[hexagon]`, whose licence
docs/hexagon.md tells.  One that it is linked to, libQnnLpai.so, is not among them and nothing of it is
used: an empty library of that name is built with gcc.

What is delegated says nothing about integers: the NPU takes a float file, too, and computes in fp16.
"""

import dataclasses
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile

from lowbit import lint, runtimes, tflite_file, tflite_view
from lowbit.devices import pinned, remaining

# Built for one another, nearly: the plugin for QNN 2.50, the libraries are QNN 2.51.
VERSIONS = {"ai-edge-litert": "2.3.0", "onnxruntime-qnn": "2.7.0"}
# Those that the plugin of this version compiles for.
SOCS = {
    "SA8255": "automotive",
    "SA8295": "automotive",
    "SM8350": "Snapdragon 888",
    "SM8450": "Snapdragon 8 Gen 1",
    "SM8475": "Snapdragon 8+ Gen 1",
    "SM8550": "Snapdragon 8 Gen 2",
    "SM8650": "Snapdragon 8 Gen 3",
    "SM8750": "Snapdragon 8 Elite",
    "SM8845": "Snapdragon 8 Gen 5",
    "SM8850": "Snapdragon 8 Elite Gen 5",
}
_LIBRARIES = ("libQnnHtp", "libQnnIr", "libQnnSaver", "libQnnSystem", "libHtpPrepare")
_STUB = "libQnnLpai.so"
_SELECTED = re.compile(r"selected (\d+) ops, from a total of (\d+) ops\. resulted in (\d+) part")
_DISPATCH = "DISPATCH_OP"
_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled file, and what of it the NPU runs."""

    content: bytes
    operators: int  # of the file before
    delegated: int
    partitions: int  # programs of the NPU; between two the CPU computes
    left: tuple[str, ...]  # to the CPU: "GATHER 3 (makes 'rows')"
    integer: bool  # the file before holds no float tensor: the NPU computes in integers


def compile_for(content: bytes, soc: str, name: str = "model") -> Compiled:
    """Compiles a file of anyone's.

    Args:
      content: the file; it is verified first (`lint.verify`).
      soc: one of `SOCS`.
      name: for error messages.

    Raises:
      TFLiteFileError: for a damaged file.
      runtimes.RefusedError: where the compiler fails, dies, or takes nothing of the file.
      ValueError: for an unknown SoC, a package that is missing or another version, or without gcc.
    """
    check_soc(soc)
    check_installed()
    lint.verify(content, name)
    operators = len(remaining.operators(content, _DISPATCH, name))
    with tempfile.TemporaryDirectory() as folder:
        compiled, said = _compile(content, soc, pathlib.Path(folder), name)
    counts = [tuple(map(int, found)) for found in _SELECTED.findall(said)]
    delegated, partitions = (sum(each[index] for each in counts) for index in (0, 2))
    if not delegated:
        raise runtimes.RefusedError(
            f"{name}: the compiler for {soc} takes none of the {operators} operators"
        )
    return Compiled(
        compiled,
        operators,
        delegated,
        partitions,
        tuple(label for _, label in remaining.left(content, compiled, _DISPATCH, name)),
        _is_integer(content, name),
    )


def check_soc(soc: str) -> None:
    """Raises ValueError, which names the known ones, for an unknown SoC."""
    if soc not in SOCS:
        known = ", ".join(f"{each} ({name})" for each, name in SOCS.items())
        raise ValueError(f"SoC {soc!r} is not one of {known}")


def check_installed() -> None:
    """Raises ValueError where a package is missing or another version, or there is no gcc."""
    pinned.check(VERSIONS, "hexagon", "compiling is known to work with")
    if shutil.which("gcc") is None:
        raise ValueError(
            f"gcc is missing: LiteRT's plugin is linked to {_STUB}, of which it uses nothing and for "
            "which an empty library is built; apt-get install gcc"
        )


def _compile(content, soc, folder, name):
    """Returns (the compiled file, what the compiler said)."""
    import ai_edge_litert  # here: found only where it is installed, as is checked before

    package = pathlib.Path(next(iter(ai_edge_litert.__path__)))
    site = package.parent
    for library in _LIBRARIES:
        (folder / f"{library}.so").symlink_to(site / "onnxruntime_qnn" / f"{library}.so")
    _build_stub(folder / _STUB)
    before, after = folder / "before.tflite", folder / "after.tflite"
    before.write_bytes(content)
    command = [
        str(package / "tools" / "apply_plugin_main"),
        "--cmd=apply",
        f"--model={before}",
        f"--o={after}",
        "--soc_manufacturer=Qualcomm",
        f"--soc_model={soc}",
        "--err=--",
        f"--libs={package / 'vendors' / 'qualcomm' / 'compiler'}",
    ]
    # Beside the libraries lie those of C++ that they were built with.
    paths = f"{folder}{os.pathsep}{site / 'onnxruntime_qnn.libs'}"
    subject = f"{name}: the compiler for {soc}"
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"LD_LIBRARY_PATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise runtimes.RefusedError(f"{subject} does not end within {_SECONDS} s") from error
    said = done.stdout.decode("utf-8", "replace")
    if done.returncode < 0:
        raise runtimes.RefusedError(
            f"{subject} dies of it: {signal.Signals(-done.returncode).name}"
        )
    if done.returncode or not after.exists():
        errors = [line for line in said.splitlines() if "ERROR" in line or "Failed" in line]
        raise runtimes.RefusedError(f"{subject} refuses it: {'; '.join(errors[-3:])}")
    return after.read_bytes(), said


def _build_stub(path):
    """Writes an empty shared library."""
    done = subprocess.run(
        ["gcc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{_STUB}", "-o", str(path)],
        input=b"int lowbit_stub;",
        capture_output=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ValueError(f"gcc cannot build {_STUB}: {said[-1] if said else done.returncode}")


def _is_integer(content, name):
    graphs, _ = tflite_view.describe(tflite_file.parse(content, name), content)
    return not any(
        tensor.dtype.startswith(("float", "bfloat")) for graph in graphs for tensor in graph.tensors
    )
