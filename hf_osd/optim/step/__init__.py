"""One step of one weight."""
