"""Backbones that several tasks share."""
