"""The figures of tests/extras/families/test_bar.py as the table of docs/families.md.

    python tests/family_table.py
"""
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

BAR = Path(__file__).parent / "extras/families"
COLUMNS = {"logits": "logits", "sampler": "sampler, nats", "gradient": "gradient", "planned": "kept / planned"}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", str(BAR), f"--junitxml={report}"],
                              stdout=subprocess.DEVNULL)
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for test in ET.parse(report).iter("testcase"):
            case = test.get("name").partition("[")[2].rstrip("]").partition("-torch")[0]
            for entry in test.iter("property"):
                column = entry.get("name").partition("_")[0]
                found[case][column] = max(float(entry.get("value")), found[case].get(column, 0.0))
    print("| case | " + " | ".join(COLUMNS.values()) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for case, row in found.items():
        if row:
            cells = (f"{row[key]:.2f}" if key == "planned" else f"{row[key]:.1e}" for key in COLUMNS)
            print(f"| {case} | " + " | ".join(cells) + " |")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
