"""Files are written whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside `path`, with its ending; renames it when the block is done.

    Raises:
      OSError: names `path` where it cannot be written; an earlier file is left as it was.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_bytes(content: bytes, path: str | os.PathLike) -> None:
    """Writes a file whole or not at all; raises OSError as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
