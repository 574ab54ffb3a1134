"""TensorFlow Lite Micro: the simulator's flavour, files run in a process of their own, errors."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from eval import accuracy, conformance
from lowbit import (
    calibration,
    files,
    integer_graph,
    kernels,
    lowering,
    micro,
    placement,
    results,
    runtimes,
    spec,
    targets,
    tflite_file,
)

pytest.importorskip("tflite_micro")  # there is none for ARM

EVERY_CODE = np.arange(-128, 128, dtype=np.int8).reshape(1, 16, 16, 1)


def tensor(name, shape, scale=0.1, zero_point=0, data=None, axis=None):
    scale = np.atleast_1d(np.asarray(scale, np.float32))
    quantization = integer_graph.Quantization(scale, np.full(scale.shape, zero_point), axis)
    dtype = "int8" if data is None else data.dtype.name
    return integer_graph.Tensor(name, tuple(shape), dtype, quantization, data)


def graph_of(op, inputs, output, **attributes):
    """Returns a graph of one node, whose inputs without data are the graph's."""
    names = tuple(each.name for each in inputs)
    node = integer_graph.Node(op, op.lower(), names, (output.name,), attributes)
    free = tuple(each.name for each in inputs if each.data is None)
    tensors = {each.name: each for each in (*inputs, output)}
    return integer_graph.IntegerGraph(tensors, (node,), free, (output.name,))


def of_every_code(op, scale, zero_point, output_scale, output_zero_point, **attributes):
    x = tensor("x", EVERY_CODE.shape, scale, zero_point)
    y = tensor("y", EVERY_CODE.shape, output_scale, output_zero_point)
    return graph_of(op, [x], y, **attributes)


def dense():
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (256, 64)).astype(np.int8)
    scale = random.uniform(0.5, 2, 256).astype(np.float32) * np.float32(5e-5)
    bias = random.integers(-4000, 4000, 256).astype(np.int32)
    return graph_of(
        "FULLY_CONNECTED",
        [
            tensor("x", (1, 64), 0.0173, -7),
            tensor("w", weight.shape, scale, data=weight, axis=0),
            tensor("b", bias.shape, scale * np.float32(0.0173), data=bias, axis=0),
        ],
        tensor("y", (1, 256), 0.0007, 5),
        activation=None,
        keep_num_dims=False,
    )


def product():
    """Every pair of codes, on scales whose quotient float32 and float64 round to other multipliers."""
    shape = (1, 256, 256, 1)
    x, z = tensor("x", shape, 0.21971074, -7), tensor("z", shape, 0.020272247, 3)
    return graph_of("MUL", [x, z], tensor("y", shape, 0.27518097, 4), activation=None)


def softmax():
    shape = (1, 25, 10)
    return graph_of("SOFTMAX", [tensor("x", shape)], tensor("y", shape, 1 / 256, -128), beta=1.0)


# name: (graph of one node, codes of the reference flavour that differ; None: it has no such kernel).
# Of the functions' tables only a few entries differ, for few scales: 4 of 1,536,000 for TANH.
NODES = {
    "relu6 to another scale": (of_every_code("RELU6", 0.1, -7, 0.05, -128), 256),
    "relu6": (of_every_code("RELU6", 0.05, -7, 0.05, -7), 0),
    "relu": (of_every_code("RELU", 0.031, -20, 0.1, -110), 1),
    "leaky relu": (of_every_code("LEAKY_RELU", 0.0173, -7, 0.0173 / 1.9, 5, alpha=0.5), 12),
    "logistic": (of_every_code("LOGISTIC", 0.0731, -7, 1 / 256, -128), 0),
    "logistic near a tie": (of_every_code("LOGISTIC", 0.07401896, 73, 1 / 256, -128), 1),
    "tanh": (of_every_code("TANH", 0.0173, 5, 1 / 128, 0), 0),
    "tanh near a tie": (of_every_code("TANH", 0.0050293230, 52, 1 / 128, 0), 1),
    "elu": (of_every_code("ELU", 0.0731, -7, 0.05, -100), None),
    "quantize": (of_every_code("QUANTIZE", 0.031, -20, 0.1, -110), 0),
    "dense": (dense(), 2),
    "softmax": (softmax(), 0),
    "product": (product(), 8),
}


