"""Training: corpora to batches (data, objectives), the training loop (loop), and saving (checkpoint)."""
