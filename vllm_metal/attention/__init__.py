"""The attention boundary: what a model hands over, and what a backend answers."""
