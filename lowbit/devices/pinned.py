"""Packages that must be there in the version whose results are known."""

import importlib.metadata
from collections.abc import Mapping


def check(versions: Mapping[str, str], extra: str, why: str) -> None:
    """Raises ValueError where a package is missing, or is another version.

    Args:
      versions: wanted, by package.
      extra: of lowbit, which installs them.
      why: what the version decides, for the message: "codes of the emulated HTP are those of".
    """
    for package, wanted in versions.items():
        advice = f"pip install 'lowbit[{extra}]', or {package}=={wanted}"
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise ValueError(f"the package {package} is missing: {advice}") from error
        if found != wanted:
            raise ValueError(f"{package} is {found}, but {why} {wanted}: {advice}")
