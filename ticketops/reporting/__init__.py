"""Floor 4: tables, plots and the report, read from a search's folder and nothing else."""

from ticketops.reporting.report import report

__all__ = ["report"]
