"""The outcome of whole suites of tests, from pytest's junit files, as a result with its provenance.

python -m benchmarks.common.suites NAME FEATURE FOLDER    # FOLDER/unit.xml, FOLDER/e2e.xml
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common.provenance import figures_of, write


def outcome(junit: Path) -> dict[str, int]:
    """How many tests of a junit file passed, failed, were skipped, and the whole seconds of all."""
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    if suite is None:
        raise ValueError(f"{junit}: found no <testsuite>, expected a junit file of pytest")
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
        "seconds": round(float(suite.attrib["time"])),
    }


def main(arguments: Sequence[str]) -> None:
    """Write the result; it shows the feature only if tests ran and none failed."""
    name, feature, folder = arguments
    files = sorted(Path(folder).rglob("*.xml"))
    suites = {file.relative_to(folder).with_suffix("").as_posix(): outcome(file) for file in files}
    passed = bool(suites) and not any(suite["failed"] for suite in suites.values())
    write(
        figures_of(name),
        {"suites": suites},
        device=torch.device("cpu"),
        features=[feature] if passed else [],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
