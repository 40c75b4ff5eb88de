"""Ledgers as people read them: self-contained HTML pages, and figures as text."""

from sparing.report.page import comparison_html, report_html, write_comparison, write_report

__all__ = ["comparison_html", "report_html", "write_comparison", "write_report"]
