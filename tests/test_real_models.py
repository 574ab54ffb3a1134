"""Real ImageNet networks and images (LOWBIT_DATA): parity counted in codes, checks, short QAT."""

import os
import pathlib

import numpy as np
import pytest

from eval import parity
from lowbit import (
    calibration,
    layers,
    lint,
    lowering,
    manifest,
    metrics,
    mlir,
    placement,
    runtimes,
    spec,
    tflite_file,
)
from lowbit.data import datasets, pipeline
from lowbit.data import preprocess as preprocessing
from lowbit.devices import ethos_u, hexagon, snapdragon
from ptq import quantize
from qat import train

DATA = pathlib.Path(os.environ.get("LOWBIT_DATA", "/nonexistent"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DATA / "models").is_dir(),
        reason="LOWBIT_DATA names no folder with models/ and images/",
    ),
]
MODELS = {
    "mobilenet_v1_1.0_224": "tf",
    "mobilenet_v2_1.0_224": "torch",
    "efficientnet_lite0_224": "127,128",
    "mobilenet_v1_0.25_224": "tf",
}


def batches(name, count, preprocess, size, batch_size=10, calibrate=False):
    dataset = datasets.open_dataset(DATA / "images" / name)
    options = {"input_size": size, "preprocess": preprocess, "batch_size": batch_size}
    if calibrate:
        return (x for x, _ in pipeline.calibration_batches(dataset, count, **options))
    return pipeline.batches(dataset, indices=np.arange(count), **options)


@pytest.fixture(scope="module", params=MODELS)
def quantized(request):
    model, _ = manifest.load_model(DATA / "models" / f"{request.param}.keras")
    preprocess = preprocessing.parse(MODELS[request.param])

    def quantize(scheme):
        placed = placement.place(model, spec.scheme(scheme))
        calibration.calibrate(
            placed,
            batches("imagenet_calibration_1000.zip", 100, preprocess, (224, 224), calibrate=True),
        )
        return placed

    return quantize, preprocess


@pytest.fixture(scope="module")
def exported(quantized):
    quantize, preprocess = quantized
    model = quantize("w8a8")
    content = tflite_file.write(lowering.lower(model))
    return model, content, tflite_file.read(content), preprocess


def test_the_file_has_no_fault(exported):
    assert lint.faults(exported[1], io="int8") == []


def test_keras_simulator_and_interpreter_give_the_same_codes(exported):
    """100 images: Keras = XNNPACK = simulator, and the reference kernels = their simulator."""
    model, content, graph, preprocess = exported
    output = graph.tensors[graph.outputs[0]]
    differing = dict.fromkeys(("keras", "xnnpack", "reference"), 0)
    distinct: set[int] = set()
    runners = {name: runtimes.interpreter(content, name) for name in runtimes.KERNELS}
    for x, _ in batches("nips17_dev_500.zip", 100, preprocess, (224, 224), 4):
        codes = runtimes.input_codes(x, "int8", *_input(graph))
        for name, runner in runners.items():
            real = np.concatenate([runtimes.invoke(runner, row[None]) for row in codes])
            simulated = runtimes.simulate(graph, x, name)
            differing[name] += int((simulated != real).sum())
            if name == "xnnpack":
                distinct.update(np.unique(real).tolist())
                y = np.asarray(model.predict_on_batch(x)).reshape(real.shape)
                ours = np.rint(y / output.scale) + output.zero_point
                differing["keras"] += int((ours != real).sum())
    assert len(distinct) >= 16
    assert differing == {"keras": 0, "xnnpack": 0, "reference": 0}


def _input(graph):
    tensor = graph.tensors[graph.inputs[0]]
    return tensor.scale, tensor.zero_point


def test_each_keras_operation_is_within_one_code(exported):
    model, _, graph, preprocess = exported
    x, _ = next(batches("nips17_dev_500.zip", 2, preprocess, (224, 224), 2))
    rows = parity.compare_operations(model, graph, x)
    assert len(rows) >= len(layers.weighted_layers(model))
    assert max(row["worst_lsb"] for row in rows) <= 1


