"""Claims of the room `classify`."""
