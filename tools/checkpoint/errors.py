"""The one error of the checkpoint tools: what is wrong, where, by which rule, and the way out."""


class CheckpointError(ValueError):
    """A checkpoint or a request that cannot be served; nothing was published."""
