"""The earliest runtime of a file: TensorFlow's own table, its converter's metadata, our writer's."""

import ctypes
import importlib.util
import pathlib

import flatbuffers
import numpy as np
import pytest

from export import check
from lowbit import integer_graph, lint, runtime_versions, runtimes, tflite_file


def quantization(scale):
    return integer_graph.Quantization(np.float32([scale]), np.zeros(1, np.int64))


def single(op, inputs, output, **attributes) -> bytes:
    """A file of one operation, as our writer makes it."""
    node = integer_graph.Node(
        op, output.name, tuple(each.name for each in inputs), (output.name,), attributes
    )
    tensors = {each.name: each for each in (*inputs, output)}
    free = tuple(each.name for each in inputs if each.data is None)
    graph = integer_graph.IntegerGraph(tensors, (node,), free, (output.name,))
    return tflite_file.write(graph)


def activation(name, shape, dtype="int8", scale=0.1):
    return integer_graph.Tensor(name, shape, dtype, quantization(scale))


def resize(dtype="int8", half_pixel_centers=False) -> bytes:
    size = integer_graph.Tensor("size", (2,), "int32", None, np.int32([8, 8]))
    return single(
        *("RESIZE_BILINEAR", [activation("x", (1, 4, 4, 2), dtype), size]),
        activation("y", (1, 8, 8, 2), dtype),
        **{"align_corners": False, "half_pixel_centers": half_pixel_centers},
    )


def with_version(content, version) -> bytes:
    """The file with another version of its operator."""
    model = tflite_file.parse(content)
    model.operatorCodes[0].version = version
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), file_identifier=tflite_file.FILE_IDENTIFIER)
    return bytes(builder.Output())


# --- the table ----------------------------------------------------------------------------------


def test_the_minimum_is_the_latest_of_all_operators_and_names_the_first_that_asks():
    operators = [("CONV_2D", 3), ("RESIZE_BILINEAR", 4), ("LEAKY_RELU", 2), ("SQUEEZE", 2)]
    assert runtime_versions.minimum_runtime(operators) == ("2.5.0", ("RESIZE_BILINEAR", 4))
    # As numbers: 2.11 is later than 2.9.
    operators = [("GELU", 2), ("CONV_2D", 7), ("RESHAPE", 1)]
    assert runtime_versions.minimum_runtime(operators) == ("2.11.0", ("CONV_2D", 7))
    assert runtime_versions.minimum_runtime([]) == (None, None)


def test_what_the_table_lacks_is_unknown():
    assert runtime_versions.runtime_of("CONV_2D", 8) == "2.15.0"
    for op, version in (("CONV_2D", 9), ("CONV_2D", 0), ("CONV_2D", -1), ("CUSTOM", 1)):
        assert runtime_versions.runtime_of(op, version) is None
    assert runtime_versions.runtime_of("BROADCAST_TO", 1) is None  # withdrawn
    pairs = [("ADD", 2), ("ADD", 99), ("CUSTOM", 1), ("ADD", 99)]
    assert runtime_versions.unknown(pairs) == [("ADD", 99), ("CUSTOM", 1)]
    assert runtime_versions.minimum_runtime(pairs) == ("1.14.0", ("ADD", 2))


def tensorflow_table():
    """Calls TensorFlow's own function: std::string tflite::FindMinimumRuntimeVersionForOp."""
    folder = pathlib.Path(importlib.util.find_spec("tensorflow").origin).parent
    try:
        ctypes.CDLL(str(folder / "libtensorflow_framework.so.2"), ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(folder / "libtensorflow_cc.so.2"))
        function = library._ZN6tflite30FindMinimumRuntimeVersionForOpB5cxx11ENS_15BuiltinOperatorEi
    except (OSError, AttributeError):
        pytest.skip("this TensorFlow does not export its table")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int], None

    def find(number, version):
        text = (ctypes.c_void_p * 4)()  # libstdc++'s string: pointer, length, 16 bytes of its own
        function(ctypes.addressof(text), number, version)
        return ctypes.string_at(text[0], text[1] or 0).decode()

    return find


