"""Krishnamoorthi's whitepaper (arXiv 1806.08342): the figures of its tables, as printed.

All are top-1 on ImageNet's 50,000 validation images, with simulated quantization; `params_millions`
of Table 1 counts moving statistics too.  A network has its name of Table 1 throughout, where the
paper spells it in several ways.  The plotted values of the paper's figures are not published.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of the paper: a row of figures for each network, one for each column."""

    caption: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]

    def figure(self, network: str | None, column: str) -> float | None:
        """Returns what the paper prints for a network, None where it has no such row or column."""
        if network not in self.rows or column not in self.columns:
            return None
        return self.rows[network][self.columns.index(column)]


TABLES = {
    1: Table(
        "Deep Convolutional networks: Model size and accuracy",
        ("params_millions", "float"),
        {
            "Mobilenet_V1_0.25_128": (0.47, 0.415),
            "Mobilenet_V2_1_224": (3.54, 0.719),
            "Mobilenet_V1_1_224": (4.25, 0.709),
            "Nasnet_Mobile": (5.3, 0.74),
            "Mobilenet_V2_1.4_224": (6.06, 0.749),
            "Inception_V3": (23.9, 0.78),
            "Resnet_v1_50": (25.6, 0.752),
            "Resnet_v2_50": (25.6, 0.756),
            "Resnet_v1_152": (60.4, 0.768),
            "Resnet_v2_152": (60.4, 0.778),
        },
    ),
    2: Table(
        "Weight only quantization, 8 bits, after training",
        ("asym_per_layer", "sym_per_channel", "asym_per_channel", "float"),
        {
            "Mobilenet_V1_1_224": (0.001, 0.591, 0.704, 0.709),
            "Mobilenet_V2_1_224": (0.001, 0.698, 0.698, 0.719),
            "Nasnet_Mobile": (0.722, 0.721, 0.74, 0.74),
            "Mobilenet_V2_1.4_224": (0.004, 0.74, 0.74, 0.749),
            "Inception_V3": (0.78, 0.78, 0.78, 0.78),
            "Resnet_v1_50": (0.75, 0.751, 0.752, 0.752),
            "Resnet_v2_50": (0.75, 0.75, 0.75, 0.756),
            "Resnet_v1_152": (0.766, 0.763, 0.762, 0.768),
            "Resnet_v2_152": (0.761, 0.76, 0.77, 0.778),
        },
    ),
    3: Table(
        "Quantization of weights and activations, 8 bits each, after training",
        ("asym_per_layer", "sym_per_channel", "asym_per_channel", "activation_only", "float"),
        {
            "Mobilenet_V1_1_224": (0.001, 0.591, 0.703, 0.708, 0.709),
            "Mobilenet_V2_1_224": (0.001, 0.698, 0.697, 0.7, 0.719),
            "Nasnet_Mobile": (0.722, 0.721, 0.74, 0.74, 0.74),
            "Mobilenet_V2_1.4_224": (0.004, 0.74, 0.74, 0.742, 0.749),
            "Inception_V3": (0.78, 0.78, 0.78, 0.78, 0.78),
            "Resnet_v1_50": (0.75, 0.751, 0.751, 0.751, 0.752),
            "Resnet_v2_50": (0.75, 0.75, 0.75, 0.75, 0.756),
            "Resnet_v1_152": (0.766, 0.762, 0.767, 0.761, 0.768),
            "Resnet_v2_152": (0.761, 0.76, 0.76, 0.76, 0.778),
        },
    ),
    4: Table(
        "Quantization-aware training, 8 bits, and quantization after training",
        ("asym_per_layer", "sym_per_channel", "asym_per_layer_qat", "sym_per_channel_qat", "float"),
        {
            "Mobilenet_V1_1_224": (0.001, 0.591, 0.7, 0.707, 0.709),
            "Mobilenet_V2_1_224": (0.001, 0.698, 0.709, 0.711, 0.719),
            "Nasnet_Mobile": (0.722, 0.721, 0.73, 0.73, 0.74),
            "Mobilenet_V2_1.4_224": (0.004, 0.74, 0.735, 0.745, 0.749),
            "Inception_V3": (0.78, 0.78, 0.78, 0.78, 0.78),
            "Resnet_v1_50": (0.75, 0.751, 0.75, 0.75, 0.752),
            "Resnet_v2_50": (0.75, 0.75, 0.75, 0.75, 0.756),
            "Resnet_v1_152": (0.766, 0.762, 0.765, 0.762, 0.768),
            "Resnet_v2_152": (0.761, 0.76, 0.76, 0.76, 0.778),
        },
    ),
    5: Table(
        "Weights of 4 bits, activations of 8 bits",
        ("asym_per_layer", "sym_per_channel", "sym_per_channel_qat", "float"),
        {
            "Mobilenet_V1_1_224": (0.02, 0.001, 0.65, 0.709),
            "Mobilenet_V2_1_224": (0.001, 0.001, 0.62, 0.719),
            "Nasnet_Mobile": (0.001, 0.36, 0.7, 0.74),
            "Mobilenet_V2_1.4_224": (0.001, 0.001, 0.704, 0.749),
            "Inception_V3": (0.5, 0.71, 0.76, 0.78),
            "Resnet_v1_50": (0.002, 0.54, 0.732, 0.752),
            "Resnet_v1_152": (0.001, 0.64, 0.725, 0.768),
            "Resnet_v2_50": (0.18, 0.72, 0.73, 0.756),
            "Resnet_v2_152": (0.18, 0.74, 0.74, 0.778),
        },
    ),
    6: Table(
        "Weights of 8 bits (symmetric, per channel), activations of 4 bits (per layer)",
        ("sym_per_channel", "sym_per_channel_qat", "sym_per_channel_qat_w4a8", "float"),
        {
            "Mobilenet_V1_1_224": (0.48, 0.64, 0.65, 0.709),
            "Mobilenet_V2_1_224": (0.07, 0.58, 0.62, 0.719),
            "Resnet_v1_50": (0.36, 0.58, 0.732, 0.752),
            "Nasnet_Mobile": (0.04, 0.4, 0.7, 0.74),
            "Inception_V3": (0.59, 0.74, 0.76, 0.78),
        },
    ),
}
# Table 7, "Inference time measurements on Pixel2 phone in milliseconds on a single large core"; None
# where it prints none.  HVX: through Android's NN-API.
LATENCY_MS = Table(
    "Inference time on a Pixel 2, one large core, in milliseconds",
    ("float_cpu", "fixed_cpu", "fixed_hvx"),
    {
        "Mobilenet_V1_1_224": (155, 68, 16),
        "Mobilenet_V2_1_224": (105, 63, 15.5),
        "Mobilenet_V1_1_224_SSD": (312, 152, None),
        "Inception_V3": (1391, 536, None),
        "Resnet_v1_50": (874, 440, None),
        "Resnet_v2_50": (1667, 1145, None),
        "Resnet_v1_152": (2581, 1274, None),
        "Resnet_v2_152": (4885, 3240, None),
    },
)