def random_inputs(graph):
    """Returns every code where 256 fit, every pair of two where 65,536 do, else random codes."""
    inputs = {}
    for number, name in enumerate(graph.inputs):
        shape = graph.tensors[name].shape
        codes = np.random.default_rng(number).integers(-128, 128, shape)
        if shape == EVERY_CODE.shape:
            codes = EVERY_CODE
        elif shape == (1, 256, 256, 1):
            codes = np.indices((256, 256))[number].reshape(shape) - 128
        inputs[name] = codes.astype(np.int8)
    return inputs


def joined(graphs):
    """Returns the graphs as one, side by side: one process runs them all."""
    tensors, nodes, inputs, outputs = {}, [], [], []
    for prefix, graph in graphs.items():

        def renamed(names, prefix=prefix):
            return tuple(f"{prefix}/{name}" for name in names)

        for name, each in graph.tensors.items():
            tensors[f"{prefix}/{name}"] = dataclasses.replace(each, name=f"{prefix}/{name}")
        nodes += [
            dataclasses.replace(
                node, name=prefix, inputs=renamed(node.inputs), outputs=renamed(node.outputs)
            )
            for node in graph.nodes
        ]
        inputs += renamed(graph.inputs)
        outputs += renamed(graph.outputs)
    return integer_graph.IntegerGraph(tensors, tuple(nodes), tuple(inputs), tuple(outputs))


@pytest.fixture(scope="module")
def computed():
    """Returns what TensorFlow Lite Micro computes for each of NODES, and the bytes of its arena."""
    graph = joined({name: node for name, (node, _) in NODES.items()})
    inputs = [codes for node, _ in NODES.values() for codes in random_inputs(node).values()]
    done = micro.run(tflite_file.write(graph), inputs)
    return dict(zip(NODES, done.outputs, strict=True)), done.arena_bytes


@pytest.mark.parametrize("case", NODES)
def test_the_micro_flavour_is_exact_and_the_reference_flavour_nearly(case, computed):
    graph, apart = NODES[case]
    outputs, _ = computed
    inputs = random_inputs(graph)
    ours = kernels.run(graph, inputs, "micro")["y"]
    assert ours.dtype == outputs[case].dtype
    np.testing.assert_array_equal(ours, outputs[case])
    if apart is None:
        with pytest.raises(ValueError, match="BUILTIN_REF has no ELU"):
            kernels.run(graph, inputs, "reference")
    else:
        assert (kernels.run(graph, inputs, "reference")["y"] != ours).sum() == apart


def test_the_arena_holds_the_tensors(computed):
    _, arena_bytes = computed
    tensors = sum(graph.tensors["y"].shape[1] ** 2 for graph, _ in NODES.values())
    assert tensors < arena_bytes < 2**20


@pytest.mark.parametrize("op, message", [("GELU", "has no GELU"), ("TANH", "16 bits are not sim")])
def test_what_the_flavour_has_not_is_named(op, message):
    graph = of_every_code(op, 0.1, 0, 0.1, 0)
    if op == "TANH":
        tensors = {
            name: dataclasses.replace(each, dtype="int16") for name, each in graph.tensors.items()
        }
        graph = dataclasses.replace(graph, tensors=tensors)
    with pytest.raises(ValueError, match=message):
        kernels.run(graph, {"x": EVERY_CODE.astype(graph.tensors["x"].dtype)}, "micro")


# --- networks -----------------------------------------------------------------------------------


def test_what_it_refuses_is_counted_and_told(tmp_path):
    cases = "pixel shuffle of reshapes"
    config = conformance.Config(cases=cases, models=1, micro=True, output_dir=str(tmp_path))
    row = conformance.check(config)
    assert (row["micro_codes"], row["micro_differing"], row["micro_refused"]) == (0, 0, 1)
    (found,) = results.read_rows(tmp_path / "random_networks.csv")
    assert "Transpose op only supports 1D-5D" in found["micro_refused"]