def test_the_table_is_tensorflows_for_every_operator_and_version():
    find = tensorflow_table()
    compared = 0
    for op, number in tflite_file.OPERATOR_NUMBERS.items():
        for version in range(1, 25):
            theirs = find(number, version) or None
            assert runtime_versions.runtime_of(op, version) == theirs, (op, version)
            compared += theirs is not None
    assert compared == sum(
        len([known for known in versions if known])
        for versions in runtime_versions.RUNTIMES.values()
    )
    assert set(runtime_versions.RUNTIMES) <= set(tflite_file.OPERATOR_NUMBERS)


# --- files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="converted")
def converted_fixture():
    """What the converter makes of a small float network, and in int8."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    kernel = tf.constant(rng.normal(size=(3, 3, 3, 4)), tf.float32)

    @tf.function(input_signature=[tf.TensorSpec((1, 4, 4, 3))])
    def network(x):
        x = tf.nn.relu6(tf.nn.conv2d(x, kernel, 1, "SAME"))
        x = tf.compat.v1.image.resize_bilinear(x, (8, 8), half_pixel_centers=True)
        return tf.nn.softmax(tf.reduce_mean(x, (1, 2)))

    files = []
    for quantized in (False, True):
        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            [network.get_concrete_function()]
        )
        if quantized:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: (
                [rng.normal(size=(1, 4, 4, 3)).astype(np.float32)] for _ in range(3)
            )
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        files.append(converter.convert())
    return files


@pytest.mark.filterwarnings("ignore")  # of the converter
def test_our_figure_is_what_the_converter_writes(converted):
    for content in converted:
        model = tflite_file.parse(content)
        stated = tflite_file.stated_runtime(model)
        assert stated == lint.minimum_runtime(content) == "2.2.0"  # of RESIZE_BILINEAR version 3
        assert "needs TensorFlow Lite 2.2.0: RESIZE_BILINEAR version 3" in lint.notes(content)
        assert not any("states" in note for note in lint.notes(content))


@pytest.mark.filterwarnings("ignore")
def test_our_metadata_has_the_converters_form(converted):
    for content in (converted[0], resize()):
        model = tflite_file.parse(content)
        (entry,) = [each for each in model.metadata if each.name == b"min_runtime_version"]
        data = bytes(model.buffers[entry.buffer].data)
        text = lint.minimum_runtime(content).encode()
        assert (len(data), data) == (16, text + bytes(16 - len(text)))


def test_our_writer_states_what_its_operators_need_and_the_file_runs():
    for content, runtime in (
        (resize(), "1.14.0"),
        (resize(half_pixel_centers=True), "2.2.0"),
        (resize("int16"), "2.5.0"),
    ):
        assert tflite_file.stated_runtime(tflite_file.parse(content)) == runtime
        assert lint.minimum_runtime(content) == runtime
        for kernels in ("xnnpack", "reference"):
            runner = runtimes.interpreter(content, kernels)
            dtype = runner.get_input_details()[0]["dtype"]
            codes = runtimes.invoke(runner, np.ones((1, 4, 4, 2), dtype))
            np.testing.assert_array_equal(codes, np.ones((1, 8, 8, 2)))


@pytest.mark.filterwarnings("ignore")  # tf.lite.Interpreter is announced to move
def test_tensorflows_interpreter_loads_our_metadata():
    import tensorflow as tf

    interpreter = tf.lite.Interpreter(model_content=resize())
    interpreter.allocate_tensors()
    interpreter.invoke()


def test_a_newer_operator_is_stated_as_unknown(tmp_path, capsys):
    path = tmp_path / "m.tflite"
    path.write_bytes(with_version(resize(), 77))
    row = check.check(check.Config(model=str(path)))
    assert row["min_runtime"] is None
    notes = capsys.readouterr().err
    assert (
        "runtime unknown: the table of TensorFlow 2.21.0 lacks RESIZE_BILINEAR version 77" in notes
    )

    path.write_bytes(resize())
    assert check.check(check.Config(model=str(path)))["min_runtime"] == "1.14.0"


def test_a_file_that_states_another_runtime_is_noted():
    notes = lint.notes(with_version(resize(), 4))
    assert "states min_runtime_version 1.14.0; its operators need 2.5.0" in notes
    assert not any("states" in note for note in lint.notes(resize()))
