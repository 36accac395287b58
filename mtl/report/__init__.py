"""Comparing finished runs: which strategy makes every task good, and how sure one can be of it."""
