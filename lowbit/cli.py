"""The command line is the configuration dataclass: flags, help, defaults, validation, record.

    @dataclasses.dataclass(frozen=True)
    class Config:
        model: str = cli.field("mobilenet_v2", "A zoo name or a .keras file.")

    def train(config: Config) -> dict: ...

    if __name__ == "__main__":
        cli.run(train, Config)

Logs, tables and progress go to stderr.  The tool's last act is one JSON line on stdout, its result
row, and exit code 0.  Bad input: one line on stderr, exit code 1.
"""

import dataclasses
import json
import os
import pathlib
import sys
import types
import typing
from collections.abc import Callable

from absl import flags, logging

import lowbit

# What bad input raises; anything else is a defect of ours and keeps its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError)


def field(default, help_text: str, choices=None):
    """Returns a dataclass field with a flag's help text; `default` may be dataclasses.MISSING."""
    return dataclasses.field(default=default, metadata={"help": help_text, "choices": choices})


REQUIRED = dataclasses.MISSING


def run(main: Callable, config_class: type) -> None:
    """Parses the command line into a `config_class`, calls `main` with it, prints its result row."""
    _check_checkout(main)
    values = flags.FlagValues()
    _define(_EXTENSIONS, str | None, values)
    for item in dataclasses.fields(config_class):
        _define(item, typing.get_type_hints(config_class)[item.name], values)
    program = f"python -m {_module_name(main)}"
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in sys.argv[1:]):
        text = f"{sys.modules[main.__module__].__doc__}\n{program}, flags:\n"
        try:
            print(text, values.main_module_help() or _all_help(values), sep="\n", flush=True)
        except BrokenPipeError:  # read by `head`, say, which has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    try:
        rest = values(sys.argv)
        if len(rest) > 1:
            raise flags.Error(f"{rest[1]!r} is not a flag; flags are written --name=value")
        names = [item.name for item in dataclasses.fields(config_class)]
        config = config_class(**{name: getattr(values, name) for name in names})
    except (flags.Error, ValueError) as error:
        fail(f"{error} (see {program} --help)")
    try:
        _load_extensions(values.extensions)
    except USER_ERRORS as error:
        fail(str(error))
    flags.FLAGS([sys.argv[0]])  # absl's own flags keep their defaults
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    try:
        row = main(config)
    except USER_ERRORS as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted")
    try:
        print(json.dumps(row, allow_nan=False), flush=True)
    except OSError as error:  # stdout is full or closed
        fail(f"the result row could not be printed: {error}")


@dataclasses.dataclass(frozen=True)
class _Common:
    """Flags of every tool."""

    extensions: str | None = field(
        None,
        "Python files, with commas, that teach layers (docs/adding_a_layer.md) or define those of a "
        "model; they are run.",
    )


(_EXTENSIONS,) = dataclasses.fields(_Common)


def _load_extensions(paths: str | None) -> None:
    if paths:
        from lowbit import extension  # Keras, which not every tool needs

        for path in paths.split(","):
            extension.load(path.strip())


def words(text: str | None) -> list[str]:
    """Returns what stands between a flag's commas; nothing for None and for nothing."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def fail(message: str) -> typing.NoReturn:
    """Prints one line on stderr and exits with code 1."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(1)


def _define(item, hint, values):
    text, choices = item.metadata["help"], item.metadata["choices"]
    required = item.default is dataclasses.MISSING
    default = None if required else item.default
    kind = hint
    if isinstance(hint, types.UnionType):
        (kind,) = [option for option in typing.get_args(hint) if option is not type(None)]
    if kind is bool:
        flags.DEFINE_boolean(item.name, default, text, flag_values=values)
    elif choices is not None:
        flags.DEFINE_enum(item.name, default, list(choices), text, flag_values=values)
    else:
        define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
        define[kind](item.name, default, text, flag_values=values)
    if required:
        flags.mark_flag_as_required(item.name, flag_values=values)


def _all_help(values):
    return "\n".join(values.get_help(prefix="  ").splitlines()[1:])


def _module_name(main):
    spec = getattr(sys.modules[main.__module__], "__spec__", None)
    return spec.name if spec else main.__module__


def _check_checkout(main):
    """Stops where another distribution's `qat`, `ptq`, `export` or `eval` was imported with ours."""
    tool = pathlib.Path(sys.modules[main.__module__].__file__).resolve().parent.parent
    library = pathlib.Path(lowbit.__file__).resolve().parent.parent
    if tool != library:
        fail(f"the tool comes from {tool} but lowbit from {library}: two installations are mixed")
