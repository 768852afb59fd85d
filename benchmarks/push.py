"""Push a folder to a registry in a folder of its own: `python -m benchmarks.push FOLDER NAME REGISTRY`."""

from __future__ import annotations

import os
import sys

import surgery


def main() -> None:
    folder, name, registry = sys.argv[1:]
    os.environ["SURGERY_REGISTRY"] = registry
    surgery.push(folder, name, endpoint="local")


if __name__ == "__main__":
    main()
