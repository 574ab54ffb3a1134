"""The earliest TensorFlow Lite that knows an operator in a version, and what a file needs of it.

    minimum_runtime([("CONV_2D", 3), ("RESIZE_BILINEAR", 4)])  -> ("2.5.0", ("RESIZE_BILINEAR", 4))

TensorFlow's converter writes the same figure into its files, as metadata `min_runtime_version`.
"""

from collections.abc import Iterable

NEWEST = "2.21.0"  # TensorFlow whose table this is; later operator versions are unknown here

# op: the runtime that brought version 1, 2, ...; "": a version that was withdrawn.  The facts are
# those of TensorFlow 2.21, tensorflow/lite/tools/versioning/runtime_version.cc.
RUNTIMES: dict[str, tuple[str, ...]] = {
    "ABS": ("1.13.0", "2.4.0", "2.5.0", "2.6.0", "2.12.0"),
    "ADD": ("1.5.0", "1.14.0", "2.4.0", "2.6.0", "2.13.0"),
    **dict.fromkeys(
        (
            *("ADD_N", "CEIL", "COS", "ELU"),
            *("MATRIX_DIAG", "MATRIX_SET_DIAG", "RANK", "REVERSE_SEQUENCE"),
            *("ROUND", "UNIQUE"),
        ),
        ("1.14.0",),
    ),
    **dict.fromkeys(("ARG_MAX", "ARG_MIN"), ("1.9.0", "1.14.0", "2.9.0")),
    **dict.fromkeys(
        (
            *("ASSIGN_VARIABLE", "BROADCAST_ARGS", "CONV_3D_TRANSPOSE", "READ_VARIABLE"),
            *("REDUCE_ALL", "VAR_HANDLE"),
        ),
        ("2.6.0",),
    ),
    **dict.fromkeys(
        (
            "ATAN2",
            "RELU_0_TO_1",
            "UNSORTED_SEGMENT_MAX",
            "UNSORTED_SEGMENT_PROD",
            "UNSORTED_SEGMENT_SUM",
        ),
        ("2.10.0",),
    ),
    **dict.fromkeys(
        ("AVERAGE_POOL_2D", "MAX_POOL_2D", "RNN", "SOFTMAX"), ("1.5.0", "1.14.0", "2.3.0")
    ),
    "BATCH_MATMUL": ("2.3.0", "2.3.0", "2.4.0", "2.5.0"),
    **dict.fromkeys(
        ("BATCH_TO_SPACE_ND", "SPACE_TO_BATCH_ND"), ("1.6.0", "1.14.0", "2.3.0", "2.12.0")
    ),
    "BIDIRECTIONAL_SEQUENCE_LSTM": ("1.14.0", "1.14.0", "1.14.0"),
    **dict.fromkeys(
        ("BIDIRECTIONAL_SEQUENCE_RNN", "LOGISTIC", "TANH", "UNIDIRECTIONAL_SEQUENCE_RNN"),
        ("1.14.0", "1.14.0", "2.3.0"),
    ),
    **dict.fromkeys(("BITCAST", "BITWISE_XOR", "RIGHT_SHIFT"), ("2.13.0",)),
    "BROADCAST_TO": ("", "2.5.0", "2.5.0"),
    **dict.fromkeys(
        ("BUCKETIZE", "MULTINOMIAL", "RANDOM_STANDARD_NORMAL", "RANDOM_UNIFORM"), ("2.8.0",)
    ),
    **dict.fromkeys(
        (
            *("CALL_ONCE", "COMPLEX_ABS", "CONV_3D", "HASHTABLE"),
            *("HASHTABLE_FIND", "HASHTABLE_IMPORT", "HASHTABLE_SIZE", "IMAG"),
            *("REAL", "RFFT2D"),
        ),
        ("2.5.0",),
    ),
    "CAST": ("1.5.0", "2.7.0", "2.8.0", "2.9.0", "2.12.0", "2.15.0", "2.17.0", "2.21.0"),
    "CONCATENATION": ("1.5.0", "1.14.0", "2.3.0", "2.14.0", "2.21.0"),
    "CONV_2D": ("1.5.0", "1.14.0", "1.14.0", "2.3.0", "2.4.0", "2.9.0", "2.11.0", "2.15.0"),
    "CUMSUM": ("2.4.0",),
    **dict.fromkeys(("DENSIFY", "SEGMENT_SUM"), ("2.2.0",)),
    "DEPTHWISE_CONV_2D": ("1.5.0", "1.12.0", "1.14.0", "2.2.0", "2.3.0", "2.3.0", "2.11.0"),
    "DEPTH_TO_SPACE": ("2.1.0", "2.5.0"),
    "DEQUANTIZE": ("1.13.1", "1.14.0", "1.15.0", "2.2.0", "2.7.0", "2.18.0", "2.21.0"),
    **dict.fromkeys(
        ("DILATE", "REDUCE_WINDOW", "STABLEHLO_RNG_BIT_GENERATOR", "STABLEHLO_SCATTER"), ("2.15.0",)
    ),
    "DIV": ("1.6.0", "2.3.0"),
    "DYNAMIC_UPDATE_SLICE": ("2.9.0", "2.17.0", "2.19.0", "2.20.0", "2.21.0"),
    "EMBEDDING_LOOKUP": ("1.13.0", "1.14.0", "1.14.0", "2.18.0", "2.21.0"),
    **dict.fromkeys(
        (
            *(
                "EMBEDDING_LOOKUP_SPARSE",
                "HASHTABLE_LOOKUP",
                "L2_POOL_2D",
                "LOCAL_RESPONSE_NORMALIZATION",
            ),
            *("LSH_PROJECTION", "RELU_N1_TO_1", "RESHAPE", "SKIP_GRAM"),
        ),
        ("1.5.0",),
    ),
    "EQUAL": ("1.14.0", "1.14.0", "2.3.0", "2.13.0", "2.21.0"),
    "EXP": ("1.7.0", "2.12.0"),
    **dict.fromkeys(("EXPAND_DIMS", "POW", "SHAPE"), ("1.10.0",)),
    "FAKE_QUANT": ("1.5.0", "1.10.0"),
    "FILL": ("1.13.0", "2.3.0", "2.5.0", "2.12.0"),
    **dict.fromkeys(("FLOOR", "NEG", "SIN"), ("1.9.0",)),
    **dict.fromkeys(("FLOOR_DIV", "GREATER_EQUAL", "LESS"), ("1.14.0", "1.14.0", "2.13.0")),
    "FLOOR_MOD": ("1.13.0", "2.13.0"),
    "FULLY_CONNECTED": (
        *("1.5.0", "1.10.0", "1.14.0", "1.14.0", "2.0.0", "2.1.0", "2.3.0", "2.3.0", "2.3.0"),
        *("2.11.0", "2.15.0", "2.17.0", "2.18.0", "2.21.0"),
    ),
    "GATHER": ("1.6.0", "1.14.0", "1.15.0", "2.4.0", "2.5.0", "2.13.0", "2.15.0"),
    "GATHER_ND": ("1.14.0", "2.3.0", "2.5.0", "2.13.0", "2.16.0"),
    "GELU": ("2.9.0", "2.9.0"),
    **dict.fromkeys(("GREATER", "LESS_EQUAL", "LOG_SOFTMAX"), ("1.14.0", "1.14.0")),
    **dict.fromkeys(("HARD_SWISH", "IF", "WHILE"), ("1.15.0",)),
    **dict.fromkeys(("L2_NORMALIZATION", "SPACE_TO_DEPTH"), ("1.5.0", "1.14.0")),
    **dict.fromkeys(("LEAKY_RELU", "SPLIT_V"), ("1.13.1", "2.3.0")),
    "LOG": ("1.14.0", "2.15.0"),
    **dict.fromkeys(
        ("LOGICAL_AND", "LOGICAL_NOT", "LOGICAL_OR", "ONE_HOT", "REDUCE_ANY"), ("1.11.0",)
    ),
    "LSTM": ("1.7.0", "1.10.0", "1.14.0", "2.3.0"),
    **dict.fromkeys(("MAXIMUM", "MINIMUM"), ("1.14.0", "1.14.0", "2.3.0", "2.3.0")),
    "MEAN": ("1.6.0", "1.14.0", "2.4.0"),
    "MIRROR_PAD": ("1.13.1", "2.3.0", "2.12.0"),
    "MUL": ("1.5.0", "1.14.0", "1.15.0", "2.3.0", "2.6.0", "2.11.0", "2.13.0"),
    **dict.fromkeys(("NON_MAX_SUPPRESSION_V4", "NON_MAX_SUPPRESSION_V5", "SCATTER_ND"), ("2.1.0",)),
    "NOT_EQUAL": ("1.14.0", "1.14.0", "2.3.0", "2.21.0"),
    "PACK": ("1.11.0", "1.14.0", "2.3.0", "2.13.0"),
    "PAD": ("1.5.0", "1.14.0", "2.4.0", "2.6.0", "2.20.0"),
    "PADV2": ("1.9.0", "1.14.0", "2.4.0", "2.6.0", "2.20.0"),
    "PRELU": ("1.8.0",),
    "QUANTIZE": ("1.14.0", "1.15.0", "2.7.0", "2.21.0"),
    "RANGE": ("1.13.0", "2.14.0"),
    **dict.fromkeys(("REDUCE_MAX", "REDUCE_MIN"), ("1.11.0", "1.14.0", "2.5.0")),
    "REDUCE_PROD": ("1.11.0", "2.6.0"),
    "RELU": ("1.5.0", "2.1.0", "2.5.0"),
    "RELU6": ("1.5.0", "1.14.0", "2.5.0"),
    "RESIZE_BILINEAR": ("1.7.0", "1.14.0", "2.2.0", "2.5.0"),
    "RESIZE_NEAREST_NEIGHBOR": ("1.13.1", "1.14.0", "2.3.0", "2.4.0"),
    "REVERSE_V2": ("1.14.0", "2.2.0", "2.5.0"),
    "RSQRT": ("1.10.0", "2.5.0", "2.15.0"),
    "SELECT": ("1.14.0", "1.14.0", "2.12.0", "2.12.0"),
    "SELECT_V2": ("2.2.0", "2.12.0"),
    "SIGN": ("2.11.0", "2.12.0"),
    "SLICE": ("1.14.0", "1.14.0", "1.14.0", "2.4.0", "2.5.0", "2.14.0", "2.21.0"),
    "SPARSE_TO_DENSE": ("1.9.0", "1.14.0", "1.15.0"),
    "SPLIT": ("1.5.0", "1.14.0", "1.14.0", "2.3.0"),
    "SQRT": ("1.10.0", "2.21.0"),
    **dict.fromkeys(("SQUARE", "ZEROS_LIKE"), ("1.12.0",)),
    "SQUARED_DIFFERENCE": ("1.13.1", "2.5.0"),
    "SQUEEZE": ("1.6.0", "2.5.0"),
    **dict.fromkeys(
        (
            *("STABLEHLO_ADD", "STABLEHLO_GATHER", "STABLEHLO_MAXIMUM", "STABLEHLO_MINIMUM"),
            *("STABLEHLO_MULTIPLY", "STABLEHLO_PAD", "STABLEHLO_REDUCE_WINDOW"),
        ),
        ("2.16.0",),
    ),
    **dict.fromkeys(
        (
            "STABLEHLO_AND",
            "STABLEHLO_CASE",
            "STABLEHLO_CBRT",
            "STABLEHLO_COMPOSITE",
            "STABLEHLO_SHIFT_LEFT",
        ),
        ("2.17.0",),
    ),
    "STRIDED_SLICE": ("1.6.0", "1.14.0", "2.1.0", "2.2.0", "2.5.0", "2.6.0", "2.14.0", "2.14.0"),
    "SUB": ("1.6.0", "1.14.0", "2.3.0", "2.4.0", "2.4.0"),
    "SUM": ("1.10.0", "1.15.0"),
    "SVDF": ("1.5.0", "1.14.0", "2.2.0", "2.3.0"),
    "TILE": ("1.10.1", "2.2.0", "2.8.0"),
    "TOPK_V2": ("1.7.0", "1.14.0", "2.13.0"),
    "TRANSPOSE": ("1.6.0", "1.14.0", "1.15.0", "2.3.0", "2.4.0", "2.12.0", "2.14.4"),
    "TRANSPOSE_CONV": ("1.9.0", "2.2.0", "2.3.0", "2.13.0", "2.15.0"),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": ("1.13.1", "1.14.0", "2.3.0", "2.12.0"),
    "UNPACK": ("1.11.0", "1.14.0", "2.2.0", "2.3.0"),
    "UNSORTED_SEGMENT_MIN": ("2.11.0",),
    "WHERE": ("1.14.0", "2.8.0"),
}


def runtime_of(op: str, version: int) -> str | None:
    """Returns the first runtime with this version of an operator, None where the table has none."""
    known = RUNTIMES.get(op, ())
    return (known[version - 1] or None) if 1 <= version <= len(known) else None


def minimum_runtime(
    operators: Iterable[tuple[str, int]],
) -> tuple[str | None, tuple[str, int] | None]:
    """Returns the earliest runtime that knows all operators, and the first that asks for it.

    Operators that the table lacks are passed over, as the converter does; `unknown` names them.

    Args:
      operators: (op, version), such as ("CONV_2D", 3).
    """
    best, asks = None, None
    for op, version in operators:
        runtime = runtime_of(op, version)
        if runtime is not None and (best is None or _numbers(best) < _numbers(runtime)):
            best, asks = runtime, (op, version)
    return best, asks


def unknown(operators: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Returns the operators that the table lacks, each once: newer ones, and custom ones."""
    return [pair for pair in dict.fromkeys(operators) if runtime_of(*pair) is None]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
