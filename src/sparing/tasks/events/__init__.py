"""Tasks on the events of event cameras."""
