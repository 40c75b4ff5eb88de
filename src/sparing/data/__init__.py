"""Readers of real formats, the data root, and executable preprocessing."""
