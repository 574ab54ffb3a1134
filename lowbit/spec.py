"""What is quantized, and how: the frozen specifications that every other file takes.

Reading a scheme's name: `w8a8` is 8-bit weights and 8-bit activations, `w8` weights only, `a8`
activations only.  Unless a suffix says otherwise, weights are symmetric, narrow range, one scale per
output channel; activations asymmetric, one scale per tensor (the int8 specification of TFLite, and
the schemes "symmetric per-channel" and "asymmetric per-layer" of Krishnamoorthi's Table 3).
Activations that stay in float: `w8` has weights that are dequantized before a float kernel, `dynamic`
8-bit weights beside activations that the kernel quantizes itself, `float16` and `float32` neither.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How one tensor becomes integer codes.

    Codes of a `bits`-wide quantizer (n = 2**bits); `affine.integer_bounds` is this table:

    | signed | narrow_range | lowest code | highest code |
    |--------|--------------|-------------|--------------|
    | yes    | no           | -n/2        | n/2 - 1      |
    | yes    | yes          | -(n/2 - 1)  | n/2 - 1      |
    | no     | no           | 0           | n - 1        |
    | no     | yes          | 0           | n - 2        |
    """

    bits: int = 8  # 2 to 16
    symmetric: bool = False  # zero_point is 0
    narrow_range: bool = False  # drops one code: whitepaper eq. 10 and 11
    signed: bool = True
    axis: int | None = None  # the axis that has a scale for each index; None: one scale in all

    def __post_init__(self):
        if not 2 <= self.bits <= 16:
            raise ValueError(f"bits is {self.bits}; allowed are 2 to 16")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What a model's weights and activations get; None leaves them in float."""

    name: str
    weights: QuantSpec | None
    activations: QuantSpec | None
    per_channel: bool = True  # convolution weights: a scale for each output channel
    dense_per_channel: bool = True  # the same for Dense; the MLIR converter can only do False
    dynamic: bool = (
        False  # float activations meet integer weights in the kernel, by a scale an image
    )
    float_bits: int = 32  # of weights that are not quantized, in a file

    def weights_of(self, kind: str) -> QuantSpec | None:
        """Returns what a layer's weights get, axis -1 where each output channel has its scale.

        Args:
          kind: "conv", "depthwise" or "dense".
        """
        per_channel = self.dense_per_channel if kind == "dense" else self.per_channel
        if self.weights is None or not per_channel:
            return self.weights
        return dataclasses.replace(self.weights, axis=-1)


@dataclasses.dataclass(frozen=True)
class Bits:
    """What each layer gets: a scheme, and where another one holds instead of it."""

    scheme: Scheme
    # (pattern of layer names as in a shell, scheme) in order, the last that matches counts.  A scheme
    # is for the layer's weights and its output; "input" is the model's input.
    overrides: tuple[tuple[str, Scheme], ...] = ()
    # Of the first and the last layer with weights: these, and the activations that they read, and
    # the model's output.  None: as the others.
    ends: Scheme | None = None
    # Of what additions read and write; layers with weights read a copy in their own bits.  The
    # papers on low bits keep these tensors in float.
    additions: Scheme | None = None

    def schemes(self) -> tuple[Scheme, ...]:
        """Returns every scheme that is named."""
        others = [scheme for scheme in (self.ends, self.additions) if scheme is not None]
        return (self.scheme, *(scheme for _, scheme in self.overrides), *others)


def _weights(bits: int, symmetric: bool = True) -> QuantSpec:
    # Narrow range: TFLite's int8 weights lie in [-127, 127], so that two products fit in int16.
    return QuantSpec(bits, symmetric=symmetric, narrow_range=symmetric)


def _activations(bits: int) -> QuantSpec:
    # TFLite's int16 activations must have zero_point 0.
    return QuantSpec(bits, symmetric=bits == 16, narrow_range=bits == 16)


