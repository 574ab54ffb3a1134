"""The fuzzer: it sees what goes wrong, and on a small network it finds nothing."""

import argparse
import pathlib
import sys

import numpy as np
import pytest

from lowbit import integer_graph, tflite_file

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "scripts"
FILES = 250


@pytest.fixture(scope="module", name="fuzz")
def fuzz_fixture():
    """The script, as a module that also another process can import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import fuzz

        yield fuzz
        for name in ("fuzz", "mutations", "worker"):
            del sys.modules[name]


@pytest.fixture(scope="module", name="seeds")
def seeds_fixture():
    """A convolution, a sum, a pool and a dense layer in int8."""

    def quantization(scale):
        return integer_graph.Quantization(np.float32([scale]), np.zeros(1, np.int64))

    def tensor(name, shape, data=None, dtype="int8", scale=0.1):
        return integer_graph.Tensor(name, shape, dtype, quantization(scale), data)

    rng = np.random.default_rng(0)
    kernel = rng.integers(-127, 128, (4, 3, 3, 4), np.int8)
    dense = rng.integers(-127, 128, (5, 36), np.int8)
    tensors = [
        tensor("x", (1, 6, 6, 4)),
        tensor("kernel", kernel.shape, kernel, scale=0.01),
        tensor("bias", (4,), np.arange(4, dtype=np.int32), "int32", np.float32(0.1) * 0.01),
        tensor("conv", (1, 6, 6, 4)),
        tensor("add", (1, 6, 6, 4), scale=0.2),
        tensor("pool", (1, 3, 3, 4), scale=0.2),
        tensor("dense/kernel", dense.shape, dense, scale=0.01),
        tensor("logits", (1, 5), scale=0.3),
    ]
    window = {"strides": (1, 1), "dilations": (1, 1), "padding": "SAME", "activation": "RELU"}
    pool = {"filter": (2, 2), "strides": (2, 2), "padding": "VALID", "activation": None}
    flat = {"activation": None, "keep_num_dims": False}
    nodes = tuple(
        integer_graph.Node(op, inputs[0], inputs[1:], inputs[:1], attributes)
        for op, inputs, attributes in (
            ("CONV_2D", ("conv", "x", "kernel", "bias"), window),
            ("ADD", ("add", "conv", "x"), {"activation": None}),
            ("MAX_POOL_2D", ("pool", "add"), pool),
            ("FULLY_CONNECTED", ("logits", "pool", "dense/kernel"), flat),
        )
    )
    graph = integer_graph.IntegerGraph({t.name: t for t in tensors}, nodes, ("x",), ("logits",))
    return {"small": tflite_file.write(graph, {"scheme": "w8a8"})}


def arguments(tmp_path, files=FILES):
    return argparse.Namespace(files=files, seed=0, output_dir=str(tmp_path), interpreter=0)


def here(function, content):
    return function(content)


def test_a_sound_file_passes_every_stage(fuzz, seeds):
    assert set(fuzz.examine(seeds["small"]).values()) == {"passed"}


def test_damaged_files_are_refused_with_a_word_about_what_is_wrong(fuzz, seeds, tmp_path):
    counts, findings = fuzz.search(seeds, arguments(tmp_path), here)
    assert findings == []
    for stage in fuzz.STAGES:
        assert counts[f"{stage} passed"] + counts[f"{stage} refused"] == FILES
        assert min(counts[f"{stage} passed"], counts[f"{stage} refused"]) > FILES // 20, stage


def test_the_same_seed_gives_the_same_files_and_each_mutation_changes_some(fuzz, seeds):
    for name, function in fuzz.mutations.MUTATIONS.items():
        made = [
            [function(seeds["small"], np.random.default_rng(number)) for number in range(8)]
            for _ in range(2)
        ]
        assert made[0] == made[1]
        assert len({*made[0], seeds["small"]}) > 4, name


def test_every_exception_but_a_clear_value_error_is_a_finding(fuzz, seeds, tmp_path, monkeypatch):
    def lacks(content):
        raise KeyError("strides")

    monkeypatch.setitem(fuzz.STAGES, "faults", lacks)
    counts, findings = fuzz.search(seeds, arguments(tmp_path, 3), here)
    assert counts["faults finding"] == len(findings) == 3
    assert "faults: finding: KeyError: 'strides'" in findings[2]["finding"]
    content, made = fuzz.mutations.mutate(seeds["small"], second_draw(fuzz, [0, 2], seeds))
    assert (tmp_path / "findings" / "0002.tflite").read_bytes() == content
    assert (findings[2]["mutations"], findings[2]["number"]) == (made, 2)


def second_draw(fuzz, seed, seeds):
    """The generator of a file, behind its choice of the seed."""
    random = np.random.default_rng(seed)
    fuzz.mutations.any_of(random, sorted(seeds))
    return random


@pytest.mark.parametrize(
    "message, specific",
    [
        ("m.tflite: damaged or cut short at 999 bytes", True),
        ("m.tflite: damaged: tensor 99 is not among the 16 tensors", True),
        ("node 'conv' (CONV_2D): cannot be computed: KeyError: 'strides'", True),
        ("m.tflite: damaged: list index out of range", False),
        ("m.tflite: damaged: 'strides'", False),
        ("m.tflite: too short", False),
        ("", False),
        ("'NoneType' object has no attribute 'scale'", False),
    ],
)
def test_what_a_message_must_say(fuzz, message, specific):
    assert fuzz.is_specific(message) == specific


def test_warnings_and_lines_that_break_are_findings(fuzz):
    def overflows(content):
        np.float32(3e38) * np.float32(content)

    assert "finding: RuntimeWarning" in fuzz.outcome(overflows, 1e9)
    assert fuzz.outcome(lambda content: [content], "tensor 'x': a\nfault").startswith("finding")
    assert fuzz.outcome(lambda content: [content], "tensor 'x': a fault") == "passed"


def test_a_worker_that_dies_or_hangs_is_reported_and_replaced(fuzz, capfd):
    """What the worker calls is `exec`: the file is the program."""
    worker = fuzz.worker.Worker(2, 2**28)
    try:
        for program, words in (
            (b"import os; os.abort()", "died: SIGABRT"),
            (b"import os; os.kill(os.getpid(), 9)", "died: SIGKILL"),
            (b"bytearray(2 ** 29)", "died: exit code 1"),  # MemoryError
            (b"while True: pass", "no answer within 2 s"),
        ):
            with pytest.raises(fuzz.worker.WorkerEndedError, match=words):
                worker.ask(exec, program)
            assert worker.ask(len, b"seven..") == 7
    finally:
        worker.stop()
    said = capfd.readouterr().err
    assert "MemoryError" in said and 'File "<string>", line 1' in said  # where it hung
