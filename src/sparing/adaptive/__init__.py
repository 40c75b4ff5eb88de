"""Economies at run time: how much of a network a sample needs, and how much the machine can spare."""
