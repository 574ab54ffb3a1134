"""DSQ (Gong et al., arXiv 1908.05033, ICCV 2019): the figures of its tables 2 to 7, as printed.

Accuracies are percent on CIFAR-10's test images (tables 3 to 6) or on ImageNet's validation images
(table 7).  All convolutional and dense layers but the first and the last are quantized, except in
the rows of `FULLY_QUANTIZED`.  Rows of other methods are as DSQ prints them: PACT's own paper (arXiv
1805.06085) has 89.7 for its ResNet-20 of 2 bits, from a float network of 91.6.
Networks are named as in the zoo, layers as in its resnet20.
"""

# (network, method, (bits of weights, bits of activations)); 32 bits are float
Row = tuple[str, str, tuple[int, int]]

# Table 2: the alpha that training found for the layers of ResNet-20, (weights', activations').  It
# starts at 0.2 and is kept in (0, 0.5); the smaller, the nearer is the soft curve to the steps.
LEARNT_ALPHA = {
    "layer1_0_conv1": (0.1075, 0.3455),
    "layer1_0_conv2": (0.0950, 0.3101),
    "layer1_1_conv1": (0.0895, 0.3046),
    "layer1_1_conv2": (0.0868, 0.2526),
    "layer1_2_conv1": (0.1368, 0.3621),
    "layer1_2_conv2": (0.0926, 0.3401),
    "layer2_0_conv1": (0.1578, 0.3903),
    "layer2_0_conv2": (0.1810, 0.3785),
    "layer2_0_shortcut": (0.0828, 0.2887),
    "layer2_1_conv1": (0.1641, 0.2722),
    "layer2_1_conv2": (0.1162, 0.2663),
    "layer2_2_conv1": (0.1605, 0.2690),
    "layer2_2_conv2": (0.1059, 0.2440),
    "layer3_0_conv1": (0.2042, 0.3993),
    "layer3_0_conv2": (0.2779, 0.4532),
    "layer3_0_shortcut": (0.0914, 0.2327),
    "layer3_1_conv1": (0.2484, 0.4241),
    "layer3_1_conv2": (0.2301, 0.3918),
    "layer3_2_conv1": (0.1965, 0.4238),
    "layer3_2_conv2": (0.0975, 0.3277),
}

# {number of the table: {row: (top-1, top-5 or None where none is printed)}}
TABLES: dict[int, dict[Row, tuple[float, float | None]]] = {
    # alpha fixed at 0.2; "piecewise" is the uniform quantizer of 1 bit
    3: {
        ("resnet20", "float", (32, 32)): (90.84, None),
        ("resnet20", "binary", (1, 1)): (82.46, None),
        ("resnet20", "binary DSQ", (1, 1)): (83.80, None),
        ("resnet20", "piecewise DSQ", (1, 1)): (84.11, None),
        ("resnet20", "binary", (1, 32)): (90.11, None),
        ("resnet20", "binary DSQ", (1, 32)): (90.24, None),
        ("resnet20", "piecewise DSQ", (1, 32)): (90.03, None),
    },
    # what is learnt; "2-bit" in the paper, taken for both
    4: {
        ("resnet20", "uniform", (2, 2)): (86.63, 99.35),
        ("resnet20", "DSQ, alpha fixed", (2, 2)): (86.95, 99.50),
        ("resnet20", "DSQ, alpha learnt", (2, 2)): (87.25, 99.49),
        ("resnet20", "DSQ, alpha and limits learnt", (2, 2)): (88.44, 99.50),
    },
    # "2-bit" in the paper, taken for both
    5: {
        ("resnet20", "PACT", (2, 2)): (88.24, 99.60),
        ("resnet20", "PACT and DSQ", (2, 2)): (90.11, 99.71),
    },
    # CIFAR-10
    6: {
        ("vgg_small", "float", (32, 32)): (91.65, None),
        ("vgg_small", "BNN", (1, 1)): (89.90, None),
        ("vgg_small", "XNOR-Net", (1, 1)): (89.80, None),
        ("vgg_small", "DSQ", (1, 1)): (91.72, None),
        ("resnet20", "float", (32, 32)): (90.78, None),  # table 3 prints 90.84
        ("resnet20", "DoReFa", (1, 1)): (79.30, None),
        ("resnet20", "DSQ", (1, 1)): (84.11, None),
        ("resnet20", "DoReFa", (1, 32)): (90.00, None),
        ("resnet20", "LQ-Nets", (1, 32)): (90.10, None),
        ("resnet20", "DSQ", (1, 32)): (90.24, None),
    },
    # ImageNet
    7: {
        ("resnet_v1_18", "float", (32, 32)): (69.90, None),
        ("resnet_v1_18", "BWN", (1, 32)): (60.80, None),
        ("resnet_v1_18", "HWGQ", (1, 32)): (61.30, None),
        ("resnet_v1_18", "TWN", (2, 32)): (61.80, None),
        ("resnet_v1_18", "DSQ", (1, 32)): (63.71, None),
        ("resnet_v1_18", "PACT", (2, 2)): (64.40, None),
        ("resnet_v1_18", "LQ-Nets", (2, 2)): (64.90, None),
        ("resnet_v1_18", "DSQ", (2, 2)): (65.17, None),
        ("resnet_v1_18", "ABC-Net", (3, 3)): (61.00, None),
        ("resnet_v1_18", "PACT", (3, 3)): (68.10, None),
        ("resnet_v1_18", "LQ-Nets", (3, 3)): (68.20, None),
        ("resnet_v1_18", "DSQ", (3, 3)): (68.66, None),
        ("resnet_v1_18", "BCGD", (4, 4)): (67.36, None),
        ("resnet_v1_18", "DSQ", (4, 4)): (69.56, None),
        ("resnet_v1_34", "float", (32, 32)): (73.80, None),
        ("resnet_v1_34", "LQ-Nets", (2, 2)): (69.80, None),
        ("resnet_v1_34", "DSQ", (2, 2)): (70.02, None),
        ("resnet_v1_34", "ABC-Net", (3, 3)): (66.70, None),
        ("resnet_v1_34", "LQ-Nets", (3, 3)): (71.90, None),
        ("resnet_v1_34", "DSQ", (3, 3)): (72.54, None),
        ("resnet_v1_34", "BCGD", (4, 4)): (70.81, None),
        ("resnet_v1_34", "DSQ", (4, 4)): (72.76, None),
        ("mobilenet_v2", "float", (32, 32)): (71.87, None),
        ("mobilenet_v2", "PACT", (4, 4)): (61.40, None),
        ("mobilenet_v2", "DSQ", (4, 4)): (64.80, None),
    },
}

# Rows of table 7 that the paper marks "+": all convolutions are quantized.
FULLY_QUANTIZED = {
    (network, method, (4, 4))
    for network in ("resnet_v1_18", "resnet_v1_34")
    for method in ("BCGD", "DSQ")
}
