"""Spiking networks: neurons, attention gates, layers and networks, what they cost, and how they answer step by step."""
