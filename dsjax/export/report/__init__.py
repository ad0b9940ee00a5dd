"""REPORT.md and report.html: a bundle for people."""
