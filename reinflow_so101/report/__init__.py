"""The report on trainings: one HTML file with charts, films and tables, from what a run's directory holds."""

from reinflow_so101.report.page import write_report

__all__ = ["write_report"]
