"""The kernels that work on arrays, by the memory that the arrays are in: ``host`` and ``cuda``.

``protocol`` says what a backend offers, ``registry`` finds the one for an array or a device.
"""
