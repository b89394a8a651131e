"""Charts of the measured times."""

from pathlib import Path

from matplotlib.figure import Figure

from bench.gpu.machine import Row


def draw(rows: list[Row], device: str, folder: Path, stem: str) -> list[Path]:
    """Draws one chart per benchmark and pass: for each workload a point per contender, with whiskers from the 20 % to
    the 80 % quantile, and a line at the floor.

    Args:
        rows: results; those without a time are skipped.
        device: name of the device, for the title.
        folder: folder to write to.
        stem: prefix of the file names.

    Returns:
        The paths of the PNG files.
    """
    paths = []
    timed = [row for row in rows if row["ms"] is not None]
    for bench, kind in dict.fromkeys((row["bench"], row["pass"]) for row in timed):
        some = [row for row in timed if (row["bench"], row["pass"]) == (bench, kind)]
        workloads = list(dict.fromkeys(row["workload"] for row in some))
        contenders = list(dict.fromkeys(row["contender"] for row in some))
        figure = Figure(figsize=(max(6, 1.2 * len(workloads)) + 2, 4), layout="constrained")
        axes = figure.subplots()
        for place, contender in enumerate(contenders):
            mine = [row for row in some if row["contender"] == contender]
            shift = 0.8 * ((place + 0.5) / len(contenders) - 0.5)
            whiskers = ([row["ms"] - row["ms_q20"] for row in mine], [row["ms_q80"] - row["ms"] for row in mine])
            where = [workloads.index(row["workload"]) + shift for row in mine]
            marker = "os^Dv"[place // 10]
            axes.errorbar(where, [row["ms"] for row in mine], whiskers, fmt=marker, label=contender)
        floors = {workloads.index(row["workload"]): row["floor_ms"] for row in some if "floor_ms" in row}
        if floors:
            ends = [place - 0.4 for place in floors], [place + 0.4 for place in floors]
            axes.hlines(list(floors.values()), *ends, color="black", linewidth=1, label="floor")
        axes.set_xticks(range(len(workloads)), workloads, rotation=30, ha="right")
        axes.set_xlim(-0.6, len(workloads) - 0.4)
        axes.set_yscale("log")
        axes.set_ylabel("milliseconds")
        axes.set_title(f"{bench}, {kind}\n{device}", fontsize="medium", loc="left")
        figure.legend(loc="outside right upper", fontsize="small")
        path = folder / f"{stem}-{bench}-{kind.replace('+', '-')}.png"
        figure.savefig(path, dpi=150)
        paths.append(path)
    return paths
