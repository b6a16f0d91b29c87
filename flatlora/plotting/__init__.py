"""One function per figure. Each takes results of `flatlora.analysis` and returns a matplotlib figure.

    figure = plot_loss_line({"LoRA": line_a, "Flat-LoRA": line_b}, theme="dark")
    figure.savefig("line.png")

Series differ in colour (after Okabe and Ito, told apart by the colour-blind), in lightness, in line style and in
marker, so that they are readable printed in grey. Bands are 95 % Student intervals. matplotlib (the `plot` extra) is
imported inside the functions, pyplot never: no backend is chosen and no figure is left open.
"""

from .curves import plot_degradation, plot_loss_line, plot_sharpness, plot_spectrum, plot_training
from .surfaces import plot_surface

__all__ = [
    "plot_degradation",
    "plot_loss_line",
    "plot_sharpness",
    "plot_spectrum",
    "plot_surface",
    "plot_training",
]
