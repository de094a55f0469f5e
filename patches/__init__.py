"""Every change made to Megatron and torch at run time, declared; see README.md."""
