"""The report on trainings: one HTML file with charts, films and tables, from what a run's directory holds."""

FILMS, REPORT_FILE = "films", "report.html"  # in a run's directory
