"""Mixture-of-Experts for Megatron-Core: a plugin.

Importing this package imports neither Megatron nor Transformer Engine and changes nothing.
"""

from megatron_moe.version import __version__

__all__ = ["__version__"]
