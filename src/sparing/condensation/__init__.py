"""Economies of data: small synthetic or chosen sets on which a network learns nearly as much as on the whole."""
