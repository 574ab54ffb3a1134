"""Mutations of `.tflite` files: functions of the bytes and a random generator, to bytes.

Some change bytes wherever they lie; the others unpack the flatbuffer, change fields of it, such as a
tensor's shape or a node's inputs, and pack it again, so that all but those fields stays readable.
"""

import functools
import math
import re
import struct

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from lowbit import tflite_file


def any_of(random, choices):
    """Returns one of the choices, as it is."""
    return choices[int(random.integers(len(choices)))]


def extreme_integer(random, size_bytes):
    """Returns a number that sizes, indices and offsets of a file of this size go wrong at."""
    power = 2 ** int(random.integers(1, 32))
    near = int(random.integers(-3, 300))
    extremes = [0, -1, 2**31 - 1, 2**31 - power, size_bytes, power, power - 1, -power]
    return any_of(random, [*extremes, near, near])


def extreme_float(random, value):
    return any_of(random, [0.0, -1.0, math.nan, math.inf, -math.inf, 3e38, 1e-45, 2 * value])


# --- bytes --------------------------------------------------------------------------------------


def flip_bits(content, random):
    """Flips 1 to 8 bits."""
    array = np.frombuffer(content, np.uint8).copy()
    for place in random.integers(array.size, size=random.integers(1, 9)):
        array[place] ^= 1 << int(random.integers(8))
    return array.tobytes()


def set_bytes(content, random):
    """Sets 1 to 8 bytes to 0, 255 or anything."""
    array = np.frombuffer(content, np.uint8).copy()
    places = random.integers(array.size, size=random.integers(1, 9))
    array[places] = any_of(random, [0, 255, int(random.integers(256))])
    return array.tobytes()


def set_integers(content, random):
    """Sets 1 to 4 aligned groups of 4 bytes to extreme numbers."""
    array = np.frombuffer(content + bytes(-len(content) % 4), np.uint32).copy()
    for place in random.integers(array.size, size=random.integers(1, 5)):
        array[place] = extreme_integer(random, len(content)) & 0xFFFFFFFF
    return array.tobytes()[: len(content)]


def cut(content, random):
    """Leaves the end out."""
    return content[: int(random.integers(len(content)))]


def extend(content, random):
    """Appends zeros, noise, or the file once more."""
    count = int(random.integers(1, 4096))
    return content + any_of(random, [bytes(count), random.bytes(count), content])


def move_chunks(content, random):
    """Takes a piece out, inserts it a second time, or swaps it with the piece behind it."""
    length = int(2 ** random.uniform(0, math.log2(len(content))))
    first = int(random.integers(len(content) - length + 1))
    before, piece, behind = np.split(np.frombuffer(content, np.uint8), [first, first + length])
    left, swapped = [before, behind], [before, behind[:length], piece, behind[length:]]
    return np.concatenate(any_of(random, [left, [before, piece, piece, behind], swapped])).tobytes()


# --- fields -------------------------------------------------------------------------------------


def alter(pattern, content, random):
    """Changes 1 to 3 fields whose "Class.field" has the pattern, in a file that can be unpacked."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    for _ in range(int(random.integers(1, 4))):
        owner, field = any_of(random, list(_fields(model, pattern)) or [(model, "version")])
        before = getattr(owner, field)
        try:
            setattr(owner, field, _altered(before, random, len(content)))
            builder = flatbuffers.Builder(2**16)
            builder.Finish(model.Pack(builder), file_identifier=tflite_file.FILE_IDENTIFIER)
            content = bytes(builder.Output())
        except (TypeError, ValueError, AttributeError, OverflowError, struct.error):
            setattr(owner, field, before)  # the field cannot hold that value
    return content


def _fields(owner, pattern):
    """Yields (object, name of a field) of the objects that are reached from one."""
    for field, value in vars(owner).items():
        if re.search(pattern, f"{type(owner).__name__}.{field}"):
            yield owner, field
        for child in value if isinstance(value, list) else [value]:
            if hasattr(child, "Pack"):
                yield from _fields(child, pattern)


def _altered(value, random, size_bytes):
    """Returns another value for a field, of the same type or, in place of nothing, of any."""
    number = extreme_integer(random, size_bytes)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return number
    if isinstance(value, float):
        return extreme_float(random, value)
    if isinstance(value, bytes):
        return any_of(random, [b"", b"\n\x1b[31m\xff\x00", value * 1000, random.bytes(9)])
    if isinstance(value, list | np.ndarray):
        return _altered_list(value, random, size_bytes)
    return any_of(
        random, [number, [number] * 5, b"text"] if value is None else [None, type(value)()]
    )


def _altered_list(values, random, size_bytes):
    """Returns a list or array with an element changed, left out, repeated or moved; or None."""
    items, number = list(values), extreme_integer(random, size_bytes)
    if not items:
        return [number]
    one, other = random.integers(len(items), size=2).tolist()
    item = items[one]
    changed = items[other] if hasattr(item, "Pack") else _altered(item.item(), random, size_bytes)
    rest, behind = items[:one], items[one + 1 :]
    choices = [
        *([*rest, changed, *behind],) * 4,
        *(rest, [*rest, *behind], [*rest, item, item, *behind], [*items[other:], *items[:other]]),
    ]
    if random.random() < 0.1:
        return None
    made = any_of(random, choices)
    return np.array(made, values.dtype) if isinstance(values, np.ndarray) else made


# name: pattern of the fields that it changes
FIELDS = {
    "shapes": r"^TensorT\.(shape|shapeSignature)$",
    "types": r"^TensorT\.(type|isVariable)$",
    "quantization": r"^QuantizationParametersT\.",
    "buffers": r"^(TensorT\.buffer|BufferT\..*|ModelT\.buffers)$",
    "operator codes": r"^(OperatorT\.opcodeIndex|OperatorCodeT\..*|ModelT\.operatorCodes)$",
    "operands": r"^OperatorT\.(inputs|outputs)$",
    "options": r"^(\w+OptionsT\..*|OperatorT\.builtinOptions.*)$",
    "graph's ends": r"^SubGraphT\.",
    "signatures and metadata": r"^(SignatureDefT|TensorMapT|MetadataT|ModelT)\.",
    "any field": r"",
}
BYTES = {
    "flip bits": flip_bits,
    "set bytes": set_bytes,
    "set integers": set_integers,
    "cut": cut,
    "extend": extend,
    "move chunks": move_chunks,
}
MUTATIONS = {name: functools.partial(alter, pattern) for name, pattern in FIELDS.items()} | BYTES


def mutate(content, random):
    """Returns (the mutated file, names of what was done): one mutation; in one file of four two."""
    names = [any_of(random, list(MUTATIONS))]
    if random.random() < 0.25:
        names.append(any_of(random, list(BYTES)))
    for name in names:
        if content:
            content = MUTATIONS[name](content, random)
    return content, " + ".join(names)
