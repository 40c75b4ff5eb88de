"""Economies that make a trained model smaller."""
