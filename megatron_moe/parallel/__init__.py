"""Who talks to whom.

``groups`` names the process groups of a MoE layer and checks their sizes against the model;
``collectives`` are the exchanges that a layer needs, each with its adjoint as its backward.
"""
