"""Optional packages: asked for by name before anything starts, and never loaded to find out."""

from __future__ import annotations

import importlib.util

from lockstep.errors import UserError


def require(package: str, who: str, extra: str = "") -> None:
    """Say how an optional package is installed where it is not; nothing of it is loaded.

    Args:
        package: the package that is imported.
        who: what needs it, as the user wrote it.
        extra: the extra of pyproject.toml that has it; empty: the one of its name.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{who} needs the package {package}, which is not installed: pip install '.[{extra or package}]' in "
            "lockstep's folder"
        )
