"""Transfer knowledge from a big network to a small detector, and measure which way of doing it helps."""

__version__ = "0.1.0"
