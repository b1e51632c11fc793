"""Triton kernels and nothing else: importing a file here needs triton, not a GPU.

Names of the arguments: ``uploads`` is the first element of client 0, ``client_stride`` the distance
between clients. ``segments`` has one row per factor (offset and row stride in the uploads, width,
offset and row stride of its counterpart), ``tasks`` one row per program. Upper-case arguments are
compile-time constants; a name with ``_PAD`` is padded to a power of two.
"""
