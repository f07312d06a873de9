"""fastlm bench --gpu: cases and their rivals, timed in turn by the GPU's own events, a training step, and the report. plan.py says what, in which order."""
