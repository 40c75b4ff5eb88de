"""The CPU engine: encoders with 4×1 block-sparse or dense INT8 weights, compiled into one memory-mapped file."""
