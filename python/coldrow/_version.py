"""The version, in the one place Python reads it from."""

from importlib import metadata

__version__ = metadata.version("coldrow")
