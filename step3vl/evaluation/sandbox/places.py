"""What of this machine a program may read: the interpreter, its libraries, and packages that it is given."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("numpy",)
"""What a program may be given besides the standard library."""
INSIDE = "/packages"
_SYSTEM = ["/usr/lib", "/usr/lib64", "/usr/lib32", "/usr/local/lib", "/usr/share/zoneinfo", "/lib", "/lib64", "/lib32"]


def places(python: str) -> dict[str, list[str]]:
    """Folders that a program may read, and those within them that are hidden."""
    prefixes = dict.fromkeys([sys.base_prefix, sys.base_exec_prefix, str(Path(python).parents[1])])
    folders = [*_SYSTEM, *(f"{prefix}/{part}" for prefix in prefixes for part in ("lib", "lib64"))]
    library = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = [f"{prefix}/lib/{library}/site-packages" for prefix in prefixes]
    packages += ["/usr/lib/python3/dist-packages", f"/usr/local/lib/{library}/dist-packages"]
    return {"folders": list(dict.fromkeys(folders)), "hidden": list(dict.fromkeys(packages))}


def package_folders(packages: Sequence[str]) -> dict[str, str]:
    """Folders of packages, and of the libraries that their wheels bring, by the names that they have inside.

    Raises:
        ValueError: a package that is not installed, or not one that programs may have.
    """
    folders: dict[str, str] = {}
    for name in packages:
        if name not in PACKAGES:
            raise ValueError(f"sandbox: package {name!r} is not one that programs may have: {', '.join(PACKAGES)}")
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"sandbox: package {name!r} is not installed")
        folder = os.path.realpath(spec.submodule_search_locations[0])
        folders |= {name: folder} | ({f"{name}.libs": f"{folder}.libs"} if os.path.isdir(f"{folder}.libs") else {})
    return folders


def package_place(folders: dict[str, str], isolated: bool) -> str:
    """The folder in which a program finds its packages."""
    return INSIDE if isolated else str(Path(next(iter(folders.values()))).parent)
