"""What benchmark tools print, every format: lines of real runs, of builds from 2018 to 2026."""

# ruff: noqa: E501  the tools' own lines

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.devices import benchmark_output
from lowbit.devices.benchmark_output import NOT, PARTLY, WHOLE, OutputError, extent_of, parse

NEW = """INFO: STARTING!
INFO: Log parameter values verbosely: [0]
INFO: Num threads: [4]
INFO: Graph: [model.tflite]
INFO: #threads used for CPU inference: [4]
INFO: Loaded model model.tflite
INFO: The input model file size (MB): 67.3128
INFO: Initialized session in 5.579ms.
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=1 curr=1357602 p5=1357602 median=1357602 p95=1357602

INFO: Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
INFO: count=50 first=1249964 curr=1240143 min=1238588 max=1252566 avg=1.24027e+06 std=2565 p5=1238753 median=1239807 p95=1247415

INFO: Inference timings in us: Init: 5579, First inference: 1357602, Warmup (avg): 1.3576e+06, Inference (avg): 1.24027e+06
INFO: Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE to the actual memory footprint of the model at runtime. Take the information at your discretion.
INFO: Memory footprint delta from the start of the tool (MB): init=6.36328 overall=109.832
INFO: Overall peak memory footprint (MB) via periodic monitoring: 121.5
INFO: Memory status at the end of exeution:
INFO: - VmRSS              : 112 MB
"""
OF_2018 = """Loaded model mobilenet_v1_1.0_224_quant.tflite
resolved reporter
Initialized session in 4.452ms
Running benchmark for 1 iterations
count=1 curr=146161

Running benchmark for 50 iterations
count=50 first=137789 curr=137254 min=137079 max=143416 avg=137722 std=896

Average inference timings in us: Warmup: 146161, Init: 4452, no stats: 137722
"""
PROFILE_TABS = """INFO: Inference timings in us: Init: 16772, First inference: 8781, Warmup (avg): 7514.93, Inference (avg): 7454.97
INFO: Profiling Info for Benchmark Initialization:
============================== Run Order ==============================
\t                         [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t             ModifyGraphWithDelegate\t   14.842\t   14.842\t 99.317%\t 99.317%\t  3428.000\t        1\tModifyGraphWithDelegate/0

============================== Top by Computation Time ==============================
\t                         [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t             ModifyGraphWithDelegate\t   14.842\t   14.842\t 99.317%\t 99.317%\t  3428.000\t        1\tModifyGraphWithDelegate/0

Number of nodes executed: 2
Timings (microseconds): count=1 curr=14944
Memory (bytes): count=0
2 nodes observed

INFO: Operator-wise Profiling Info for Regular Benchmark Runs:
============================== Run Order ==============================
\t                         [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t       Convolution (NHWC, QU8) IGEMM\t    0.267\t    0.278\t  3.783%\t  3.783%\t     0.000\t        1\tDelegate/Convolution (NHWC, QU8) IGEMM:0
\t                       Add (ND, QU8)\t    0.051\t    0.051\t  0.693%\t 26.477%\t     0.000\t        1\tDelegate/Add (ND, QU8):9

============================== Top by Computation Time ==============================
\t                         [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t       Convolution (NHWC, QU8) IGEMM\t    0.267\t    0.278\t  3.783%\t  3.783%\t     0.000\t        1\tDelegate/Convolution (NHWC, QU8) IGEMM:0

Number of nodes executed: 2
Timings (microseconds): count=50 first=79449 curr=81350 min=77385 max=88213 avg=79732 std=1929
Memory (bytes): count=0
"""
PROFILE_SPACES = """Initialized session in 1.892ms
Running benchmark for at least 1 iterations and at least 0.5 seconds
count=6 first=91810 curr=85097 min=84834 max=91810 avg=86184.3 std=2519

Running benchmark for at least 50 iterations and at least 1 seconds
count=50 first=118810 curr=114219 min=88216 max=129193 avg=115062 std=7678

Average inference timings in us: Warmup: 86184.3, Init: 1892, no stats: 115062
============================== Run Order ==============================
                     [node type]                  [start]         [first]        [avg ms]            [%]          [cdf%]  [mem KB]      [times called]  [Name]
                         CONV_2D                    0.000           5.567           7.237         6.297%          6.297%     0.000              1       [MobilenetV2/Conv/Relu6]
               DEPTHWISE_CONV_2D                    7.238           4.100           4.700         4.000%         10.297%     0.000              1       [MobilenetV2/expanded_conv/depthwise/Relu6]
"""
NEWER = """
========================================
 BENCHMARK RESULTS
========================================
Model initialization:  45.32 ms
Warmup (first):        3.20 ms
Warmup (avg):          2.50 ms (5 runs)
Inference (avg):       2.31 ms (50 runs)
Inference (min):       2.20 ms
Inference (max):       2.90 ms
Inference (median):    2.30 ms
Inference (std):       0.10 ms
Inference (p5):        2.21 ms
Inference (p95):       2.60 ms
Throughput:            62.10 MB/s
Fully accelerated:     True
========================================
"""
TIMINGS = (
    "INFO: Inference timings in us: Init: 5579, First inference: 9000, Warmup (avg): 8000, "
    "Inference (avg): 7000.5\n"
)


