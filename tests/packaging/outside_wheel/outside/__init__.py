"""What the library built from outside.cpp computes."""

import ctypes
from pathlib import Path

_library = ctypes.CDLL(str(Path(__file__).with_name("liboutside.so")))
_library.shrink.argtypes = [ctypes.c_int32, ctypes.c_float, ctypes.c_float]
_library.shrink.restype = ctypes.c_float
shrink = _library.shrink
