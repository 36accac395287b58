"""Data: sources, splits, tokenized examples and their cache, cursors and batches."""
