"""The version of this package, and of what it was read against."""

__version__ = "0.1.0"

MEGATRON_VERSIONS = ">=0.19,<0.20"
