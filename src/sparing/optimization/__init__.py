"""Economies of training itself: what an optimizer, a schedule or a loss can do at no extra gradient."""
