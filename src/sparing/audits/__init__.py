"""Audits: what was lost, or hides, besides quality."""
