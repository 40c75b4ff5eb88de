"""Fleets: many devices that learn one model together, each from data that never leaves it."""
