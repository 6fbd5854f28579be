"""Sparsity as a library: micro-tiles, text, training, generation, checkpoints.

Import the module you need (`from sparsellm import text`); this package imports none of them by itself.
"""
