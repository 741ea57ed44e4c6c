"""The chart of a card: the relative error of every group, layer by layer, as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from hqq_core.card._groups import Group, Measured, error_of, groups_of

SIZE_INCHES, DPI = (8.0, 4.0), 150
MARKERS = "osD^v<>pP*X"


def chart_png(tensors: Sequence[Measured]) -> bytes | None:
    """1200 x 600 pixels, the same bytes for the same errors; None where no layer has lost anything.

    The backend is Agg, with matplotlib's own fonts and defaults whatever the user's settings; nothing in the file tells a time
    or a version.
    """
    quantized = [tensor for tensor in tensors if tensor.quantized and tensor.layer is not None]
    if not any(tensor.squared_error for tensor in quantized):
        return None
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = Figure(SIZE_INCHES, DPI, layout="tight")
        axes = figure.add_subplot(
            xlabel="layer", ylabel="relative error", title="‖W − dequantized‖ / ‖W‖ by layer and group"
        )
        places = {layer: x for x, layer in enumerate(_layers(quantized))}
        for i, group in enumerate(groups_of(quantized)):
            points = _points(group, places)
            axes.plot(
                [*points], [*points.values()], label=group.name,
                marker=MARKERS[i % len(MARKERS)], markersize=4, linewidth=1, color=f"C{i % 10}",
            )  # fmt: skip
        axes.margins(y=0.2)
        axes.autoscale_view()
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=2)
        file = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _layers(tensors: Sequence[Measured]) -> list[tuple[str, int]]:
    """One stack after the other, as the files have them."""
    layers = dict.fromkeys(tensor.layer for tensor in tensors if tensor.layer is not None)
    stacks = {stack: i for i, (stack, _) in reversed(list(enumerate(layers)))}
    return sorted(layers, key=lambda layer: (stacks[layer[0]], layer[1]))


def _points(group: Group, places: dict[tuple[str, int], int]) -> dict[int, float]:
    by_layer: dict[int, list[Measured]] = {}
    for tensor in group.tensors:
        if tensor.layer is not None:
            by_layer.setdefault(places[tensor.layer], []).append(tensor)
    errors = {x: error_of(by_layer[x]) for x in sorted(by_layer)}
    return {x: math.nan if error is None else error for x, error in errors.items()}
