"""What a run leaves behind and shows: records, TensorBoard, the terminal, results. Nothing here decides a number.

Only rank 0 has these objects. The records of :mod:`mtl.reporting.records` are the one currency: what a line of
``metrics.jsonl`` says is what TensorBoard, the terminal and the warnings show.
"""
