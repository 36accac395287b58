"""What ``mtl`` costs, measured side by side with plain loops and with other libraries."""
