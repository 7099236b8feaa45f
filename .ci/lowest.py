"""Print the lowest version of each dependency that pyproject.toml allows, for pip."""

from pathlib import Path

import tomllib

KEPT = ("torch",)  # the tested version stays: another one would take minutes to fetch

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    name, _, version = requirement.partition(">=")
    if name not in KEPT:
        print(f"{name}=={version}")
