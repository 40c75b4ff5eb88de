"""Economies of training data: which samples a step sees, and which of their tokens each layer computes."""
