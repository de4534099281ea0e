"""``shoestring info``: versions, devices and extras."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

from shoestring import __version__
from shoestring.cli._console import Json, one_line, print_fields, print_json, print_table, say

if TYPE_CHECKING:
    from packaging.requirements import Requirement


def run(as_json: Json = False) -> None:
    """Show versions, devices, and which extras are installed.

    \b
    Examples:
      shoestring info
      shoestring info --json
    """
    groups = requirements()
    core = [r.name for r in groups.pop("", [])] or ["torch", "numpy", "scipy", "scikit-learn", "typer", "rich"]
    report: dict[str, Any] = {
        "shoestring": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: version(name) for name in sorted(core)},
        "devices": devices(),
        "extras": {name: extra(name, group) for name, group in groups.items()},
    }
    if as_json:
        print_json(report)
        return
    versions = {name: report[name] for name in ("shoestring", "python", "system")}
    print_fields(versions | {name: found or "missing" for name, found in report["packages"].items()})
    say()
    for device in report["devices"]:
        say(", ".join(f"{key} {value}" for key, value in device.items()))
    say()
    if not groups:
        say("extras: unknown, since shoestring is not installed as a package")
        return
    rows = [
        (name, "installed", "")
        if state["installed"]
        else (name, f"missing: {', '.join(state['missing'])}", state["install"])
        for name, state in report["extras"].items()
    ]
    print_table(["extra", "state", "to install it"], rows, whole=[2])


def requirements() -> dict[str, list[Requirement]]:
    """What the installed package asks for on this machine: "" for the core, then one list an extra.

    Empty if shoestring runs from a folder and is not installed.
    """
    from packaging.requirements import Requirement

    try:
        installed = metadata.distribution("shoestring")
    except metadata.PackageNotFoundError:
        return {}
    wanted = [Requirement(line) for line in installed.requires or ()]

    def of(extra: str) -> list[Requirement]:
        return [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": extra})]

    core = of("")
    names = sorted(installed.metadata.get_all("Provides-Extra") or ())
    return {"": core} | {name: [r for r in of(name) if r not in core] for name in names}


def extra(name: str, group: list[Requirement]) -> dict[str, Any]:
    missing = []
    for requirement in group:
        found = version(requirement.name)
        if found is None:
            missing.append(requirement.name)
        elif not requirement.specifier.contains(found, prereleases=True):
            missing.append(f"{requirement.name} {requirement.specifier} (found {found})")
    return {"installed": not missing, "missing": missing, "install": f"pip install 'shoestring[{name}]'"}


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> list[dict[str, Any]]:
    cpu: dict[str, Any] = {"device": "cpu", "cores": os.cpu_count()}
    try:
        import torch
    except (ImportError, OSError) as error:  # a broken installation is what this verb is called for
        return [cpu | {"torch": f"does not load: {one_line(error)}"}]
    found = [cpu | {"threads": torch.get_num_threads()}]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        found.append({"device": f"cuda:{i}", "name": gpu.name, "memory_gb": round(gpu.total_memory / 2**30, 1)})
    if torch.backends.mps.is_available():
        found.append({"device": "mps"})
    return found
