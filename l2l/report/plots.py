"""Pictures of runs, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from l2l.report.files import write_whole

Curve: TypeAlias = Sequence[tuple[float, float]]
"""Points (x, y) in order."""


def smooth(curve: Curve, window: int = 25) -> list[tuple[float, float]]:
    """Running mean over the last ``window`` points."""
    values = [y for _, y in curve]
    means = (values[max(0, i - window + 1) : i + 1] for i in range(len(values)))
    return [(x, sum(part) / len(part)) for (x, _), part in zip(curve, means, strict=True)]


def plot_panels(target: Path, panels: Mapping[str, Mapping[str, Curve]], x_label: str, y_label: str) -> Path:
    """One panel per entry of ``panels``, one line per entry of a panel; written whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for label, curve in curves.items():
            axis.plot([x for x, _ in curve], [y for _, y in curve], label=label, linewidth=1.5)
        axis.set(title=title, xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3)
        if any(curves.values()):
            axis.legend(frameon=False, fontsize=8)
    try:
        return write_whole(target, lambda path: figure.savefig(path, dpi=120, format="png"))
    finally:
        pyplot.close(figure)
