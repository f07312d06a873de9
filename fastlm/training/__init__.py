"""Training: corpora to batches (data, objectives), steps (trainer), the loop over them (loop), saving (checkpoint)."""
