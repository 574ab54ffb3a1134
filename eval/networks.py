"""The networks of eval.whitepaper: the paper's ten, a `--networks` file's, or those of `--models`.

Paths under --root are written "$ROOT/path", so that rows and commands name no folder of one machine.
"""

import dataclasses
import glob
import os
import pathlib
import re
import tomllib

from eval import published


@dataclasses.dataclass(frozen=True)
class Network:
    """A row of the table: a zoo name or a `.keras` file."""

    row: str
    model: str
    paper: str | None = None  # its name in eval/published.py
    weights: str | None = None
    alpha: float | None = None
    input_size: int | None = None
    preprocess: str | None = None

    def __post_init__(self):
        if not re.fullmatch(r"[\w.+-]+", self.row):
            raise ValueError(f"network {self.row!r}: a row's name is made of letters, digits, _.+-")
        if self.paper is not None and self.paper not in PAPER:
            raise ValueError(
                f"network {self.row}: paper = {self.paper!r} is not one of {', '.join(PAPER)}"
            )


PAPER = tuple(published.TABLES[1].rows)
NETWORKS = tuple(
    Network(name, model, name, alpha=alpha, input_size=input_size)
    for name, model, alpha, input_size in (
        ("Mobilenet_V1_0.25_128", "mobilenet_v1", 0.25, 128),
        ("Mobilenet_V2_1_224", "mobilenet_v2", None, None),
        ("Mobilenet_V1_1_224", "mobilenet_v1", None, None),
        ("Nasnet_Mobile", "nasnet_mobile", None, None),
        ("Mobilenet_V2_1.4_224", "mobilenet_v2", 1.4, None),
        ("Inception_V3", "inception_v3", None, None),
        ("Resnet_v1_50", "resnet_v1_50", None, None),
        ("Resnet_v2_50", "resnet_v2_50", None, None),
        ("Resnet_v1_152", "resnet_v1_152", None, None),
        ("Resnet_v2_152", "resnet_v2_152", None, None),
    )
)


def chosen(config) -> list[Network]:
    """Returns the networks of --networks and --models, paths placed under --root.

    Args:
      config: has the flags networks, models, root, weights and preprocess.

    Raises:
      ValueError: names the entry of the file that is wrong, or the network that is not in it.
    """
    if config.networks is not None:
        listed = {network.row: network for network in read_networks(config.networks)}
        names = list(listed)
        if config.models is not None:
            names = picked(config.models, listed, "--models", f"networks of {config.networks}")
        networks = [listed[name] for name in names]
    elif config.models is not None:
        networks = [_network(name) for name in split(config.models, "--models")]
    else:
        networks = list(NETWORKS)
    placed = []
    for network in networks:
        model, weights = located(network.model, config.root), network.weights
        if model.endswith(".keras"):
            if not os.path.isfile(real(model, config.root)):
                raise FileNotFoundError(f"network {network.row}: {network.model}: no such file")
            preprocess = network.preprocess or config.preprocess
        else:
            weights, preprocess = weights or config.weights, network.preprocess
        placed.append(
            dataclasses.replace(
                network,
                model=model,
                weights=None if weights is None else located(weights, config.root),
                preprocess=preprocess,
            )
        )
    names = [network.row for network in placed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two networks are named {twice[0]}; a --networks file can name them")
    return placed


def read_networks(path: str) -> list[Network]:
    """Returns the networks of a TOML file.

    Raises:
      ValueError: names the file, the entry and what is wrong with it.
    """
    with open(path, "rb") as file:
        try:
            content = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: {error}") from error
    entries = content.get("network")
    if set(content) != {"network"} or not isinstance(entries, list):
        raise ValueError(f"{path}: needs entries [[network]] and nothing else")
    kinds = {
        "row": str,
        "model": str,
        "paper": str,
        "weights": str,
        "alpha": (int, float),
        "input_size": int,
        "preprocess": str,
    }
    networks = []
    for number, entry in enumerate(entries, 1):
        for name, value in entry.items():
            if name not in kinds:
                raise ValueError(f"{path}: network {number}: {name!r} is none of {list(kinds)}")
            if not isinstance(value, kinds[name]):
                raise ValueError(f"{path}: network {number}: {name} = {value!r} has a wrong type")
        if not {"row", "model"} <= set(entry):
            raise ValueError(f"{path}: network {number} needs row and model")
        networks.append(Network(**entry))
    return networks


def _network(name):
    for network in NETWORKS:
        plain = network.alpha is None and network.input_size is None
        if name == network.row or (plain and name == network.model):
            return network
    # A name that is neither is left to the tools: they list the zoo, which needs TensorFlow here.
    return Network(pathlib.PurePath(name).stem if name.endswith(".keras") else name, name)


def split(text: str, flag: str) -> list[str]:
    """Returns the names between commas; raises ValueError, naming the flag, for an empty one."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"{flag}={text} holds an empty name")
    return names


def picked(text: str, allowed, flag: str, what: str) -> list[str]:
    """Returns the names between commas; raises ValueError where one is not among `allowed`."""
    names = split(text, flag)
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ValueError(f"{flag}: {unknown[0]!r} is none of the {what}: {', '.join(allowed)}")
    return list(dict.fromkeys(names))


def check_root(root: str | None) -> None:
    """Raises FileNotFoundError where --root is no folder."""
    if root is not None and not os.path.isdir(root):
        raise FileNotFoundError(f"--root {root}: no such folder")


def located(path: str, root: str | None) -> str:
    """Returns `path` as "$ROOT/path" where it lies under --root, else as it is.

    Commands and rows keep this form, so that they name no folder of one machine.
    """
    if root is None or os.path.isabs(path):
        return path
    inside = os.path.join(root, path)
    return f"$ROOT/{path}" if os.path.exists(inside) or glob.glob(inside) else path


def real(text: str, root: str | None) -> str:
    """Returns the text with $ROOT replaced."""
    return text if root is None else text.replace("$ROOT", root.rstrip("/") or "/")
