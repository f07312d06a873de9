"""The `fastlm` command: the arguments of all commands and their help.

The commands are implemented in fastlm/commands/, each imported when it is called.
"""

import sys

# Each adds its commands, in the order of the help.
# isort: off
from fastlm.cli import training, inference, machine  # noqa: F401

# isort: on
from fastlm.cli.app import app
from fastlm.core import interrupts

__all__ = ["app", "main"]


def main() -> None:
    try:
        interrupts.raise_again()
        app()
    except KeyboardInterrupt:  # outside a command
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        interrupts.ignore()
