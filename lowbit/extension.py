"""Extensions: a layer that the tool does not know, taught to it by one file.

    python -m ptq.quantize --extensions=unit_normalization.py ...

The file is Python, and is run.  Its `EXTENSIONS` say how the layer is placed, lowered, computed and
tested (docs/adding_a_layer.md); a file without them may still define Keras layers that models hold.
"""

import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Mapping

import keras

from lowbit import (
    kernels,
    lint,
    lowering,
    network,
    operator_versions,
    placement,
    reading,
    tflite_file,
)
from lowbit.kernels import delegate, int16


@dataclasses.dataclass(frozen=True)
class Operator:
    """A TFLite operator that the tool does not know yet.

    Args:
      name: TFLite's builtin name, such as "L2_NORMALIZATION".
      run: (graph, node, inputs, kernel) to its output's codes; kernel is "xnnpack", "builtin" or
        "reference".
      run_int16: the same of 16-bit activations; None: `run`.
      options: name of its options in TFLite's schema, None where it has none; and {attribute of the
        node: field of the options}.
      versions: {dtype of the first input: version}; what is not named is version 1.
      delegated: whether XNNPACK takes it.
      same_scale: positions of the inputs that its output shares the scale with.
      fixed_output: {dtype: (scale, zero point)} that its kernel assumes.
      required_inputs: how many of its first inputs cannot be left out.
    """

    name: str
    run: Callable
    run_int16: Callable | None = None
    options: tuple[str | None, Mapping[str, str]] = (None, {})
    versions: Mapping[str, int] = dataclasses.field(default_factory=dict)
    delegated: bool = False
    same_scale: tuple[int, ...] = ()
    fixed_output: Mapping[str, tuple[float, int]] = dataclasses.field(default_factory=dict)
    required_inputs: int = 1


@dataclasses.dataclass(frozen=True)
class Extension:
    """A Keras layer, and what becomes of it.

    Args:
      layer: the class that float models hold.
      read: (call, inputs, fresh) to the list of `network.Operation` that it is; may raise
        UnsupportedModelError.
      lower: (builder, call, arguments, shape) to a `lowering.Pending`, or to a tensor on its input's
        scale; as those in lowering.py.  None: `read` makes operations of known kinds alone.
      kind: of the operation that `lower` takes; any new word, None without `lower`.
      computes: whether it makes new values, which a quantizer follows; else it hands on its input's.
      quantized: class of the layer in the quantized model, made from the float one's configuration;
        None: the same.
      operators: those that the tool does not know.
      cases: {name: (function from an image tensor to another, operations that it becomes)}, taken up
        by eval.conformance.
    """

    layer: type[keras.layers.Layer]
    read: Callable
    lower: Callable | None = None
    kind: str | None = None
    computes: bool = True
    quantized: type[keras.layers.Layer] | None = None
    operators: tuple[Operator, ...] = ()
    cases: Mapping[str, tuple[Callable, list[str]]] = dataclasses.field(default_factory=dict)


INSTALLED: list[Extension] = []


def load(path: str) -> None:
    """Runs a Python file and installs its `EXTENSIONS`.

    Raises:
      FileNotFoundError, ValueError: name the file and what is wrong with it.
    """
    file = pathlib.Path(path)
    if file.suffix != ".py" or not file.is_file():
        raise FileNotFoundError(f"--extensions: {path} is no .py file")
    # By a name of its own: a file `operator.py` must not stand in for Python's.
    spec = importlib.util.spec_from_file_location(f"lowbit_extension_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise ValueError(f"--extensions: {path}: {type(error).__name__}: {error}") from error
    extensions = getattr(module, "EXTENSIONS", ())
    if not isinstance(extensions, tuple | list):
        raise ValueError(f"--extensions: {path}: EXTENSIONS are {extensions!r}, no tuple or list")
    for extension in extensions:
        if not isinstance(extension, Extension):
            raise ValueError(f"--extensions: {path}: EXTENSIONS hold {extension!r}, no Extension")
        install(extension)


def install(extension: Extension) -> None:
    """Makes the layer and its operators known to every stage.

    Raises:
      ValueError: where the layer, the kind or an operator is known already.
    """
    kinds = (*network.SOURCES, *network.TIED)
    if extension.layer in reading.READERS or extension.kind in kinds:
        raise ValueError(
            f"extension of {extension.layer.__name__}: the layer, or the kind {extension.kind!r}, is "
            "known already"
        )
    if (extension.kind is None) != (extension.lower is None):
        raise ValueError(
            f"extension of {extension.layer.__name__}: kind {extension.kind!r} and lower "
            f"{extension.lower!r} go together"
        )
    for operator in extension.operators:
        if operator.name in tflite_file.OPTIONS:
            raise ValueError(f"operator {operator.name} is known already")
        if operator.name not in tflite_file.OPERATOR_NUMBERS:
            raise ValueError(f"operator {operator.name} is none of TFLite's built-in ones")
    for operator in extension.operators:
        _install_operator(operator)
    reading.READERS[extension.layer] = extension.read
    INSTALLED.append(extension)
    if extension.kind is None:
        return
    quantized = extension.quantized or extension.layer
    placement.QUANTIZED[extension.kind] = quantized
    lowering.LOWERINGS[quantized] = extension.lower
    if extension.computes:
        network.SOURCES = (*network.SOURCES, extension.kind)
        lowering.COMPUTES = (*lowering.COMPUTES, quantized)
    else:
        network.TIED = (*network.TIED, extension.kind)


def _install_operator(operator):
    name = operator.name
    kernels.KERNELS[name] = operator.run
    int16.KERNELS[name] = operator.run_int16 or operator.run
    tflite_file.OPTIONS[name] = operator.options
    operator_versions.BY_INPUT[name] = dict(operator.versions)
    lint.REQUIRED_INPUTS[name] = operator.required_inputs
    if not operator.delegated:
        delegate.LEFT = (*delegate.LEFT, name)
    if operator.same_scale:
        lint.SAME_SCALE[name] = operator.same_scale
    if operator.fixed_output:
        lint.FIXED_OUTPUT[name] = operator.fixed_output


def cases() -> dict[str, tuple[Callable, list[str]]]:
    """Returns the installed extensions' test cases by name."""
    return {name: case for extension in INSTALLED for name, case in extension.cases.items()}
