"""Claims of the room `learn`."""
