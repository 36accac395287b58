"""Merging runs that began alike and were trained with different emphasis: ``mtl merge``."""
