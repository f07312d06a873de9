"""Measuring: ours and the rivals in turn in one run, ratios round by round, bytes and FLOPs against the machine's own peaks."""
