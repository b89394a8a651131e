"""Floor 4: tables, plots and the report, read from a run's folder and nothing else."""

from ticketops.reporting.report import report, write_report
from ticketops.reporting.results import Result, SearchResult, ShareResult, TransferResult, read

__all__ = ["Result", "SearchResult", "ShareResult", "TransferResult", "read", "report", "write_report"]