def test_a_build_of_today():
    made = parse(NEW)
    assert (made.latency_ms, made.init_ms, made.first_ms) == (1240.27, 5.579, 1357.602)
    assert (made.warmup_ms, made.runs) == (1357.6, 50)
    assert (made.latency_ms_min, made.latency_ms_max, made.latency_ms_std) == (
        *(1238.588, 1252.566, 2.565),
    )
    assert (made.latency_ms_p5, made.latency_ms_median, made.latency_ms_p95) == (
        *(1238.753, 1239.807, 1247.415),
    )
    assert (made.memory_mb, made.peak_memory_mb) == (109.832, 121.5)
    assert made.delegations == made.operators == made.trouble == ()


def test_a_build_of_2018():
    made = parse(OF_2018)
    assert (made.latency_ms, made.init_ms, made.warmup_ms) == (137.722, 4.452, 146.161)
    assert (made.first_ms, made.latency_ms_median, made.memory_mb) == (None, None, None)
    assert (made.runs, made.latency_ms_min) == (50, 137.079)


def test_a_build_of_2019_and_its_memory():
    made = parse(
        "Average inference timings in us: Warmup: 83235, Init: 38467, Inference: 79760.9\n"
        "Peak memory footprint (MB): init=1.5 overall=9.25\n"
    )
    assert (made.latency_ms, made.init_ms, made.memory_mb) == (79760.9 / 1000, 38.467, 9.25)
    assert made.runs is None
    stats = "Average inference timings in us: Warmup: 169371, Init: 7, no stats: 154047, with stats: 165939"
    assert parse(stats).latency_ms == 154.047


