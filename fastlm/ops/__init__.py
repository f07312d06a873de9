"""The operators: one package each. Importing this package registers them all."""

import importlib
import pkgutil


def discover() -> None:
    """Import every operator's package, which registers it. Packages in folders added to __path__ are found too."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        if module.ispkg:
            importlib.import_module(module.name)


discover()
