"""Benchmarks: interleaved timings of fastlm and its baselines, their ratios, and shares of the machine's peaks.

The operators' cases are in fastlm/ops/<operator>/bench.py.
"""
