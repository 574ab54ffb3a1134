"""A tool's command in a process of its own: its result row, its seconds, its peak memory.

A command is a list, a module and its flags, with $ROOT where the folder given as --root stands, so
that what is recorded names no folder of one machine.
"""

import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import lowbit
from eval import networks


class StepFailedError(Exception):
    """A command ended with an error; the message is its last line on stderr."""


def run(command: Sequence[str], root: str | None, log_path: str) -> tuple[dict, float, int]:
    """Runs `python -m command`; returns (its result row, seconds, peak memory in MiB).

    A training run that was begun in its folder goes on: --resume is added, and not recorded.

    Args:
      command: see above.
      root: what $ROOT stands for.
      log_path: the file to which the command and its stderr are appended.

    Raises:
      StepFailedError: where it ends with an error.
    """
    start = time.monotonic()
    if _is_begun(command):
        command = [*command, "--resume"]
    # The same checkout as this process's, from whatever folder it runs.
    home = str(pathlib.Path(lowbit.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    arguments = [sys.executable, "-m", *(networks.real(word, root) for word in command)]
    with open(log_path, "a+b") as log:
        log.write(f"$ {shown(command)}\n".encode())
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=log, env=os.environ | {"PYTHONPATH": path}
        )
        with process:
            try:
                output = process.stdout.read().decode()
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                raise
            process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(begin)
        lines = log.read().decode(errors="replace").strip().splitlines()
    if process.returncode < 0:
        raise StepFailedError(f"{command[0]} was killed by signal {-process.returncode}")
    if process.returncode:
        message = lines[-1].removeprefix("error: ") if lines else "no message"
        if root is not None and os.path.isabs(root):
            message = message.replace(root.rstrip("/"), "$ROOT")
        raise StepFailedError(f"{command[0]}: {message}")
    row = json.loads(output.strip().splitlines()[-1])
    return row, time.monotonic() - start, usage.ru_maxrss // 1024


def run_all(
    commands: Sequence[Sequence[str]], root: str | None, log_path: str, row: dict
) -> Iterator[tuple[Sequence[str], dict]]:
    """Runs commands one after another; yields each with its result row.

    The first, whose last flag is --output_dir, makes what others go on from: an earlier run may have.

    Args:
      commands, root, log_path: as in `run`.
      row: its "seconds" and "peak_mib" grow, also where a later command fails.
    """
    for command in commands:
        folder = command[-1].partition("=")[2]
        if command is commands[0] and len(commands) > 1 and os.path.exists(f"{folder}/results.csv"):
            continue
        last, seconds, peak = run(command, root, log_path)
        row["seconds"] = round(row["seconds"] + seconds, 1)
        row["peak_mib"] = max(row["peak_mib"], peak)
        yield command, last


def _is_begun(command):
    folders = [word.partition("=")[2] for word in command if word.startswith("--output_dir=")]
    return command[0] == "qat.train" and any(
        os.path.exists(os.path.join(folder, "config.json")) for folder in folders
    )


def folder(work_dir: str, name: str, command: Sequence[str]) -> str:
    """Returns the folder of a command's run, named by a digest of its words."""
    digest = hashlib.sha256(json.dumps(list(command)).encode()).hexdigest()[:8]
    return f"{work_dir}/{name}_{digest}"


def joined(commands: Sequence[Sequence[str]]) -> str:
    """Returns commands as one line of a shell, as rows hold them."""
    return " && ".join(map(shown, commands))


def shown(command: Sequence[str]) -> str:
    """Returns a command as a shell takes it, $ROOT expanded and nothing else."""
    words = [
        word if re.fullmatch(r"[\w@%+=:,./$-]+", word) else f'"{word}"'
        for word in ["python", "-m", *command]
    ]
    return " ".join(words)


def each_once(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """Returns the commands of rows, whose "commands" has them with " && " between."""
    return list(dict.fromkeys(one for row in rows for one in row["commands"].split(" && ")))


def heading(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """Returns the lines of a page of Markdown that stand above its commands."""
    rooted = any("$ROOT" in row["commands"] for row in rows)
    note = ["`ROOT` is the folder given as --root.", ""] if rooted else []
    return ["## Commands", "", *note]
