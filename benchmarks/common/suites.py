"""The outcome of whole suites of tests, from pytest's junit files, as a result with its provenance.

python -m benchmarks.common.suites NAME FEATURE FOLDER    # FOLDER/unit.xml, FOLDER/e2e/test_x.xml
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common.provenance import figures_of, write


def outcomes(folder: Path) -> dict[str, dict[str, int]]:
    """Suite -> how many of its tests passed, failed, were skipped, and the whole seconds of all."""
    found = {}
    for file in sorted(folder.rglob("*.xml")):
        suite = ElementTree.parse(file).getroot().find("testsuite")
        if suite is None:
            raise ValueError(f"{file}: found no <testsuite>, expected a junit file of pytest")
        count = {
            name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")
        }
        failed = count["failures"] + count["errors"]
        found[file.relative_to(folder).with_suffix("").as_posix()] = {
            "passed": count["tests"] - failed - count["skipped"],
            "failed": failed,
            "skipped": count["skipped"],
            "seconds": round(float(suite.attrib["time"])),
        }
    return found


def main(arguments: Sequence[str]) -> None:
    """Write the result; it shows the feature only if tests ran and none failed."""
    name, feature, folder = arguments
    suites = outcomes(Path(folder))
    passed = bool(suites) and not any(suite["failed"] for suite in suites.values())
    write(
        figures_of(name),
        {"suites": suites},
        device=torch.device("cpu"),
        features=[feature] if passed else [],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
