"""Bar charts of the measured times."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from bench.gpu.machine import Row


def draw(rows: list[Row], device: str, folder: Path, stem: str) -> list[Path]:
    """Draws one chart per benchmark and pass: a group of bars per workload, one bar per contender, whiskers from the
    20 % to the 80 % quantile.

    Args:
        rows: results; those without a time are skipped.
        device: name of the device, for the title.
        folder: folder to write to.
        stem: prefix of the file names.

    Returns:
        The paths of the PNG files.
    """
    paths = []
    kinds = dict.fromkeys((row["bench"], row["pass"]) for row in rows)
    for bench, kind in kinds:
        some = [row for row in rows if (row["bench"], row["pass"]) == (bench, kind) and row["ms"] is not None]
        if not some:
            continue
        workloads = list(dict.fromkeys(row["workload"] for row in some))
        contenders = list(dict.fromkeys(row["contender"] for row in some))
        figure, axes = pyplot.subplots(figsize=(max(6, 1.2 * len(workloads)), 4), layout="constrained")
        width = 0.8 / len(contenders)
        for i, contender in enumerate(contenders):
            mine = {row["workload"]: row for row in some if row["contender"] == contender}
            places = [j for j, workload in enumerate(workloads) if workload in mine]
            chosen = [mine[workloads[j]] for j in places]
            medians = [row["ms"] for row in chosen]
            whiskers = [
                [row["ms"] - row["ms_q20"] for row in chosen],
                [row["ms_q80"] - row["ms"] for row in chosen],
            ]
            axes.bar([j + i * width for j in places], medians, width, yerr=whiskers, label=contender)
        axes.set_xticks([j + 0.4 - width / 2 for j in range(len(workloads))], workloads, rotation=30, ha="right")
        axes.set_yscale("log")
        axes.set_ylabel("milliseconds")
        axes.set_title(f"{bench}, {kind}: {device}")
        axes.legend(fontsize="small")
        path = folder / f"{stem}-{bench}-{kind.replace('+', '-')}.png"
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
        paths.append(path)
    return paths
