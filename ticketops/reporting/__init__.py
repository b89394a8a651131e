"""Floor 4: tables, plots and the report, read from a run's folder and nothing else."""

from ticketops.reporting.report import overview, report

__all__ = ["overview", "report"]
