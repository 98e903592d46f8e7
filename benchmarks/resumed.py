"""Rows of a comparison that takes long: methods over sparsities and seeds, none of them repeated."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from secateur.pipeline import write_json

Data = dict[str, Any]


def measured(args: Namespace, report: Data, row: Callable[[str, float, int], Data]) -> None:
    """Write `report` and all rows to `args.output`, after each row.

    Args:
        args: has `methods`, `sparsities`, `seeds` and `output`.
        report: everything but the rows; rows of a file with another protocol are not taken over.
        row: measures one method at one sparsity from one seed.
    """
    known = json.loads(args.output.read_text()) if args.output.exists() else {}
    rows = known.get("rows", []) if known.get("protocol") == report["protocol"] else []
    done = {(r["method"], r["sparsity"], r["seed"]) for r in rows}
    for seed in args.seeds:
        for sparsity in args.sparsities:
            for method in args.methods:
                if (method, sparsity, seed) not in done:
                    rows.append(row(method, sparsity, seed))
                    print(rows[-1], flush=True)
                    write_json(args.output, report | {"rows": rows})
