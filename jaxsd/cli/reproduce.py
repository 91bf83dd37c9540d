"""`jaxsd reproduce`: do the formulas of this package give the numbers that papers print?"""

import importlib
import pathlib
from typing import Any, Literal

import rich.console
import tyro

from . import reproduction

Paper = Literal["sdsl", "theory", "batching"]
PAPERS: tuple[Paper, ...] = ("sdsl", "theory", "batching")


def reproduce(
    paper: tyro.conf.Positional[tuple[Paper, ...]] = PAPERS,
    out: str | None = None,
) -> dict[str, Any]:
    """Computes the tables and figures of papers again and compares.

    sdsl is arXiv 2603.11053 (draft size and acceptance), with the published measurements that the
    cost model rests on; theory is arXiv 2411.00841 (rejections, several drafts, bias against
    speed); batching is arXiv 2310.18813 (draft length by batch size, and its server).

    Args:
      paper: which; by default all of them.
      out: folder to write the tables (CSV) and figures (PNG, PDF) to; it needs matplotlib.

    Returns:
      Every figure with its source and whether it agrees; JSON values.
    """
    results = {}
    for name in paper or PAPERS:
        module = importlib.import_module(f"jaxsd.cli.reproduce_{name}")
        result = module.build()
        reproduction.show(result)
        results[name] = reproduction.as_json(result)
        if out is not None:
            files = reproduction.write(result, pathlib.Path(out) / name)
            rich.console.Console(highlight=False).print(
                f"Wrote {len(files)} files to {out}/{name}."
            )
            results[name]["files"] = files
    return results
