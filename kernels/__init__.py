"""The Triton kernels, one file per operator, installed as fastlm.kernels.

They import Triton; fastlm/backends/triton.py checks whether it is installed.
"""
