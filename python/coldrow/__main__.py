"""``python -m coldrow``: what a bug report or a build needs to know."""

import argparse
import platform
import sys
from importlib import metadata

from coldrow import _paths


def main() -> None:
    """Print information about this installation."""
    parser = argparse.ArgumentParser(prog="python -m coldrow", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["info"], help="print versions and builds")
    parser.add_argument("--includes", action="store_true", help="print the folder of the headers")
    parser.add_argument("--cmakedir", action="store_true", help="print the folder for coldrow_DIR")
    args = parser.parse_args()
    if args.includes:
        print(_paths.includes())
    elif args.cmakedir:
        print(_paths.cmake())
    elif args.command == "info":
        _info()
    else:
        parser.print_help()
        sys.exit(2)


def _info() -> None:
    from coldrow import __version__, _core, cuda
    from coldrow._backends import registry

    print(f"coldrow   {__version__}")
    print(f"python    {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "numpy", "cupy"):
        try:
            print(f"{package:<9} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package:<9} not installed")
    print(f"builds    {', '.join(_core.builds())} (in use: {_core.build()})")
    print(f"threads   {_core.threads()}")
    backend = registry.accelerator()
    why = None if backend is None else backend.unavailable()
    print(
        f"cuda      built: {cuda.is_built()}, available: {cuda.is_available()}"
        + (f" ({why})" if why else "")
    )


if __name__ == "__main__":
    main()
