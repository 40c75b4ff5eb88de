"""Economies that teach a small model by a large one."""
