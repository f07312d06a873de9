"""What every layer uses: errors, tracing, autocast, memory layout, random numbers. Imports nothing of the package."""
