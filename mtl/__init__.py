"""Fine-tune one language model on many tasks at once so that every task ends up good."""

__version__ = "0.1.0"
