"""Finds user files whose names hide a Python module or a library."""

import os
import sys

LIBRARIES = {
    "click", "constriction", "matplotlib", "mlflow", "numpy", "omegaconf", "pandas", "pydantic", "ray", "rich",
    "safetensors", "scipy", "sklearn", "torch", "torchvision", "yaml",
}  # fmt: skip


def explain() -> str | None:
    """Explains which files hide a module in the folder that Python searches first, the program's; None if none do."""
    folder = sys.path[0] if sys.path else ""
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError:
        return None
    hidden = sys.stdlib_module_names | LIBRARIES
    found = [os.path.join(folder, name) for name in names if name.endswith(".py") and name[:-3] in hidden]
    if not found:
        return None
    return f"fedlq_ray cannot be imported: {', '.join(found)} hides the module of the same name; rename it"
