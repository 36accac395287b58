"""Evaluation per task: exact loss per target token, and the task's metric on chosen or generated answers."""
