"""Image classification: embedded digits, published sets, and a user's own folder of images."""
