"""One self-contained page from results of ``gossamer eval``: tables, pictures, and the numbers of each as CSV."""

from gossamer.report.page import write_report

__all__ = ["write_report"]
