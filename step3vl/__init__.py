"""step3vl: reproduce, question and extend modern vision-language recipes (docs/tour.md)."""

__version__ = "0.1.0"