@pytest.mark.parametrize(
    "prefix",
    ["INFO: ", "", "\tINFO: ", "I tflite  : ", "I/tflite  (21767): "]
    + [
        "05-31 10:31:13.042 21767 21767 I tflite  : ",
        "05-31 10:31:13.042 21767 21767 I tflite  : INFO: ",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_prefix_and_line_end(prefix, end):
    lines = [line.removeprefix("INFO: ") for line in NEW.splitlines()]
    assert parse(end.join(prefix + line for line in lines)) == parse(NEW)


def test_one_run():
    made = parse(f"INFO: count=1 curr=7000\n{TIMINGS}")
    assert (made.runs, made.latency_ms, made.latency_ms_min) == (1, 7.0005, None)


def test_litert_newer_tool():
    made = parse(NEWER)
    assert (made.latency_ms, made.init_ms, made.first_ms) == (2.31, 45.32, 3.2)
    assert (made.warmup_ms, made.runs, made.latency_ms_p95) == (2.5, 50, 2.6)
    assert extent_of(made, "accelerator") == WHOLE
    assert extent_of(parse(NEWER.replace("True", "False")), "accelerator") == NOT
    with pytest.raises(OutputError, match=r"the results lack|results lack 'Inference \(avg\)'"):
        parse(NEWER[: NEWER.index("Inference (avg)")])
    inline = "========== BENCHMARK RESULTS ==========\nModel initialization: 45.32 ms\n"
    assert parse(f"{inline}Inference (avg): 2310.0 us (50 runs)\n").latency_ms == 2.31


@pytest.mark.parametrize(
    "lines, name, extent",
    [
        (
            "INFO: Explicitly applied GPU delegate, and the model graph will be completely executed by the "
            "delegate.",
            *("gpu", WHOLE),
        ),
        (
            "INFO: Explicitly applied NNAPI delegate, and the model graph will be partially executed by the "
            "delegate w/ 3 delegate kernels.",
            *("NNAPI", PARTLY),
        ),
        (
            "INFO: Though NNAPI delegate is explicitly applied, the model graph will not be executed by the "
            "delegate.",
            *("nnapi", NOT),
        ),
        # A Pixel's: every node is replaced, it says, and then that nothing runs there.
        (
            "VERBOSE: Replacing 31 out of 31 node(s) with delegate (TfLiteNnapiDelegate) node, yielding 1 "
            "partitions for subgraph 0.\nINFO: Though NNAPI delegate is explicitly applied, the model graph "
            "will not be executed by the delegate.",
            *("nnapi", NOT),
        ),
        (
            "VERBOSE: Replacing 49 out of 49 node(s) with delegate (TfLiteGpuDelegateV2) node, yielding 1 "
            "partitions for subgraph 0.",
            *("gpu", WHOLE),
        ),
        (
            "VERBOSE: Replacing 136 node(s) with delegate (TfLiteHexagonDelegate) node, yielding 5 partitions.",
            *("hexagon", PARTLY),  # of how many it does not say
        ),
        (
            "INFO: Hexagon delegate: 31 nodes delegated out of 31 nodes with 1 partitions.",
            *("hexagon", WHOLE),
        ),
        (
            "INFO: TfLiteHexagonDelegate delegate: 136 nodes delegated out of 139 nodes with 2 partitions.",
            *("hexagon", PARTLY),
        ),
        # tensorflow#74993: a phone without the library, and a fast CPU.
        (
            "Could not create Hexagon delegate: platform may not support delegate or required libraries are "
            "missing\nINFO: Created TensorFlow Lite XNNPACK delegate for CPU.",
            *("hexagon", NOT),
        ),
        # tensorflow#49247: counted, then refused.
        (
            "INFO: TfLiteHexagonDelegate delegate: 125 nodes delegated out of 125 nodes with 1 partitions.\n"
            "ERROR: hexagon_nn_config failed. Error: -1\nERROR: Restored original execution plan after "
            "delegate application failure.\nFailed to apply Hexagon delegate.",
            *("hexagon", NOT),
        ),
        ("INFO: NNAPI delegate created.\nINFO: Created TensorFlow Lite delegate for NNAPI.", "nnapi", NOT),
        ("INFO: Explicitly applied XNNPACK delegate, and the model graph will be completely executed by the delegate.", "hexagon", NOT),
    ],
)  # fmt: skip
def test_what_a_delegate_computed(lines, name, extent):
    assert extent_of(parse(f"{lines}\n{TIMINGS}"), name) == extent


def test_trouble_is_kept():
    made = parse(f"Unconsumed cmdline flags: --use_hexagon=true\n{TIMINGS}")
    assert made.trouble == ("Unconsumed cmdline flags: --use_hexagon=true",)


def test_op_profiles():
    made = parse(PROFILE_TABS)
    assert made.operators == (
        benchmark_output.Operator(
            *("Convolution (NHWC, QU8) IGEMM", "Delegate/Convolution (NHWC, QU8) IGEMM:0"),
            *(0.267, 0.278),
        ),
        benchmark_output.Operator("Add (ND, QU8)", "Delegate/Add (ND, QU8):9", 0.051, 0.051),
    )
    assert made.runs is None  # the profile's "Timings: count=50" is not the run's
    old = parse(PROFILE_SPACES).operators
    assert [(one.kind, one.average) for one in old] == [
        ("CONV_2D", 7.237),
        ("DEPTHWISE_CONV_2D", 4.7),
    ]
    assert old[1].name == "[MobilenetV2/expanded_conv/depthwise/Relu6]"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda text: text[: text.index("INFO: Inference timings")], "ends without a latency.*count=50"),
        (lambda text: "", "ends without a latency.*nothing at all"),
        (lambda text: "Benchmarking failed.\n", "Benchmarking failed"),
        (lambda text: text.replace("(avg): 1.24027e+06", "(avg): 1.24027e"), "a damaged line"),
        (lambda text: text.replace("(avg): 1.24027e+06", "(avg): nan"), "a damaged line"),
        (lambda text: text.replace("(avg): 1.24027e+06", "(avg): 0"), "the average is 0.0 us in one"),
        (lambda text: text.replace("(avg): 1.24027e+06", "(avg): 1.24e+999"), "is inf"),
        (lambda text: text.replace("avg=1.24027e+06", "avg=1.54027e+06"), "1540270.0 us in another"),
        (lambda text: text.replace("avg=1.24027e+06 ", ""), "a damaged line"),
        (lambda text: text + text, "holds 2 benchmarks"),
        (lambda text: text.replace("Init: 5579, First", "Init: 55INFO: 79, First"), "a damaged line"),
    ],
)  # fmt: skip
def test_truncated_and_garbled(edit, message):
    with pytest.raises(OutputError, match=message):
        parse(edit(NEW))


def test_a_damaged_profile():
    with pytest.raises(OutputError, match="a damaged line of the op profile"):
        parse(PROFILE_TABS.replace("0.051\t    0.051\t", "0.051\t"))
    with pytest.raises(OutputError, match="an op profile with the columns"):
        parse(PROFILE_TABS.replace("[avg ms]", "[avg]"))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(NEW)), st.integers(0, 60), st.text(max_size=8), st.data())
def test_any_damage_gives_the_right_figure_or_an_error(start, length, text, data):
    whole = data.draw(st.sampled_from([NEW, OF_2018, PROFILE_TABS, PROFILE_SPACES, NEWER]))
    start = min(start, len(whole))
    damaged = whole[:start] + text + whole[start + length :]
    try:
        made = parse(damaged)
    except OutputError as error:
        assert str(error)
        return
    assert 0 < made.latency_ms < float("inf")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2000))
def test_no_prefix_of_a_run_gives_another_figure(end):
    """A line that was cut within its last number must not be taken for a faster run."""
    try:
        made = parse(NEW[:end])
    except OutputError:
        return
    assert made.latency_ms == parse(NEW).latency_ms