def test_a_difference_is_named_with_its_count(monkeypatch):
    original = kernels.KERNELS["TANH"]

    def one_off(graph, node, inputs, kernel):
        return original(graph, node, inputs, kernel) ^ (kernel == "micro")

    monkeypatch.setitem(kernels.KERNELS, "TANH", one_off)
    plan = conformance.Plan(("tanh", "dense on an image"), (9, 8), 4, 0)
    row = conformance.compare(plan, with_micro=True)
    count = row["micro_differing"]
    assert row["differing"] == 0 and count == 8 * 9 * 8 * 4
    assert row["micro_ops"] == {"TANH": count} and row["micro_codes"] > count


def test_a_network_in_eval_accuracy(tmp_path):
    model, _ = conformance.build(conformance.Plan(("silu",), (9, 8), 4, 0))
    images = conformance.smooth_images(np.random.default_rng(0), 6, 9, 8)
    placed = placement.place(model, spec.scheme("w8a8"))
    calibration.calibrate(placed, [images])
    graph = lowering.lower(placed)
    path = str(tmp_path / "model.tflite")
    files.save_bytes(tflite_file.write(graph), path)
    runner = accuracy.load(path, "micro", "xnnpack", "tf")
    found = np.concatenate(list(runner.run([images[:4], images[4:]])))
    (ours,) = runtimes.run_simulator(graph, [images], "micro")
    np.testing.assert_array_equal(found, ours)
    assert runner.arena_bytes > 9 * 8 * 3 + 9 * 8 * 4


# --- files of anyone ----------------------------------------------------------------------------


def relu(shape=(1, 8, 8, 3)):
    return graph_of("RELU", [tensor("x", shape)], tensor("y", shape))


def test_a_file_that_aborts_the_interpreter_is_an_error():
    """SOFTMAX of 2,000 equal codes: the kernel aborts where exponentials sum to 512 or more."""
    x, y = tensor("x", (1, 2000), 1e-3), tensor("y", (1, 2000), 1 / 256, -128)
    content = tflite_file.write(graph_of("SOFTMAX", [x], y, beta=1.0))
    with pytest.raises(runtimes.RefusedError, match="m.tflite: .* dies of it: SIGABRT"):
        micro.run(content, [np.zeros((1, 2000), np.int8)], "m.tflite")


def test_inputs_that_do_not_fit_are_an_error():
    content = tflite_file.write(relu())
    with pytest.raises(runtimes.RefusedError, match="m.tflite: .* Dimension mismatch"):
        micro.run(content, [np.zeros((1, 4, 4, 3), np.int8)], "m.tflite")
    with pytest.raises(ValueError, match="m.tflite: an input without images"):
        micro.run(content, [np.zeros((0, 8, 8, 3), np.int8)], "m.tflite")


def test_a_damaged_file_is_never_run(monkeypatch):
    monkeypatch.setattr(runtimes, "in_child", None)
    with pytest.raises(tflite_file.TFLiteFileError, match="m.tflite"):
        micro.run(tflite_file.write(relu())[:200], [np.zeros((1, 8, 8, 3), np.int8)], "m.tflite")


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"package tflite_micro is missing: pip install 'lowbit\[micro\]'"
    with pytest.raises(ValueError, match=message):
        conformance.check(conformance.Config(models=1, micro=True, output_dir=str(tmp_path)))


def test_what_it_computes_wrongly_or_refuses_export_check_finds():
    graph, _ = NODES["relu6 to another scale"]
    (found,) = targets.findings(tflite_file.write(graph), "m.tflite", "tflite-micro")
    assert found.refused and "the kernel only clamps, and computes wrongly" in found.text
    shape = (1, 2, 2, 2, 2, 2)
    order = integer_graph.Tensor("order", (6,), "int32", None, np.arange(6, dtype=np.int32))
    graph = graph_of("TRANSPOSE", [tensor("x", shape), order], tensor("y", shape))
    (found,) = targets.findings(tflite_file.write(graph), "m.tflite", "tflite-micro")
    assert found.refused and "6 axes, at most 5 are allowed" in found.text
