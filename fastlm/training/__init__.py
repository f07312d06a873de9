"""Training: a corpus becomes batches (data.py, objectives.py), batches become steps (loop.py), and what was learnt becomes a directory (checkpoint.py)."""
