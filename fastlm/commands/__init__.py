"""The implementation of each command; their arguments are in cli.py."""
