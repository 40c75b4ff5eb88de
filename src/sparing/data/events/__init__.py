"""Events of event cameras: streams, frames made of them, a simulator, and readers of published recordings."""
