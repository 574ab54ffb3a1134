"""C source: a `.tflite` file as an aligned array in a `.c` and a `.h`, for microcontrollers.

    python -m export.c_source --model=model.tflite --output=firmware/model.c

The array is 16-byte aligned, as TensorFlow Lite Micro's interpreter reads it in place, and constant, so
that a linker leaves it in flash.
"""

import dataclasses
import os
import re
import time

import numpy as np

import lowbit
from lowbit import cli, files, tflite_file

BYTES_A_LINE = 12


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A .tflite file of any tool.")
    output: str = cli.field("model.c", "The .c file; the .h file goes beside it.")
    name: str | None = cli.field(
        None, "Of the array in C; default: the output's, as an identifier."
    )


def export(config: Config) -> dict:
    """Runs the command; returns its result row.

    Raises:
      ValueError: where --output is no .c file or --name no identifier.
      TFLiteFileError: where --model is no .tflite file.
    """
    start = time.monotonic()
    stem, suffix = os.path.splitext(config.output)
    if suffix != ".c":
        raise ValueError(f"--output {config.output} does not end in .c")
    name = config.name or re.sub(r"\W", "_", os.path.basename(stem), flags=re.ASCII)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(
            f"--name: {name!r} is no identifier of C; letters, digits and _ are allowed"
        )
    content = tflite_file.load_bytes(config.model)
    tflite_file.parse(content, config.model)
    header = f"{stem}.h"
    source, declaration = sources(content, name, os.path.basename(header))
    files.save_bytes(source.encode(), config.output)
    files.save_bytes(declaration.encode(), header)
    return {
        "tool": "export.c_source",
        "model": config.model,
        "output": config.output,
        "header": header,
        "name": name,
        "size_bytes": len(content),
        "seconds": round(time.monotonic() - start, 3),
        "versions": {"lowbit": lowbit.__version__, "numpy": np.__version__},
    }


def sources(content: bytes, name: str, header: str) -> tuple[str, str]:
    """Returns the text of the .c and of the .h; C99 and C++ compilers take both.

    Args:
      content: the bytes of the array.
      name: its identifier; NAME_size_bytes is its length.
      header: the file name that the .c includes.
    """
    lines = (
        ", ".join(f"0x{value:02x}" for value in content[begin : begin + BYTES_A_LINE])
        for begin in range(0, len(content), BYTES_A_LINE)
    )
    values = ",\n    ".join(lines)
    # In C++ a constant has internal linkage unless the header's declaration came before it.
    source = (
        f'#include "{header}"\n\n'
        "#if defined(__GNUC__) || defined(__clang__)\n"
        "#define ALIGNED __attribute__((aligned(16)))\n"
        "#elif defined(__cplusplus)\n"
        "#define ALIGNED alignas(16)\n"
        "#else\n"
        "#define ALIGNED _Alignas(16)\n"
        "#endif\n\n"
        f"ALIGNED const unsigned char {name}[{len(content)}] = {{\n    {values}}};\n"
        f"const unsigned int {name}_size_bytes = {len(content)};\n"
    )
    guard = f"{name.upper()}_H_"
    declaration = (
        f"#ifndef {guard}\n#define {guard}\n\n"
        '#ifdef __cplusplus\nextern "C" {\n#endif\n\n'
        f"extern const unsigned char {name}[{len(content)}];\n"
        f"extern const unsigned int {name}_size_bytes;\n\n"
        "#ifdef __cplusplus\n}\n#endif\n\n"
        f"#endif  // {guard}\n"
    )
    return source, declaration


def main() -> None:
    """Runs the command line."""
    cli.run(export, Config)


if __name__ == "__main__":
    main()
