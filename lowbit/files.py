"""Files are written whole or not at all."""

import os
import pathlib


def save_bytes(content: bytes, path: str | os.PathLike) -> None:
    """Writes a file whole or not at all: to a temporary name in its folder, then renamed.

    Raises:
      OSError: where it cannot be written; an earlier file of that name is left as it was.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
