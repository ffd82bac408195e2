"""Write the rows of a suite's data into its manifest:

python tools/manifest.py src/fusewright/bench/gathering/manifests/vision-mini.yaml --data DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fusewright.bench.gathering.manifest import write_manifest

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    asked = parser.parse_args()
    for name, one in write_manifest(asked.manifest, asked.data).items():
        print(name, *(f"{split} {len(rows)}" for split, rows in one.splits.items()))
