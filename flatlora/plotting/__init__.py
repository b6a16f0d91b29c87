"""Figures of the results of `flatlora.analysis`, one function for each figure.

A function takes a mapping of labels to results and returns a matplotlib figure:

    figure = plot_loss_line({"LoRA": line_a, "Flat-LoRA": line_b}, theme="dark")
    figure.savefig("line.png")

Series differ in color (after Okabe and Ito, for color-blind readers), lightness, line style and marker, so that they
can be distinguished in grayscale. Bands are 95 % Student's t intervals. matplotlib (the `plot` extra) is imported
inside the functions, and pyplot is not used: no backend is selected and no figure stays open.
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
