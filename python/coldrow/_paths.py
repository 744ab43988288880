"""Where the parts of the installation that other builds need are."""

import sys
from pathlib import Path


def includes() -> Path:
    """Return the folder to give to a compiler as ``-I``."""
    return _find("include")


def cmake() -> Path:
    """Return the folder with ``coldrowConfig.cmake``, for ``coldrow_DIR``."""
    return _find("cmake")


def _find(name: str) -> Path:
    # An editable installation spreads the package over two folders: its sources, and what was built.
    folders = sys.modules[__name__.rpartition(".")[0]].__path__
    for folder in folders:
        if (found := Path(folder).resolve() / name).is_dir():
            return found
    raise FileNotFoundError(f"no folder {name!r} in {', '.join(folders)}: reinstall coldrow")
