"""Segue replaces QEMU under a running guest.

Importing this costs nothing on purpose: a supervisor is resident for as long as its guest.
"""

__version__ = "0.1.0"