@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs")
def test_the_mlir_converter_writes_the_same_integers(quantized):
    quantize, preprocess = quantized
    graph = lowering.lower(quantize("w8a8_dense_per_tensor"))
    direct, converted = tflite_file.write(graph), mlir.convert(graph)  # weights: checked there
    x, _ = next(batches("nips17_dev_500.zip", 10, preprocess, (224, 224), 10))
    codes = runtimes.input_codes(x, "int8", *_input(graph))
    ours, theirs = (
        np.concatenate([runtimes.invoke(runner, row[None]) for row in codes])
        for runner in (runtimes.interpreter(direct), runtimes.interpreter(converted))
    )
    assert (ours != theirs).sum() == 0
    assert len(np.unique(ours)) >= 16


@pytest.mark.parametrize(
    "recipe, scheme, limit",
    [("plain", "w8a8", 1.0), ("fast", "w8a8", 0.04), ("accurate", "w4a8", 0.6)],
)
def test_recipes_bring_a_real_network_near_float(recipe, scheme, limit, tmp_path):
    """MobileNet-v1 0.25, mean KL to float on 100 images: 0.19, 0.02 and 0.3 when it was built."""
    float_path = DATA / "models/mobilenet_v1_0.25_224.keras"
    output = tmp_path / "q.keras"
    quantize.quantize(
        quantize.Config(
            model=str(float_path),
            preprocess="tf",
            dataset=str(DATA / "images/imagenet_calibration_1000.zip"),
            scheme=scheme,
            recipe=recipe,
            calibration_images=50,
            output=str(output),
        )
    )
    content = tflite_file.write(lowering.lower(manifest.load_model(output)[0]))
    assert lint.faults(content, io="int8") == []
    reference, _ = manifest.load_model(float_path)
    preprocess = preprocessing.parse("tf")

    def images():
        return (x for x, _ in batches("nips17_dev_500.zip", 100, preprocess, (224, 224)))

    wanted = np.concatenate(list(runtimes.run_keras(reference, images())))
    outputs = np.concatenate(list(runtimes.run_litert(content, images())))
    assert metrics.kl_divergence(wanted, outputs).mean() < limit


def test_a_few_steps_of_qat_keep_a_real_network_whole(tmp_path):
    config = train.Config(
        model=str(DATA / "models/mobilenet_v1_0.25_224.keras"),
        preprocess="tf",
        dataset=str(DATA / "images/imagenette_train_5000.zip"),
        val_dataset=str(DATA / "images/nips17_dev_500.zip"),
        steps=20,
        batch_size=16,
        learning_rate=1e-5,
        output_dir=str(tmp_path / "run"),
        limit=200,
    )
    row = train.train(config)
    model, _ = manifest.load_model(tmp_path / "run" / "qat.keras")
    graph = lowering.lower(model)
    content = tflite_file.write(graph)
    assert lint.faults(content, io="int8") == []
    preprocess = preprocessing.parse("tf")
    dataset = datasets.open_dataset(DATA / "images/nips17_dev_500.zip")
    outputs = np.concatenate(
        list(
            runtimes.run_litert(
                content, (x for x, _ in batches("nips17_dev_500.zip", 200, preprocess, (224, 224)))
            )
        )
    )
    correct = metrics.ranks(outputs, dataset.labels[:200]) == 0
    # What was trained is what ships: the file's accuracy is the Keras model's, exactly.
    assert float(correct.mean()) == row["top1_qat"]
    assert row["top1_qat"] >= row["top1_ptq"] - 2 * metrics.standard_error(correct)


@pytest.mark.usefixtures("qualcomm")
def test_npus_take_the_whole_network(exported):
    pytest.importorskip("ethosu")
    _, content, graph, preprocess = exported
    (images, _), *_ = batches("nips17_dev_500.zip", 3, preprocess, (224, 224))
    codes = runtimes.graph_codes(graph, images)
    ran = hexagon.run(graph, [codes])
    assert ran.htp_partitions == 1
    host = runtimes.interpreter(content)
    wanted = np.concatenate([runtimes.invoke(host, image[None]) for image in codes])
    assert np.corrcoef(ran.outputs[0].ravel(), wanted.ravel())[0, 1] > 0.98
    integer, real = (hexagon.simulated_cycles(graph, form) for form in ("qdq", "float16"))
    assert 2 * integer.cycles < real.cycles and integer.without_cost == 0
    compiled = snapdragon.compile_for(content, "SM8650")
    assert compiled.left == () and compiled.partitions == 1 and compiled.integer
    assert ethos_u.estimate(content, "ethos-u55-256").cpu_operators == ()