def _scheme(name: str, weight_bits: int | None, activation_bits: int | None, **options) -> Scheme:
    symmetric = options.pop("symmetric", True)
    return Scheme(
        name,
        weights=None if weight_bits is None else _weights(weight_bits, symmetric),
        activations=None if activation_bits is None else _activations(activation_bits),
        **options,
    )


WEIGHT_BITS = range(2, 9)
ACTIVATION_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
# How a name's end changes the weights: the columns of the whitepaper's Tables 2 and 3.
_GRANULARITIES = {
    "": {},
    "_per_tensor": {"per_channel": False, "dense_per_channel": False},
    "_asymmetric": {"symmetric": False},
    "_per_tensor_asymmetric": {
        "per_channel": False,
        "dense_per_channel": False,
        "symmetric": False,
    },
}

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        *(
            _scheme(f"w{weights}a{activations}{suffix}", weights, activations, **options)
            for weights in WEIGHT_BITS
            for activations in ACTIVATION_BITS
            for suffix, options in _GRANULARITIES.items()
        ),
        *(
            _scheme(f"w{weights}{suffix}", weights, None, **options)
            for weights in WEIGHT_BITS
            for suffix, options in _GRANULARITIES.items()
        ),
        *(_scheme(f"a{activations}", None, activations) for activations in ACTIVATION_BITS),
        _scheme("w8a8_dense_per_tensor", 8, 8, dense_per_channel=False),
        _scheme("dynamic", 8, None, dynamic=True),
        _scheme("float32", None, None),
        _scheme("float16", None, None, float_bits=16),
    )
}

ALLOWED = (
    "w8a8 and the like (weights of 2 to 8 bits, activations of 2 to 8 or 16), w8 (weights alone), a8 "
    "(activations alone); weights with _per_tensor, _asymmetric or _per_tensor_asymmetric behind "
    "them; w8a8_dense_per_tensor; dynamic; float16; float32"
)


def scheme(name: str) -> Scheme:
    """Returns the named scheme; raises ValueError with the allowed names otherwise."""
    if name not in SCHEMES:
        raise ValueError(f"scheme {name!r} is unknown; allowed are {ALLOWED}")
    return SCHEMES[name]


BITS_FLAGS = ("override", "ends", "additions")


def as_bits(scheme: Scheme | Bits) -> Bits:
    """Returns `Bits` that are one scheme everywhere, or those given."""
    return scheme if isinstance(scheme, Bits) else Bits(scheme)


def bits(
    scheme_name: str,
    overrides: str | None = None,
    ends: str | None = None,
    additions: str | None = None,
) -> Bits:
    """Returns the `Bits` that a tool's flags mean.

    Args:
      scheme_name, ends, additions: names of schemes.
      overrides: "PATTERN=SCHEME", several with commas.

    Raises:
      ValueError: names the flag and what is wrong with it.
    """
    rules = []
    for rule in overrides.split(",") if overrides else ():
        pattern, equals, name = rule.strip().rpartition("=")
        if not equals or not pattern:
            raise ValueError(f"--override: {rule!r} is not PATTERN=SCHEME, such as 'conv1*=w8a8'")
        rules.append((pattern, _flag_scheme("override", name)))
    return Bits(
        scheme(scheme_name),
        tuple(rules),
        None if ends is None else _flag_scheme("ends", ends),
        None if additions is None else _flag_scheme("additions", additions),
    )


def _flag_scheme(flag, name):
    try:
        return scheme(name)
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from error


def why_simulated_only(scheme: Scheme) -> str | None:
    """Returns why no file can hold a scheme, or None where export takes it."""
    if scheme.weights is not None and not scheme.weights.symmetric:
        return "the kernels take symmetric weights alone (zero point 0)"
    if scheme.activations is None:
        return None
    if scheme.weights is None:
        return "an integer kernel needs integer weights beside integer activations"
    if scheme.activations.bits < 8:
        return (
            f"activations of {scheme.activations.bits} bits are exported behind a ReLU alone; with "
            "--ends=w8a8 that may be all of them"
        )
    return None
